"""Quantised matrices in files, as the reader finds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from lightweight_engine.backend.checkpoint import open_checkpoint
from lightweight_engine.backend.stored import Stored


def stored(
    folder: Path, format: str, shape: tuple[int, ...], weight: Tensor, roles: dict[str, Tensor], **details: Any
) -> Stored:
    """A file with one matrix and its satellites, opened."""
    keys = {role: f"layer.weight.{role}" for role in roles}
    tensors = {"layer.weight": weight, **{keys[role]: tensor for role, tensor in roles.items()}}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "x.safetensors")
    return Stored(open_checkpoint(folder / "x.safetensors"), "layer.weight", format, shape, keys, details)
