"""Writing a safetensors file tensor by tensor: it appears whole under its name, or not at all."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..errors import OutputError
from .checkpoint import DTYPES

PAGE = 4096
"""The first tensor begins at a multiple of this, so that a block can be read past the page cache."""

DTYPE_NAMES = {getattr(torch, torch_name): name for name, (_, torch_name) in DTYPES.items()}


def header_of(layout: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """What stands before the numbers of a file.

    Args:
        layout: key to a tensor of the dtype and shape that it will have (on the meta device), in the order of the file.
    """
    rows: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for key, tensor in layout.items():
        start, end = end, end + tensor.nbytes
        rows[key] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(rows, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    return struct.pack("<Q", len(text)) + text


def write_safetensors(
    path: Path, layout: Mapping[str, Tensor], metadata: Mapping[str, str], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write a file.

    Args:
        layout: see ``header_of``.
        tensors: key and tensor, on any device, in the order of ``layout``; each is asked for when its turn has come.

    Raises:
        OutputError: the folder cannot be written to, or the disk has too little room; nothing is left behind.
        ValueError: tensors that are not those of the layout.
    """
    header = header_of(layout, metadata)
    with _whole_or_nothing(path, len(header) + sum(tensor.nbytes for tensor in layout.values())) as file:
        file.write(header)
        waiting = iter(layout.items())
        for key, tensor in tensors:
            expected, like = next(waiting, ("nothing more", None))
            if key != expected or like is None or (like.dtype, like.shape) != (tensor.dtype, tensor.shape):
                raise ValueError(f"{key} {tensor.dtype} {list(tensor.shape)} came where {expected} was expected")
            file.write(_bytes_of(tensor))
        missing = next(waiting, None)
        if missing is not None:
            raise ValueError(f"{missing[0]} did not come")


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


@contextmanager
def _whole_or_nothing(path: Path, size: int) -> Iterator[BinaryIO]:
    """A file beside ``path`` that takes its name once all of it is on the disk, and is removed at any error."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < size:
            raise OutputError(
                f"{path} needs {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free there; "
                "free some, or name another folder"
            )
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror}; name another folder, or free some space"
        ) from None
    finally:
        _remove(unfinished)


def _remove(path: Path) -> None:
    """Where the folder itself could not be made there is nothing to remove."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return
