"""Upscaling networks: spandrel knows their architectures by the keys of their files, which our own readers open.

Nothing in a file runs: pickles are read without ``pickle``, and a network may take no more memory than its file
warrants. Colours go in as BGR whatever the network was trained on, as the reference has it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..backend import kernels
from ..backend.checkpoint import Checkpoint
from ..backend.model_files import open_model
from ..backend.pace import mark
from ..errors import MissingDependencyError, UnsupportedCheckpointError
from . import tiles
from .dense import dense_network
from .files import Tiling
from .upscaler import repeated, size_of
from .visits import Visitor

log = logging.getLogger(__name__)

MAX_TENSORS = 10_000  # the largest published ones have 3,000
_SPARE = 64 << 20  # elements that building a network may take beside its parameters
_OUTER = ("module.", "netG.")
_OF_CONVOLUTIONS = ("ESRGAN", "Compact")  # architectures that do not mind the order of their maps
_PURPOSES = ("SR", "Restoration")
_OTHERS = {"FaceSR": "faces alone", "Inpainting": "inpainting"}

T = TypeVar("T")

AfterTile = Callable[[int, int], None]
"""Told of (finished tiles, all tiles); may raise to stop."""


class NetworkUpscaler:
    """An upscaler with a network.

    Args:
        descriptor: a network as spandrel hands it out.
        room: bytes that tiles may take at once on a GPU; more are done together, which changes no result.
        pinned: page-locked memory may hold the network.
        after_tile: told of every batch of tiles.
    """

    def __init__(
        self,
        name: str,
        descriptor: Any,
        tiling: Tiling | None = None,
        device: torch.device | str = "cpu",
        *,
        room: int = 0,
        pinned: bool = True,
        after_tile: AfterTile = lambda done, total: None,
    ) -> None:
        self.name = name
        self.scale: int = descriptor.scale
        self.tiling = tiling or Tiling()
        self.device = torch.device(device)
        self.room = room
        self.after_tile = after_tile
        on_gpu = self.device.type == "cuda"
        half = self.tiling.half and on_gpu and descriptor.supports_half
        self._network = descriptor.to(torch.float16 if half else torch.float32).eval()
        self._order = torch.contiguous_format
        if on_gpu and descriptor.architecture.id in _OF_CONVOLUTIONS:
            self._order = torch.channels_last  # the one that tensor cores read
            self._network.model.to(memory_format=self._order)
        is_dense = descriptor.architecture.id == "ESRGAN" and convolves_in_tf32(self.device) and kernels.available()
        self._dense = dense_network(self._network.model) if is_dense else None
        self._pinned = pinned
        self._visitors: dict[nn.Module, Visitor] = {}
        self._visitor(self._dense or self._network.model)
        self._warned = False

    @property
    def nbytes(self) -> int:
        """Bytes of the network, in all forms that are kept."""
        forms: tuple[nn.Module | None, ...] = (self._network.model, self._dense)
        return sum(t.nbytes for form in forms if form for t in (*form.parameters(), *form.buffers()))

    def upscale(self, levels: Tensor, by: float) -> Tensor:
        """Levels ``[3, H, W]`` at ``by`` times their size, cut to multiples of 8 pixels.

        The network waits on the host: what other stages of a job may take of the device is planned without it.
        """
        with self._visitor(self._dense or self._network.model).there():
            return repeated(self.once, levels.to(self.device), by).to(levels.device)

    @torch.inference_mode()
    def once(self, levels: Tensor) -> Tensor:
        """One pass of the network: levels ``[3, H, W]``, where the network is, to ``[3, scale H, scale W]``."""
        return self._blended(levels) if self.tiling.blended else self._averaged(levels)

    def _blended(self, levels: Tensor) -> Tensor:
        if not self.tiling.tile:
            return self._bytes(self.run(unit(levels[None], self._network.dtype)))[0]
        grid = tiles.split(size_of(levels), self.tiling.tile, self.tiling.overlap)
        return tiles.combine(self._enlarged(tiles.cut(levels, grid)), grid, self.scale)

    def _enlarged(self, cut: list[Tensor]) -> Iterator[Tensor]:
        step = self._together(cut[0])
        begun = (self._begun(torch.stack(cut[first : first + step])) for first in range(0, len(cut), step))
        done = 0
        for made in _one_behind(begun) if self.device.type == "cuda" else begun:
            levels = made()
            done += len(levels)
            self.after_tile(done, len(cut))
            yield from levels

    def _begun(self, cut: Tensor) -> Callable[[], Tensor]:
        """The network at work on tiles ``[B, 3, t, t]``: a GPU has the next ones before the host looks at these."""
        pictures = unit(cut, self._network.dtype)
        made, fits = self._attempt(pictures)
        levels = self._bytes(made)
        told = _told(fits) if fits is not None else lambda: True
        return lambda: levels if told() else self._bytes(self._again(pictures))

    def _together(self, tile: Tensor) -> int:
        """How many tiles fit the room."""
        if self.device.type != "cuda":
            return 1
        return max(self.room // tile_bytes(tile.shape[1], self.scale), 1)

    def _averaged(self, levels: Tensor) -> Tensor:
        """The mean of tiles, each as large as the others, none reaching over the border."""
        scale, overlap = self.scale, self.tiling.overlap
        picture = unit(levels[None], self._network.dtype)
        tile = min(self.tiling.tile, *picture.shape[2:])
        rows, columns = (_even_starts(side, tile, overlap) for side in picture.shape[2:])
        total = picture.new_zeros(1, len(levels), picture.shape[2] * scale, picture.shape[3] * scale)
        weights = torch.zeros_like(total)
        for count, (top, left) in enumerate([(top, left) for top in rows for left in columns], 1):
            made = self.run(picture[..., top : top + tile, left : left + tile])
            place = (..., slice(top * scale, (top + tile) * scale), slice(left * scale, (left + tile) * scale))
            total[place] += made
            weights[place] += 1
            self.after_tile(count, len(rows) * len(columns))
        return self._bytes(total / weights)[0]

    def run(self, pictures: Tensor) -> Tensor:
        """The network on RGB pictures ``[B, 3, H, W]`` in 0..1."""
        made, fits = self._attempt(pictures)
        return made if fits is None or bool(fits) else self._again(pictures)

    def _attempt(self, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        """By the dense network where it takes that size, and whether all numbers fitted into it; else by the other."""
        if self._dense is None or not self._network.size_requirements.check(pictures.shape[3], pictures.shape[2]):
            return self._plainly(pictures), None
        made = self._dense(self._as_given(pictures))
        fits = made.isfinite().all()
        return made.clamp_(0, 1).flip(1), fits

    def _again(self, pictures: Tensor) -> Tensor:
        self._warn()
        return self._plainly(pictures)

    def _plainly(self, pictures: Tensor) -> Tensor:
        """By the network as spandrel has it."""
        if self._dense is None:
            return self._network(self._as_given(pictures)).flip(1)
        with self._visitor(self._network.model).there():
            return self._network(self._as_given(pictures)).flip(1)

    def _as_given(self, pictures: Tensor) -> Tensor:
        """As the network reads them: BGR."""
        return pictures.flip(1).contiguous(memory_format=self._order)

    def _visitor(self, form: nn.Module) -> Visitor:
        """A form of the network as it travels. Most never need the other, for what the dense one cannot do."""
        if form not in self._visitors:
            self._visitors[form] = Visitor(form, self.device, pinned=self._pinned)
        return self._visitors[form]

    def _warn(self) -> None:
        if not self._warned:
            log.warning("%s has numbers beyond half precision: it computes in float32, which takes longer", self.name)
        self._warned = True

    @staticmethod
    def _bytes(pictures: Tensor) -> Tensor:
        """Pictures in 0..1 as bytes, rounded to the nearest."""
        return pictures.float().nan_to_num(nan=0.0).clamp(0, 1).mul(255).round().byte()


def convolves_in_tf32(device: torch.device) -> bool:
    """Whether torch's convolutions of float32 read TF32 there, as the reference has it: on NVIDIA's from Ampere on."""
    if device.type != "cuda" or torch.version.cuda is None or not torch.backends.cudnn.allow_tf32:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _one_behind(items: Iterable[T]) -> Iterator[T]:
    """Each item once the next one was taken."""
    items = iter(items)
    before = next(items)
    for item in items:
        yield before
        before = item
    yield before


def _told(fits: Tensor) -> Callable[[], bool]:
    """What a device found out, for those who ask later: they wait for that alone, and not for what was begun since."""
    if not fits.is_cuda:
        return lambda: bool(fits)
    answer = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(fits, non_blocking=True)
    done = mark(fits.device)

    def wait() -> bool:
        done.synchronize()  # type: ignore[union-attr]
        return bool(answer)

    return wait


def tile_bytes(tile: int, scale: int) -> int:
    """What a tile takes at most in a wide network: four feature maps in float32 at the enlarged size, or a dense block.

    A block is as large as twelve maps at the tile's size, in the form of ``dense`` half of that.
    """
    return 64 * 4 * tile**2 * max(4 * scale**2, 12)


def network_bytes(file: int) -> int:
    """What the network of a file of so many bytes takes at most: one of 16 bits, in float32 and dense form at once."""
    return 5 * file


def unit(levels: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as numbers in 0..1."""
    return (levels.double() / 255).to(dtype)


def _even_starts(side: int, tile: int, overlap: int) -> list[int]:
    return [*range(0, side - tile, max(tile - overlap, 1)), side - tile]


def open_network(path: Path) -> Any:
    """The network of a file, on the CPU, as spandrel describes it.

    Raises:
        ModelNotFoundError, CorruptCheckpointError, UnsupportedCheckpointError: as ``open_model`` has it, or no
            upscaler of pictures in colour that spandrel knows.
        MissingDependencyError: spandrel is not installed.
    """
    checkpoint = open_model(path)
    if len(checkpoint.tensors) > MAX_TENSORS:
        raise UnsupportedCheckpointError(
            f"{path.name} has {len(checkpoint.tensors):,} tensors, more than any upscaler; use another file"
        )
    spandrel = _spandrel()
    state = _state(checkpoint)
    with _Budget(path, 4 * sum(tensor.numel() for tensor in state.values()) + _SPARE):
        try:
            found = spandrel.ModelLoader().load_from_state_dict(state)
        except UnsupportedCheckpointError:
            raise
        except spandrel.UnsupportedModelError:
            raise _unknown(path, "its keys are of no architecture that spandrel knows") from None
        except Exception as error:  # noqa: BLE001 - a foreign file makes a builder raise nearly anything
            reason = " ".join(str(error).split())
            raise _unknown(path, f"it does not fit its architecture ({type(error).__name__}: {reason:.200})") from None
    fault = _fault(found)
    if fault:
        raise _unknown(path, fault)
    log.info("loaded %s from %s", found.architecture.name, path.name)
    return found


def _fault(found: Any) -> str | None:
    """Why a network is no upscaler of pictures in colour."""
    if found.purpose not in _PURPOSES:
        return f"it is a network for {_OTHERS.get(found.purpose, found.purpose)} ({found.architecture.name})"
    if (found.input_channels, found.output_channels) != (3, 3):
        return f"it maps {found.input_channels} channels to {found.output_channels}"
    return None


def _unknown(path: Path, fault: str) -> UnsupportedCheckpointError:
    return UnsupportedCheckpointError(f"{path.name} is not an upscaler that can be used: {fault}; use another file")


def is_imported() -> bool:
    """Whether spandrel is imported, or is being; it brings much of torch with it, and takes two seconds."""
    return "spandrel" in sys.modules


def _spandrel() -> Any:
    try:
        import spandrel
    except ImportError as error:
        raise MissingDependencyError(
            f"upscaling networks need spandrel ({error}): pip install 'lightweight-engine[upscale]'"
        ) from None
    return spandrel


def _state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors in memory of their own, without the prefix that training programs put before all of them."""
    names = list(checkpoint.tensors)
    prefix = next((p for p in _OUTER if all(name.startswith(p) for name in names)), "")
    return {name.removeprefix(prefix): checkpoint.tensor(name).clone() for name in names}


class _Budget(TorchDispatchMode):
    """While it is entered, tensors may be made up to a number of elements: sizes are taken from a foreign file."""

    _MAKERS = ("aten::empty", "aten::zeros", "aten::ones", "aten::full", "aten::rand", "aten::randn", "aten::arange")

    def __init__(self, path: Path, elements: int) -> None:
        super().__init__()
        self._path, self._left = path, elements

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in self._MAKERS and args and isinstance(args[0], (list, tuple)):
            count = 1
            for side in args[0]:
                count *= int(side)
            self._left -= count
            if self._left < 0:
                raise UnsupportedCheckpointError(
                    f"{self._path.name} describes a network far larger than the file; use another file"
                )
        return func(*args, **(kwargs or {}))
