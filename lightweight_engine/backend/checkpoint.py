"""Model files: a header read first and checked, tensors read lazily from the mapped file.

Opening a file loads no torch and touches no tensor, so that a folder can be listed in milliseconds. The checks on a
safetensors header are those of the format: sizes add up, ranges neither overlap nor leave holes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CorruptCheckpointError, ModelNotFoundError, UnsupportedCheckpointError

if TYPE_CHECKING:
    from torch import Tensor, UntypedStorage

MAX_HEADER = 100_000_000
MAX_TENSORS = 100_000
MAX_NAME = 1024

# safetensors name -> (bytes per element, attribute of torch)
DTYPES: dict[str, tuple[int, str]] = {
    "BOOL": (1, "bool"),
    "U8": (1, "uint8"),
    "I8": (1, "int8"),
    "I16": (2, "int16"),
    "U16": (2, "uint16"),
    "I32": (4, "int32"),
    "U32": (4, "uint32"),
    "I64": (8, "int64"),
    "U64": (8, "uint64"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "F32": (4, "float32"),
    "F64": (8, "float64"),
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: dtype in safetensors' spelling, shape, and its bytes from ``start`` to ``end``.

    A GGUF block type has the dtype ``gguf:TYPE``; its shape is that of the numbers. ``file`` counts into
    ``Checkpoint.files``, for models that lie in several.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    file: int = 0

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An open model: one file, or several that belong together.

    ``tensor`` gives views of the mapped files: nothing is read before it is used.

    Attributes:
        path: what was opened, a file or a folder.
        files: the files that the tensors lie in; left out, ``path`` alone.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)
    files: tuple[Path, ...] = ()

    def file_of(self, name: str) -> Path:
        """The file that the tensor ``name`` lies in."""
        return self.files[self.tensors[name].file] if self.files else self.path

    @cached_property
    def _storages(self) -> dict[Path, UntypedStorage]:
        return {}

    def _storage(self, path: Path) -> UntypedStorage:
        import torch

        if path not in self._storages:
            size = os.path.getsize(path)
            self._storages[path] = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)  # type: ignore[assignment]
        return self._storages[path]

    def tensor(self, name: str) -> Tensor:
        """The tensor ``name`` on the CPU, a private view of the mapped file.

        The blocks of a GGUF type come as they are: uint8 ``[..., bytes of a row]``.

        Raises:
            KeyError: the file has no such tensor.
        """
        import torch

        info = self.tensors[name]
        blocks = info.dtype.startswith("gguf:")
        size, torch_name = (1, "uint8") if blocks else DTYPES[info.dtype]
        shape = (*info.shape[:-1], -1) if blocks else info.shape
        raw = torch.empty(0, dtype=torch.uint8).set_(self._storage(self.file_of(name)), info.start, (info.nbytes,), (1,))
        if info.start % size:
            raw = raw.clone()  # a view must start at a multiple of its element size
        return raw.view(getattr(torch, torch_name)).view(shape)

    def read_bytes(self, name: str, limit: int) -> bytes:
        """The bytes of a small tensor (text, a scale), without torch and without mapping the file.

        Raises:
            CorruptCheckpointError: it has more than ``limit`` bytes.
        """
        info = self.tensors[name]
        if info.nbytes > limit:
            raise CorruptCheckpointError(
                f"{self.path.name}: {name!r} has {info.nbytes:,} bytes where at most {limit:,} make sense; "
                "download it again"
            )
        with self.file_of(name).open("rb") as file:
            file.seek(info.start)
            return file.read(info.nbytes)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.tensors.items()}


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read and check the header of a safetensors file.

    Raises:
        ModelNotFoundError: no such file, a folder, or no permission to read it.
        CorruptCheckpointError: empty, truncated, a web page, a Git LFS pointer, or a header that does not add up.
        UnsupportedCheckpointError: another model format.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise ModelNotFoundError(f"{path} is a folder; name a .safetensors file in it")
        with path.open("rb") as file:
            start = file.read(512)
            _refuse_foreign(path, start, size)
            header_size = struct.unpack("<Q", start[:8])[0]
            if not 2 <= header_size <= MAX_HEADER:
                raise CorruptCheckpointError(f"{path.name} is not a safetensors file; download it again")
            if header_size + 8 > size:
                raise _incomplete(path, header_size + 8, size)
            file.seek(8)
            header = file.read(header_size)
    except FileNotFoundError:
        raise ModelNotFoundError(f"{path} does not exist; check the name") from None
    except PermissionError:
        raise ModelNotFoundError(f"{path} may not be read by this user; change its permissions") from None
    tensors, metadata = _parse_header(path, header, 8 + header_size, size)
    return Checkpoint(path, tensors, metadata)


def _incomplete(path: Path, expected: int, size: int) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"{path.name} is incomplete: {expected:,} bytes expected from its header, {size:,} on disk; download it again"
    )


def _refuse_foreign(path: Path, start: bytes, size: int) -> None:
    """Name what is plainly not a safetensors file."""
    text = start.lstrip().lower()
    if size == 0:
        raise CorruptCheckpointError(f"{path.name} is empty; download it again")
    if text.startswith(b"version https://git-lfs"):
        raise CorruptCheckpointError(
            f"{path.name} is not a model: it is a Git LFS pointer ({size} bytes); fetch the file itself"
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml")) or (size < MAX_HEADER and text.startswith(b"{")):
        raise CorruptCheckpointError(
            f"{path.name} is not a model: it is a web page or an error message; download it again"
        )
    if start.startswith(b"GGUF"):
        raise UnsupportedCheckpointError(
            f"{path.name} is a GGUF file, which this version does not read; use the bf16 safetensors file"
        )
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04")):
        raise UnsupportedCheckpointError(
            f"{path.name} is a pickle (.pt, .ckpt, .bin), which can run code when opened; "
            "use the safetensors file of the model"
        )
    if size < 10:
        raise CorruptCheckpointError(f"{path.name} has {size} bytes and is not a model; download it again")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result


def _parse_header(
    path: Path, header: bytes, data_start: int, size: int
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    try:
        rows = json.loads(header.decode("utf-8"), object_pairs_hook=_unique)
        if not isinstance(rows, dict):
            raise ValueError("it is not an object")
        metadata = rows.pop("__metadata__", None) or {}
        if len(rows) > MAX_TENSORS:
            raise ValueError(f"{len(rows)} tensors")
        tensors = {name: _tensor_info(name, row, data_start) for name, row in rows.items()}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptCheckpointError(f"{path.name}: its header is damaged ({error}); download it again") from None
    end = data_start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != end:
            raise CorruptCheckpointError(
                f"{path.name}: the bytes of {name!r} overlap others or leave a hole; download it again"
            )
        end = info.end
    if end > size:
        raise _incomplete(path, end, size)
    if end < size:
        raise CorruptCheckpointError(f"{path.name} has {size - end:,} bytes after its last tensor; download it again")
    return tensors, {str(key): str(value) for key, value in metadata.items()}


def _tensor_info(name: str, row: Any, data_start: int) -> TensorInfo:
    if len(name) > MAX_NAME:
        raise ValueError("a name is longer than 1024 characters")
    dtype, shape, (start, end) = row["dtype"], tuple(row["shape"]), row["data_offsets"]
    if dtype not in DTYPES:
        raise ValueError(f"{name!r} has the unknown dtype {dtype!r}")
    whole = (*shape, start, end)
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in whole):
        raise ValueError(f"{name!r} has a size that is not a whole number")
    if math.prod(shape) * DTYPES[dtype][0] != end - start:
        raise ValueError(
            f"{name!r} has {end - start} bytes, its shape {list(shape)} needs {math.prod(shape) * DTYPES[dtype][0]}"
        )
    return TensorInfo(dtype, shape, data_start + start, data_start + end)
