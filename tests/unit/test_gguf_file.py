"""GGUF headers: types, shapes and metadata as they are, and every count checked before it is believed."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from sparse_files import GGUF_PLAIN, gguf_pair, gguf_text, write_gguf

from lightweight_engine.backend.block_types import BLOCK_TYPES
from lightweight_engine.backend.model_files import open_model
from lightweight_engine.errors import CorruptCheckpointError, UnsupportedCheckpointError

U32, STRING, ARRAY = 4, 8, 9


def texts(*values: str) -> bytes:
    return struct.pack("<IQ", STRING, len(values)) + b"".join(map(gguf_text, values))


def test_types_shapes_and_places(tmp_path: Path) -> None:
    tensors = {f"{kind}.weight": (kind, (3, 256)) for kind in (*BLOCK_TYPES, *GGUF_PLAIN)}
    checkpoint = open_model(write_gguf(tmp_path / "x.gguf", tensors))
    assert checkpoint.container == "gguf"
    for kind in BLOCK_TYPES:
        info = checkpoint.tensors[f"{kind}.weight"]
        assert (info.dtype, info.shape) == (f"gguf:{kind}", (3, 256))
        assert checkpoint.tensor(f"{kind}.weight").shape == (3, BLOCK_TYPES[kind].row_bytes(256))
    assert [checkpoint.tensors[f"{kind}.weight"].dtype for kind in GGUF_PLAIN] == list(GGUF_PLAIN)


def test_numbers(tmp_path: Path) -> None:
    values = torch.randn(2, 3)
    data = {"a": values.numpy().tobytes(), "b": values.half().numpy().tobytes()}
    path = write_gguf(tmp_path / "x.gguf", {"a": ("F32", (2, 3)), "b": ("F16", (2, 3))}, data)
    checkpoint = open_model(path)
    assert torch.equal(checkpoint.tensor("a"), values) and torch.equal(checkpoint.tensor("b"), values.half())


def test_metadata_and_lists(tmp_path: Path) -> None:
    """Small values are kept as text; the lists of a tokenizer are stepped over."""
    pairs = (
        gguf_pair("general.file_type", U32, struct.pack("<I", 7)),
        gguf_pair("tokenizer.ggml.tokens", ARRAY, texts(*(f"token {n}" for n in range(5000)))),
        gguf_pair("tokenizer.ggml.scores", ARRAY, struct.pack("<IQ5f", 6, 5, *range(5))),
        gguf_pair("template", STRING, gguf_text("x" * 900_000)),
        gguf_pair("another", STRING, gguf_text("y" * 900_000)),
    )
    checkpoint = open_model(write_gguf(tmp_path / "x.gguf", {"a": ("F32", (1,))}, pairs=pairs))
    assert list(checkpoint.metadata) == ["general.architecture", "general.file_type", "template"]
    assert checkpoint.metadata["general.file_type"] == "7"


def test_the_original_shape(tmp_path: Path) -> None:
    pair = gguf_pair("comfy.gguf.orig_shape.a", ARRAY, struct.pack("<IQ4i", 5, 4, 8, 4, 1, 1))
    tensors = {"a": ("F16", (4, 8))}
    assert open_model(write_gguf(tmp_path / "x.gguf", tensors, pairs=(pair,))).tensors["a"].shape == (8, 4, 1, 1)
    wrong = gguf_pair("comfy.gguf.orig_shape.a", ARRAY, struct.pack("<IQ2i", 5, 2, 8, 5))
    with pytest.raises(CorruptCheckpointError, match="original shape"):
        open_model(write_gguf(tmp_path / "x.gguf", tensors, pairs=(wrong,)))


def header(tensors: int = 0, pairs: int = 0, *, version: int = 3, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + rest


def row(name: str, sizes: tuple[int, ...], code: int, offset: int = 0) -> bytes:
    return gguf_text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, code, offset)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (header(version=1), "version 1"),
        (header(version=4), "version 4"),
        (b"GGUF\x00\x00\x00\x03" + b"\0" * 16, "big-endian"),
        (header(pairs=1, rest=gguf_pair("split.count", 2, struct.pack("<H", 3))), "3 pieces; join them"),
        (header(1, rest=row("a", (32,), 16)), "'a' as IQ2_XXS; not supported"),
        (header(1, rest=row("a", (32,), 39)), "'a' as MXFP4; not supported"),
        (header(1, rest=row("a", (32,), 77)), "unknown type 77"),
    ],
    ids=str,
)
def test_what_is_not_read_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(UnsupportedCheckpointError, match=f"x.gguf.*{words}"):
        open_model(tmp_path / "x.gguf")


HUGE = 1 << 60


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (header(HUGE), "tensors where at most 100,000"),
        (header(0, HUGE), "metadata entries where at most 100,000"),
        (header(1, rest=struct.pack("<Q", HUGE)), "characters in a text"),
        (header(pairs=1, rest=struct.pack("<Q", 30) + b"short"), "incomplete"),
        (header(pairs=1, rest=gguf_pair("a", ARRAY, struct.pack("<IQ", STRING, HUGE))), "texts in its lists"),
        (header(pairs=1, rest=gguf_pair("a", ARRAY, struct.pack("<IQ", U32, HUGE))), "numbers in a list"),
        (header(pairs=1, rest=gguf_pair("a", ARRAY, struct.pack("<IQ", ARRAY, 1))), "list of the unknown type 9"),
        (header(pairs=1, rest=gguf_pair("a", 99, b"")), "value of the unknown type 99"),
        (header(pairs=2, rest=gguf_pair("a", 0, b"1") * 2), "'a' twice"),
        (header(pairs=1, rest=gguf_pair("general.alignment", U32, struct.pack("<I", 48))), "alignment 48"),
        (header(pairs=1, rest=gguf_pair("general.alignment", STRING, gguf_text("x"))), "not a whole number"),
        (header(1, rest=gguf_text("a") + struct.pack("<I", 1 << 31)), "dimensions where at most 4"),
        (header(1, rest=row("a", (HUGE, HUGE), 0)), "incomplete"),
        (header(1, rest=row("a", (32,), 0, offset=HUGE)), "incomplete"),
        (header(1, rest=row("a", (2,), 0, offset=7)), "not aligned"),
        (header(1, rest=row("a", (33,), 8)), "no whole number of Q8_0 blocks"),
        (header(1, rest=row("a", (), 8)), "no whole number of Q8_0 blocks"),
        (header(2, rest=row("a", (2,), 0) * 2), "appears twice"),
        (header(2, rest=row("a", (16,), 0) + row("b", (16,), 0, 32)) + b"\0" * 200, "overlap"),
    ],
    ids=str,
)
def test_damaged_headers_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=f"x.gguf.*{words}.*download it again"):
        open_model(tmp_path / "x.gguf")


def test_every_truncation_is_a_typed_error(tmp_path: Path) -> None:
    pairs = (gguf_pair("tokens", ARRAY, texts("a", "bc")),)
    content = write_gguf(
        tmp_path / "whole.gguf", {"a": ("Q8_0", (2, 32)), "b": ("F32", (8,))}, pairs=pairs
    ).read_bytes()
    for length in range(1, len(content), 5):
        (tmp_path / "cut.gguf").write_bytes(content[:length])
        with pytest.raises(CorruptCheckpointError):
            open_model(tmp_path / "cut.gguf")
