"""An open model file: names, dtypes, shapes and places of its tensors, which are read lazily from the mapped file.

Opening a file loads no torch and touches no tensor, so that a folder can be listed in milliseconds. Safetensors files
are read here; ``model_files.open_model`` tells all containers apart.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import CorruptCheckpointError, UnsupportedCheckpointError
from .kept_files import FileVersion

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
    "F8_E8M0": (1, "float8_e8m0fnu"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "F32": (4, "float32"),
    "F64": (8, "float64"),
}

# Types of the format that no Flux.1 file which is read here has.
UNREAD_DTYPES = ("F4", "F6_E2M3", "F6_E3M2", "C64")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: dtype in safetensors' spelling, shape, and its bytes from ``start`` to ``end``.

    A GGUF block type has the dtype ``gguf:TYPE``; its shape is that of the numbers. ``file`` counts into
    ``Checkpoint.files``, for models that lie in several. ``strides`` are given, in elements, where the numbers do not
    lie in the order of the shape (pickles).
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    file: int = 0
    strides: tuple[int, ...] | None = None

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
        container: ``safetensors``, ``gguf``, ``pickle`` or ``folder``.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    container: str = "safetensors"

    def file_of(self, name: str) -> Path:
        """The file that the tensor ``name`` lies in."""
        return self.files[self.tensors[name].file] if self.files else self.path

    @cached_property
    def _storages(self) -> dict[Path, tuple[UntypedStorage, int, FileVersion]]:
        """The files that are mapped by now, with address and version."""
        return {}

    @cached_property
    def _asked(self) -> dict[Path, FileVersion]:
        """What files were that are not mapped, as far as somebody has asked."""
        return {}

    def version_of(self, path: Path) -> FileVersion:
        """What one of the files was when it was mapped; before it is, what it was when this was first asked.

        Raises:
            OSError: it is not there any more.
        """
        if path in self._storages:
            return self._storages[path][2]
        if path not in self._asked:
            self._asked[path] = FileVersion.of(path)
        return self._asked[path]

    def _storage(self, path: Path) -> UntypedStorage:
        import torch

        if path not in self._storages:
            version = FileVersion.of(path)
            mapped: Any = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=version.size)
            if FileVersion.of(path) != version:
                told = "it is changed or replaced at this moment; wait until it is there whole, and ask again"
                raise CorruptCheckpointError(f"{path.name}: {told}")
            self._storages.setdefault(path, (mapped, mapped.data_ptr(), version))
        return self._storages[path][0]

    def tensor(self, name: str) -> Tensor:
        """The tensor ``name`` on the CPU, a private view of the mapped file; a copy where its strides are not plain.

        The blocks of a GGUF type come as they are: uint8 ``[..., bytes of a row]``.

        Raises:
            KeyError: the file has no such tensor.
        """
        import torch

        info = self.tensors[name]
        if info.dtype.startswith("gguf:"):
            return self.raw(name).view(*info.shape[:-1], -1)
        size, torch_name = DTYPES[info.dtype]
        dtype = getattr(torch, torch_name)
        if info.strides is None and not info.start % size:
            made: Any = torch.empty(0, dtype=dtype)
            return made.set_(self._storage(self.file_of(name)), info.start // size, info.shape)
        raw = self.raw(name)
        if info.start % size:
            raw = raw.clone()  # a view must start at a multiple of its element size
        numbers = raw.view(dtype)
        if info.strides is None:
            return numbers.view(info.shape)
        return numbers.as_strided(info.shape, info.strides).contiguous()

    def raw(self, name: str) -> Tensor:
        """The bytes of the tensor ``name`` as they lie in the mapped file, a view."""
        import torch

        info = self.tensors[name]
        storage = self._storage(self.file_of(name))
        return torch.empty(0, dtype=torch.uint8).set_(storage, info.start, (info.nbytes,), (1,))

    @property
    def all_files(self) -> tuple[Path, ...]:
        """The files that the tensors lie in."""
        return self.files or (self.path,)

    @property
    def mapped(self) -> list[tuple[Path, int, int]]:
        """The files that are mapped by now, with address and size."""
        return [(path, address, version.size) for path, (_, address, version) in list(self._storages.items())]

    def place_of(self, tensor: Tensor) -> tuple[Path, int] | None:
        """File and first byte of a tensor that is a view of the mapped files; None for any other."""
        address, nbytes = tensor.data_ptr(), tensor.nbytes
        for path, start, size in self.mapped:
            if start <= address and address + nbytes <= start + size:
                return path, address - start
        return None

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is a view of the mapped files, whose pages can be read again at any time."""
        return self.place_of(tensor) is not None

    def read_bytes(self, name: str, limit: int) -> bytes:
        """The bytes of a small tensor (text, a scale), without torch and without mapping the file.

        Raises:
            CorruptCheckpointError: it has more than ``limit`` bytes.
        """
        return next(content for _, content in self.read_several([name], limit))

    def read_several(self, names: Iterable[str], limit: int) -> Iterator[tuple[str, bytes]]:
        """The same of each of these names, each file opened once.

        Raises:
            CorruptCheckpointError: one has more than ``limit`` bytes.
        """
        with ExitStack() as opened:
            files: dict[Path, BinaryIO] = {}
            for name in names:
                info, path = self.tensors[name], self.file_of(name)
                if info.nbytes > limit:
                    raise CorruptCheckpointError(
                        f"{self.path.name}: {name!r} has {info.nbytes:,} bytes where at most {limit:,} make sense; "
                        "download it again"
                    )
                if path not in files:
                    files[path] = opened.enter_context(path.open("rb", buffering=0))
                files[path].seek(info.start)
                yield name, files[path].read(info.nbytes)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.tensors.items()}


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def corrupt(path: Path, fault: str) -> CorruptCheckpointError:
    """The error for a file with ``fault``, which nothing but another copy of it mends."""
    return CorruptCheckpointError(f"{path.name}: {fault}; download it again")


def incomplete(path: Path, expected: int, size: int) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"{path.name} is incomplete: {expected:,} bytes expected from its header, {size:,} on disk; download it again"
    )


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read and check the header of a safetensors file: sizes add up, ranges neither overlap nor leave holes.

    Raises:
        CorruptCheckpointError: truncated, or a header that does not add up.
        UnsupportedCheckpointError: a tensor of a type that is not read.
        OSError: there is no such file, or it may not be read.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(10)
        if len(start) < 10:
            raise corrupt(path, f"it has {size} bytes and is no model")
        header_size = struct.unpack("<Q", start[:8])[0]
        # A header that claims much is read only if it begins as the format has it: an object with a name, or none.
        if not 2 <= header_size <= MAX_HEADER or start[8:9] != b"{" or start[9] not in b'"} \n':
            raise corrupt(path, "it is not a safetensors file, and no other model file that is known")
        if header_size + 8 > size:
            raise incomplete(path, header_size + 8, size)
        header = start[8:] + file.read(header_size - 2)
    tensors, metadata = _parse_header(path, header, 8 + header_size, size)
    return Checkpoint(path, tensors, metadata)


def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """``object_pairs_hook`` for ``json``: a repeated name is an error."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result


def _parse_header(
    path: Path, header: bytes, data_start: int, size: int
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    try:
        rows = json.loads(header.decode("utf-8"), object_pairs_hook=unique)
        metadata = rows.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict):
            raise ValueError("its metadata is not an object")
        if len(rows) > MAX_TENSORS:
            raise ValueError(f"{len(rows):,} tensors")
        tensors = {name: _tensor_info(name, row, data_start) for name, row in rows.items()}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise corrupt(path, f"its header is damaged ({error})") from None
    except UnsupportedCheckpointError as error:
        raise UnsupportedCheckpointError(f"{path.name}: {error}") from None
    _check_ranges(path, tensors, data_start, size)
    return tensors, {str(key): str(value) for key, value in metadata.items()}


def _check_ranges(path: Path, tensors: Mapping[str, TensorInfo], data_start: int, size: int) -> None:
    end = data_start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != end:
            raise corrupt(path, f"the bytes of {name!r} overlap others or leave a hole")
        end = info.end
    if end > size:
        raise incomplete(path, end, size)
    if end < size:
        raise corrupt(path, f"there are {size - end:,} bytes after its last tensor")


def _tensor_info(name: str, row: Any, data_start: int) -> TensorInfo:
    if len(name) > MAX_NAME:
        raise ValueError(f"a name is longer than {MAX_NAME} characters")
    dtype, shape, (start, end) = row["dtype"], tuple(row["shape"]), row["data_offsets"]
    if dtype in UNREAD_DTYPES:
        raise UnsupportedCheckpointError(
            f"this file stores {name!r} as {dtype}; not supported: use the bf16, fp8, nf4 or GGUF file of the model"
        )
    if dtype not in DTYPES:
        raise ValueError(f"{name!r} has the unknown dtype {dtype!r}")
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in (*shape, start, end)):
        raise ValueError(f"{name!r} has a size that is not a whole number")
    needed = math.prod(shape) * DTYPES[dtype][0]
    if needed != end - start:
        raise ValueError(f"{name!r} has {end - start} bytes, its shape {list(shape)} needs {needed}")
    return TensorInfo(dtype, shape, data_start + start, data_start + end)
