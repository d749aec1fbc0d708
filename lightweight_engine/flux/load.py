"""From a part of a file to a network, never holding two copies.

The module is built on the meta device; each parameter is read from the mapped file, brought into the storage format
that it is to be kept in, moved home, and assigned, several at a time; then any missing or unexpected key is an error.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from threading import BoundedSemaphore
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._device import DeviceContext

from ..backend import attention, eight_bit_attention
from ..backend.eight_bit import multiply_as_stored, takes
from ..backend.feature_maps import channels_last_is_faster
from ..backend.fp8 import as_rows
from ..backend.linear import cast_at_use, store
from ..backend.packed import GPU_PIECE, TEMPORARIES, Packed
from ..backend.pages import release_files, release_pages
from ..backend.quantize import ROWS, quantize, spec_for
from ..errors import CorruptCheckpointError, UnsupportedCheckpointError
from .autoencoder import Autoencoder
from .clip import CLIPText
from .keymaps import Part, Role, Source, read_params
from .params import PARAMS, Shapes
from .t5 import T5Encoder
from .transformer import Flux
from .units import UnitName, unit_of

NETWORKS: dict[Role, tuple[Any, Any]] = {
    "transformer": (PARAMS["transformer"], Flux),
    "t5": (PARAMS["t5"], T5Encoder),
    "clip": (PARAMS["clip"], CLIPText),
    "autoencoder": (PARAMS["autoencoder"], Autoencoder),
}

AS_IT_IS = "as it is"
"""How a parameter is kept that stays in the format of its file."""

PLAIN = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Storage formats that are dtypes; all others are packed."""

WORKERS = min(4, os.cpu_count() or 1)

CONVERTED = 2
"""Weights that are converted at a time on a device other than the CPU: plans count what lies there meanwhile."""

AHEAD = 64
"""Parameters that are made, or wait where they stay, behind one that takes long."""

Home = Callable[[str, Tensor | Packed], Tensor | Packed]
"""Where a parameter of that name is kept: gets it from wherever it was made, and returns it at home."""


Bring = Callable[[Tensor], Tensor]
"""Takes a tensor of the file to the device."""


@dataclass(frozen=True)
class Storage:
    """How the weights of a network are kept.

    Attributes:
        format: ``auto``: packed as the file has them, plain ones in ``compute``; ``file``: 16-bit ones as the file has
            them too, cast at each use; ``bf16``, ``fp16``, ``fp32``: all in that dtype; else a packed format
            (``nf4``, ``fp8_e4m3``, ``gguf:Q8_0`` …) for linears that are plain in the file; ``fp8_rows`` for those of
            blocks whatever they are in the file, which then multiply in it.
        compute: the dtype that the network computes in.
    """

    format: str
    compute: torch.dtype

    def of(self, role: Role, name: str) -> Storage:
        """How a parameter is kept."""
        return self.within(unit_of(role, name)) if self.format == ROWS else self

    def within(self, unit: UnitName) -> Storage:
        """How the parameters of a unit are kept: what products in 8 bits read is for blocks, whose inputs are wide."""
        return replace(self, format="auto") if self.format == ROWS and unit.kind != "block" else self

    def kept_as(self, source: Source, linear: bool) -> torch.dtype | str:
        """The dtype, or the packed format, that a parameter is kept in; ``AS_IT_IS`` for one that is packed already."""
        sixteen = _sixteen(source) if self.format == "file" and len(source.shape) == 2 else None
        if sixteen is not None:
            return sixteen
        if not linear:
            return self.compute
        if self.format in PLAIN:
            return PLAIN[self.format]
        if self.format == ROWS:
            return ROWS if takes(source.shape) else self.compute
        if source.format != "plain":
            return AS_IT_IS
        return self.format if self.format not in ("auto", "file") and _can_hold(self.format, source) else self.compute

    def as_in_file(self, source: Source, linear: bool) -> bool:
        """Whether a parameter stays a view of the mapped file."""
        kept = self.kept_as(source, linear)
        whole = len(source.pieces) == 1 and source.pieces[0][1] is None and not source.swapped
        return whole and (kept == AS_IT_IS or (source.format == "plain" and kept == _dtype_of(source)))

    def converting(self, source: Source, linear: bool) -> int:
        """Bytes of a GPU that a parameter takes beside its result while it is converted there; 0 where it is not."""
        kept, plain = self.kept_as(source, linear), source.format == "plain"
        if kept == AS_IT_IS:
            return 0
        mixed = len({stored.dtype for stored, _ in source.pieces}) > 1
        if plain and not mixed and kept == _dtype_of(source):
            return 0
        if kept == ROWS and source.format == "fp8_e4m3":  # what is brought is the result, but for scales
            return 0
        # What is packed is packed anew from its numbers, and several pieces may have to be joined as such.
        as_numbers = mixed or (not plain and (isinstance(kept, str) or len(source.pieces) > 1))
        numbers = source.elements * torch.float32.itemsize if as_numbers else 0
        return source.nbytes + numbers + min(source.elements, GPU_PIECE) * TEMPORARIES

    def nbytes(self, source: Source, linear: bool) -> int:
        """Bytes that a parameter takes once loaded."""
        kept = self.kept_as(source, linear)
        if kept == AS_IT_IS:
            return source.nbytes
        if isinstance(kept, str):
            return spec_for(kept, source.shape).nbytes  # type: ignore[arg-type]
        return source.elements * kept.itemsize


def stored_as(part: Part, storage: Storage) -> str:
    """The format that most of a part's weights are kept in, in the words of ``storage_dtype``."""
    if storage.format in (*PLAIN, ROWS) or (part.storage == "plain" and storage.format not in ("auto", "file")):
        return storage.format
    if part.storage != "plain":
        return part.storage
    words = {dtype: word for word, dtype in PLAIN.items()}
    sixteen = {"F16": "fp16", "BF16": "bf16"}.get(part.dtype) if storage.format == "file" else None
    return sixteen or words[storage.compute]


def _can_hold(format: str, source: Source) -> bool:
    """Whether a packed format takes rows of this width; the few linears of odd width stay as they are computed with."""
    try:
        return spec_for(format, source.shape).nbytes > 0  # type: ignore[arg-type]
    except ValueError:
        return False


def _dtype_of(source: Source) -> torch.dtype | None:
    """The dtype of a plain parameter in the file, where it is one to compute in."""
    return {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}.get(source.pieces[0][0].dtype)


def _sixteen(source: Source) -> torch.dtype | None:
    """The dtype of a parameter that the file has in 16 bits."""
    dtype = _dtype_of(source) if source.format == "plain" else None
    return dtype if dtype in (torch.float16, torch.bfloat16) else None


class _Uninitialised(DeviceContext):
    """Networks built inside are on the meta device and draw no weights: they get those of a file.

    Drawing on the meta device would import torch's compiler, which takes longer than all else that start-up does.
    """

    def __init__(self) -> None:
        super().__init__(torch.device("meta"))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return super().__torch_function__(func, types, args, kwargs)


def empty_network(part: Part) -> nn.Module:
    """The network of a part on the meta device, its keys and shapes checked against the file's.

    Raises:
        UnsupportedCheckpointError: keys or shapes that do not fit; the first ones are named.
    """
    params = read_params(part)
    with _Uninitialised():
        module = NETWORKS[part.role][1](params)
    expected = {key: tuple(tensor.shape) for key, tensor in named_tensors(module).items()}
    _check_keys(part.checkpoint.path.name, part.role, expected, part.shapes)
    return module


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What ``state_dict`` has, in its order, in half the time."""
    return {
        f"{path}.{leaf}" if path else leaf: tensor
        for path, each in module.named_modules()
        for holder in (each._parameters, each._buffers)
        for leaf, tensor in holder.items()
        if tensor is not None and leaf not in each._non_persistent_buffers_set
    }


def linear_weights(module: nn.Module) -> set[str]:
    """The parameters that can be packed: weights of linears."""
    return {f"{name}.weight" for name, each in module.named_modules() if type(each) is nn.Linear}


def load_part(
    part: Part,
    storage: Storage,
    *,
    device: torch.device,
    home: Home | None = None,
    bring: Bring | None = None,
    threads: int = WORKERS,
    module: nn.Module | None = None,
) -> nn.Module:
    """Build the network of a part and fill it.

    Args:
        device: where weights are converted and, without ``home``, kept.
        bring: takes what the file has to the device.
        threads: that read, convert (no more than ``CONVERTED`` at once, but on a CPU) and move; none, where the device
            has what it is told to copy.
        module: the part's ``empty_network``, where that has been built.

    Returns:
        The network in evaluation mode, without gradients. On the CPU, tensors that need no conversion are views of
        the mapped file.

    Raises:
        UnsupportedCheckpointError: keys or shapes that do not fit; the first ones are named.
        CorruptCheckpointError: a quantised weight that cannot be read, or numbers that cannot be quantised.
    """
    module = module or empty_network(part)
    linears = linear_weights(module)
    home = home or (lambda _, value: value.to(device))
    scales = _Scales(part)
    turn = nullcontext() if device.type == "cpu" else BoundedSemaphore(CONVERTED)

    def make(name: str) -> Tensor | Packed:
        source, within, linear = part.sources[name], storage.of(part.role, name), name in linears
        kept = within.kept_as(source, linear)
        if kept == AS_IT_IS and device.type != "cpu":
            value = home(name, source.read(look=False))
            scales.add(name, value)
            return value
        with turn if within.converting(source, linear) else nullcontext():
            value = _kernel_order(home(name, read_as(part, name, kept, device, bring)))
        if device.type == "cpu" and not any(map(part.checkpoint.holds, _parts_of(value))):
            give_back(source)
        return value

    modules = dict(module.named_modules())
    for name, value in several(make, list(named_tensors(module)), threads=threads, ahead=AHEAD):
        store(module, name, value, modules)
    scales.check()
    if device.type != "cpu":
        release_files(part.checkpoint)
    cast_at_use(module, storage.compute)
    rows = storage.format == ROWS
    if rows:
        multiply_as_stored(module)
    (eight_bit_attention if rows else attention).available(device)  # no picture waits for a compiler
    return module.eval()


class _Scales:
    """Those of weights that stay packed, looked at once for all where they went: each look waits for the device."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._found: list[tuple[str, Tensor]] = []

    def add(self, name: str, value: Tensor | Packed) -> None:
        """Those of a parameter: in all formats, scales and code books are what is in float32."""
        tensors = value.parts.values() if isinstance(value, Packed) else ()
        self._found += [(name, tensor) for tensor in tensors if tensor.dtype == torch.float32]

    def check(self) -> None:
        """Refuse those that are not finite, as the file's reader does.

        Raises:
            CorruptCheckpointError: names the weight.
        """
        if not self._found:
            return
        device = self._found[0][1].device
        largest = torch._foreach_norm([tensor for _, tensor in self._found], float("inf"))  # type: ignore[reportPrivateImportUsage]
        numbers = torch.stack([each.to(device) for each in largest]).tolist()
        for (name, _), number in zip(self._found, numbers, strict=True):
            if not math.isfinite(number):
                self._part.sources[name].read()
                raise CorruptCheckpointError(f"{self._part.checkpoint.path.name}: {name} changed while it was read")


def _parts_of(value: Tensor | Packed) -> tuple[Tensor, ...]:
    return tuple(value.parts.values()) if isinstance(value, Packed) else (value,)


def read_as(
    part: Part, name: str, kept: torch.dtype | str, device: torch.device, bring: Bring | None = None
) -> Tensor | Packed:
    """One parameter in the dtype or packed format ``kept``, on the CPU where it is the file's own, else on ``device``.

    Args:
        bring: takes it there, its pages being given back by whoever says so.

    Raises:
        CorruptCheckpointError: a quantised weight that cannot be read, or numbers that cannot be quantised.
    """
    value = part.sources[name].read()
    if kept == AS_IT_IS or (isinstance(value, Tensor) and value.dtype == kept):
        return value
    there = moved(value, bring or (lambda tensor: tensor.to(device)))
    try:
        if isinstance(kept, str):
            made = _packed(there, kept)
        else:
            made = there.dequantize(kept) if isinstance(there, Packed) else there.to(kept)
    except ValueError as error:
        raise CorruptCheckpointError(f"{part.checkpoint.path.name}: {name}: {error}; download it again") from None
    if bring is None:
        give_back(part.sources[name])
    return made


def moved(value: Tensor | Packed, bring: Bring) -> Tensor | Packed:
    """A parameter with each of its tensors where ``bring`` takes it."""
    if isinstance(value, Packed):
        return Packed(value.spec, {leaf: bring(tensor) for leaf, tensor in value.parts.items()})
    return bring(value)


def _packed(value: Tensor | Packed, kept: str) -> Packed:
    """A weight in a packed format; what is in 8 bits already gets no more than scales of its rows."""
    if isinstance(value, Packed) and kept == ROWS and (found := as_rows(value)) is not None:
        return found
    return quantize(value.dequantize() if isinstance(value, Packed) else value, kept)


def _kernel_order(value: Tensor | Packed) -> Tensor | Packed:
    """Weights of convolutions with their channels last where that is faster, which gives the maps that order too."""
    if isinstance(value, Packed) or value.dim() != 4 or not channels_last_is_faster(value.device):
        return value
    return value.contiguous(memory_format=torch.channels_last)


def give_back(source: Source) -> None:
    """Give back the pages of the file that a parameter was read from; they are read again when they are used."""
    for stored, _ in source.pieces:
        for key in stored.keys:
            release_pages(stored.checkpoint, stored.checkpoint.raw(key))


def several(
    make: Callable[[str], Any], names: list[str], *, threads: int = WORKERS, ahead: int = WORKERS
) -> Iterator[tuple[str, Any]]:
    """(name, what ``make`` returns) in order, some made ahead in threads, so that reading and converting overlap.

    Args:
        ahead: how many are made or wait behind one that takes long.
    """
    if not threads:
        yield from ((name, make(name)) for name in names)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting = iter(names)
        running = deque((name, pool.submit(make, name)) for name in islice(waiting, ahead))
        try:
            while running:
                name, future = running.popleft()
                value = future.result()
                running.extend((later, pool.submit(make, later)) for later in islice(waiting, 1))
                yield name, value
        finally:
            for _, future in running:
                future.cancel()


def _check_keys(name: str, role: Role, expected: Shapes, found: Shapes) -> None:
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    clashing = [
        f"{key} is {list(found[key])}, {list(expected[key])} expected"
        for key in expected
        if key in found and found[key] != expected[key]
    ]
    problems = [
        f"{len(rows)} {what} ({', '.join(rows[:3])}{', …' if len(rows) > 3 else ''})"
        for rows, what in ((missing, "missing"), (unexpected, "unexpected"), (clashing, "of another shape"))
        if rows
    ]
    if problems:
        raise UnsupportedCheckpointError(
            f"{name}: its {role} does not fit Flux.1: {'; '.join(problems)}; use a Flux.1 file"
        )
