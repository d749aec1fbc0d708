"""Model files of any size that take no room: a real header, a few real bytes, and a hole for the rest."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lightweight_engine.backend.block_types import BLOCK_TYPES
from lightweight_engine.backend.checkpoint import DTYPES

GGUF_PLAIN = {"F32": (0, 4), "F16": (1, 2), "BF16": (30, 2)}


@dataclass(frozen=True)
class Hole:
    """A tensor whose numbers nobody reads; ``data`` where somebody does."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][0]


def text(content: Mapping) -> Hole:
    data = json.dumps(content).encode()
    return Hole("U8", (len(data),), data)


def write_safetensors(path: Path, tensors: Mapping[str, Hole], metadata: Mapping[str, str] | None = None) -> Path:
    header: dict = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, hole in tensors.items():
        header[name] = {"dtype": hole.dtype, "shape": hole.shape, "data_offsets": [at, at + hole.nbytes]}
        at += hole.nbytes
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for name, hole in tensors.items():
            if hole.data is not None:
                file.seek(8 + len(raw) + header[name]["data_offsets"][0])
                file.write(hole.data)
        file.truncate(8 + len(raw) + at)
    return path


def gguf_text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf_pair(name: str, kind: int, value: bytes) -> bytes:
    return gguf_text(name) + struct.pack("<I", kind) + value


def write_gguf(
    path: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    data: Mapping[str, bytes] | None = None,
    *,
    pairs: tuple[bytes, ...] = (),
    architecture: str = "flux",
) -> Path:
    """``tensors``: name to type and shape in torch's order."""
    pairs = (gguf_pair("general.architecture", 8, gguf_text(architecture)), *pairs)
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs)) + b"".join(pairs)
    at, places = 0, {}
    for name, (kind, shape) in tensors.items():
        if kind in GGUF_PLAIN:
            code, width = GGUF_PLAIN[kind]
            size = math.prod(shape) * width
        else:
            block = BLOCK_TYPES[kind]
            code, size = block.number, math.prod(shape) // block.elements * block.nbytes
        header += gguf_text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), code, at)
        places[name] = at
        at += size + -size % 32
    header += b"\0" * (-len(header) % 32)
    with path.open("wb") as file:
        file.write(header)
        for name, content in (data or {}).items():
            file.seek(len(header) + places[name])
            file.write(content)
        file.truncate(len(header) + at)
    return path
