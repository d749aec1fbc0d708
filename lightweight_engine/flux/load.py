"""From a part of a file to a network on a device, never holding two copies.

The module is built on the meta device, each tensor is read from the mapped file, converted, and assigned; then any
missing or unexpected key is an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..backend.linear import keep_storage
from ..errors import CorruptCheckpointError, UnsupportedCheckpointError
from .autoencoder import Autoencoder
from .clip import CLIPText
from .keymaps import Part, Role
from .params import AutoencoderParams, CLIPParams, FluxParams, Shapes, T5Params
from .t5 import T5Encoder
from .transformer import Flux

NETWORKS: dict[Role, tuple[Any, Any]] = {
    "transformer": (FluxParams, Flux),
    "t5": (T5Params, T5Encoder),
    "clip": (CLIPParams, CLIPText),
    "autoencoder": (AutoencoderParams, Autoencoder),
}


class _Uninitialised(TorchFunctionMode):
    """Networks built inside draw no weights: they get those of a file.

    Drawing on the meta device would import torch's compiler, which takes longer than all else that start-up does.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def read_params(part: Part) -> Any:
    """The sizes of a part, from its shapes and hints."""
    try:
        return NETWORKS[part.role][0].from_shapes(part.shapes, part.hints)
    except UnsupportedCheckpointError as error:
        raise UnsupportedCheckpointError(f"{part.checkpoint.path.name}: {error}") from None
    except (ValueError, ZeroDivisionError, TypeError) as error:
        raise CorruptCheckpointError(
            f"{part.checkpoint.path.name}: its {part.role} has impossible sizes ({error}); download it again"
        ) from None


def load_part(
    part: Part,
    *,
    device: torch.device,
    dtype: torch.dtype,
    keep_file_dtype: bool = False,
) -> nn.Module:
    """Build the network of a part and fill it.

    Args:
        dtype: that the network computes in.
        keep_file_dtype: matrices stay as they are in the file and are cast at each use; less memory, some time.

    Returns:
        The network in evaluation mode, without gradients. On the CPU, tensors that need no conversion are views of
        the mapped file.

    Raises:
        UnsupportedCheckpointError: quantised, or keys or shapes that do not fit; the first ones are named.
    """
    name = part.checkpoint.path.name
    if part.storage != "plain":
        raise UnsupportedCheckpointError(
            f"{name} stores its weights as {part.storage}; this version reads 16- and 32-bit files: "
            "use the bf16 file of the model"
        )
    params = read_params(part)
    with torch.device("meta"), _Uninitialised():
        module = NETWORKS[part.role][1](params)
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    _check_keys(name, part.role, expected, part.shapes)
    for key in expected:
        matrix = len(expected[key]) == 2
        tensor = part.sources[key].read()
        kept = keep_file_dtype and matrix and tensor.dtype in (torch.float16, torch.bfloat16)
        _assign(module, key, tensor.to(device=device, dtype=tensor.dtype if kept else dtype))
    keep_storage(module, dtype)
    return module.requires_grad_(False).eval()


def _assign(module: nn.Module, key: str, tensor: torch.Tensor) -> None:
    path, _, leaf = key.rpartition(".")
    setattr(module.get_submodule(path), leaf, nn.Parameter(tensor, requires_grad=False))


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
