"""The header of a GGUF file: metadata, and types, shapes and places of its tensors.

How blocks become numbers is in ``gguf``. Loads no torch.

Source: the format's description and the reader of the MIT-licensed gguf package.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..errors import UnsupportedCheckpointError
from .block_types import BLOCK_TYPES
from .checkpoint import MAX_NAME, MAX_TENSORS, Checkpoint, TensorInfo, corrupt, incomplete

MAGIC = b"GGUF"
MAX_PAIRS = 100_000
MAX_STRING = 1 << 20
MAX_TEXTS = 1_000_000  # texts in the lists of a file: vocabulary and merges of a tokenizer are under 600,000
MAX_KEPT = 1 << 20  # bytes of metadata kept in all
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 16

# Code of a plain type -> safetensors' name and bytes of an element.
PLAIN: dict[int, tuple[str, int]] = {
    0: ("F32", 4),
    1: ("F16", 2),
    24: ("I8", 1),
    25: ("I16", 2),
    26: ("I32", 4),
    27: ("I64", 8),
    28: ("F64", 8),
    30: ("BF16", 2),
}

# Code of a block type -> its name.
BLOCKS = {kind.number: name for name, kind in BLOCK_TYPES.items()}

# Types that are named in the refusal and not read.
UNREAD: dict[int, str] = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
}

# Code of a metadata value's type -> how struct reads it.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9

ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
NEEDED = ("general.architecture", "general.alignment", "split.count")


class _Reader:
    """Numbers and strings of a header, each checked against what is left of the file before it is read."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path = path
        self.file = file
        self.left = size
        self.texts = MAX_TEXTS

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise corrupt(self.path, "it is incomplete: it ends inside its header")
        self.left -= count
        return self.file.read(count)

    def number(self, code: str) -> int | float | bool:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def count(self, what: str, most: int) -> int:
        """A count of 8 bytes that may be ``most``."""
        value = struct.unpack("<Q", self.take(8))[0]
        if value > most:
            raise corrupt(self.path, f"its header claims {value:,} {what} where at most {most:,} make sense")
        return value

    def string(self, most: int = MAX_STRING) -> str:
        return self.take(self.count("characters in a text", most)).decode("utf-8", "replace")

    def skip(self, count: int) -> None:
        if count > self.left:
            raise corrupt(self.path, "it is incomplete: it ends inside its header")
        self.left -= count
        self.file.seek(count, 1)


@dataclass(frozen=True)
class _Row:
    """A tensor as the header lists it: dimensions fastest first, offset from the start of the data."""

    name: str
    dimensions: tuple[int, ...]
    code: int
    offset: int


def open_gguf(path: Path) -> Checkpoint:
    """Read and check the header of a GGUF file, version 2 or 3. Arrays of a tokenizer are stepped over.

    Raises:
        CorruptCheckpointError: truncated, or a header that does not add up.
        UnsupportedCheckpointError: another version or byte order, a piece of several, or a type that is not read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        reader = _Reader(path, file, size)
        reader.take(len(MAGIC))
        _check_version(path, int(reader.number("I")))
        tensor_count = reader.count("tensors", MAX_TENSORS)
        metadata, shapes = _read_metadata(reader, reader.count("metadata entries", MAX_PAIRS))
        rows = [_read_row(reader) for _ in range(tensor_count)]
        header_size = size - reader.left
    alignment = _whole(path, metadata, "general.alignment", 32)
    if not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise corrupt(path, f"its alignment {alignment} is not a power of two")
    if _whole(path, metadata, "split.count", 1) > 1:
        raise UnsupportedCheckpointError(
            f"{path.name} is one of {metadata['split.count']} pieces; join them with `gguf-split --merge`"
        )
    data_start = -(-header_size // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for row in rows:
        if row.name in tensors:
            raise corrupt(path, f"the name {row.name!r} appears twice")
        if row.offset % alignment:
            raise corrupt(path, f"the bytes of {row.name!r} are not aligned to {alignment}")
        tensors[row.name] = _tensor_info(path, row, data_start, shapes.get(row.name))
    _check_ranges(path, tensors, size)
    return Checkpoint(path, tensors, metadata, container="gguf")


def _whole(path: Path, metadata: Mapping[str, str], name: str, default: int) -> int:
    try:
        return int(metadata.get(name, default))
    except ValueError:
        raise corrupt(path, f"its {name} is not a whole number") from None


def _check_version(path: Path, version: int) -> None:
    if version in (2, 3):
        return
    if version & 0xFFFF == 0:
        raise UnsupportedCheckpointError(f"{path.name} is a big-endian GGUF file; use the little-endian one")
    raise UnsupportedCheckpointError(f"{path.name} is a GGUF file of version {version}; use one of version 2 or 3")


def _read_metadata(reader: _Reader, count: int) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """The small values as text, and the shapes that tensors had before they were flattened."""
    kept: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    names: set[str] = set()
    room = MAX_KEPT
    for _ in range(count):
        name = reader.string(MAX_NAME)
        if name in names:
            raise corrupt(reader.path, f"its metadata has {name!r} twice")
        names.add(name)
        kind = int(reader.number("I"))
        if kind == ARRAY:
            numbers = _read_array(reader, keep=name.startswith(ORIGINAL_SHAPE))
            if numbers is not None:
                shapes[name.removeprefix(ORIGINAL_SHAPE)] = numbers
            continue
        value = _read_value(reader, kind)
        if name in NEEDED or len(value) + len(name) <= room:
            room -= len(value) + len(name)
            kept[name] = value
    return kept, shapes


def _read_value(reader: _Reader, kind: int) -> str:
    if kind == STRING:
        return reader.string()
    if kind not in SCALARS:
        raise corrupt(reader.path, f"its metadata has a value of the unknown type {kind}")
    return str(reader.number(SCALARS[kind]))


def _read_array(reader: _Reader, *, keep: bool) -> tuple[int, ...] | None:
    """Step over an array; with ``keep``, return its numbers."""
    kind = int(reader.number("I"))
    if kind == STRING:
        texts = reader.count("texts in its lists", reader.texts)
        reader.texts -= texts
        for _ in range(texts):
            reader.skip(reader.count("characters in a text", MAX_STRING))
        return None
    if kind not in SCALARS:
        raise corrupt(reader.path, f"its metadata has a list of the unknown type {kind}")
    width = struct.calcsize(f"<{SCALARS[kind]}")
    count = reader.count("numbers in a list", reader.left // width)
    if not keep or count > MAX_DIMENSIONS:
        reader.skip(count * width)
        return None
    return tuple(int(reader.number(SCALARS[kind])) for _ in range(count))


def _read_row(reader: _Reader) -> _Row:
    name = reader.string(MAX_NAME)
    dimensions = int(reader.number("I"))
    if dimensions > MAX_DIMENSIONS:
        raise corrupt(reader.path, f"{name!r} has {dimensions:,} dimensions where at most {MAX_DIMENSIONS} make sense")
    *sizes, code, offset = struct.unpack(f"<{dimensions}QIQ", reader.take(8 * dimensions + 12))
    return _Row(name, tuple(sizes), code, offset)


def _tensor_info(path: Path, row: _Row, data_start: int, original: tuple[int, ...] | None) -> TensorInfo:
    if row.code not in PLAIN and row.code not in BLOCKS:
        unread = UNREAD.get(row.code, f"the unknown type {row.code}")
        raise UnsupportedCheckpointError(
            f"{path.name}: this file stores {row.name!r} as {unread}; not supported: use a Q8_0, Q5_K or Q4_K file"
        )
    shape = original or row.dimensions[::-1]
    count = math.prod(row.dimensions)
    if original and (math.prod(original) != count or min(original) < 0):
        raise corrupt(path, f"the original shape {list(original)} of {row.name!r} does not fit its {count:,} numbers")
    start = data_start + row.offset
    if row.code in PLAIN:
        dtype, width = PLAIN[row.code]
        return TensorInfo(dtype, shape, start, start + count * width)
    kind = BLOCK_TYPES[BLOCKS[row.code]]
    if not shape or shape[-1] % kind.elements or row.dimensions[0] % kind.elements:
        raise corrupt(path, f"the rows of {row.name!r} {list(shape)} are no whole number of {BLOCKS[row.code]} blocks")
    end = start + count // kind.elements * kind.nbytes
    return TensorInfo(f"gguf:{BLOCKS[row.code]}", shape, start, end)


def _check_ranges(path: Path, tensors: Mapping[str, TensorInfo], size: int) -> None:
    """Tensors may be padded, and must neither overlap nor leave the file."""
    end = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start < end:
            raise corrupt(path, f"the bytes of {name!r} overlap others")
        end = info.end
    if end > size:
        raise incomplete(path, end, size)
