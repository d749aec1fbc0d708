"""Opening safetensors files: what is read, what is refused, and that nothing is copied."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightweight_engine.backend.model_files import open_model
from lightweight_engine.errors import CorruptCheckpointError, ModelNotFoundError, UnsupportedCheckpointError


def write(path: Path, header: dict, data: bytes = b"", *, raw: bytes | None = None) -> Path:
    text = raw if raw is not None else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.float8_e4m3fn]
)
def test_tensors_are_those_that_were_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    saved = {
        "a.weight": torch.randn(3, 5).to(dtype),
        "b": torch.arange(7).to(dtype),
        "scalar": torch.ones(()).to(dtype),
    }
    save_file(saved, tmp_path / "x.safetensors", metadata={"config": "{}"})
    checkpoint = open_model(tmp_path / "x.safetensors")
    assert checkpoint.metadata == {"config": "{}"}
    for name, tensor in saved.items():
        read = checkpoint.tensor(name)
        assert read.dtype == dtype and read.shape == tensor.shape
        assert torch.equal(
            read.view(torch.uint8) if dtype == torch.float8_e4m3fn else read,
            tensor.view(torch.uint8) if dtype == torch.float8_e4m3fn else tensor,
        )


def test_unaligned_tensors_are_read(tmp_path: Path) -> None:
    values = torch.randn(4)
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [4], "data_offsets": [1, 17]},
    }
    path = write(tmp_path / "x.safetensors", header, b"\x07" + values.numpy().tobytes())
    assert torch.equal(open_model(path).tensor("b"), values)


def test_views_share_the_mapped_file(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1024), "b": torch.ones(1024)}, tmp_path / "x.safetensors")
    checkpoint = open_model(tmp_path / "x.safetensors")
    a, b = checkpoint.tensor("a"), checkpoint.tensor("b")
    assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def test_writing_to_a_view_leaves_the_file_alone(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(16)}, tmp_path / "x.safetensors")
    before = (tmp_path / "x.safetensors").read_bytes()
    open_model(tmp_path / "x.safetensors").tensor("a").fill_(3)
    assert (tmp_path / "x.safetensors").read_bytes() == before


def test_a_file_that_is_replaced_as_it_is_mapped_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It could not be told which of the two was mapped, and so not by which hash to know it."""
    save_file({"a": torch.zeros(16)}, tmp_path / "x.safetensors")
    checkpoint, mapped = open_model(tmp_path / "x.safetensors"), torch.UntypedStorage.from_file

    def map_and_replace(*args: object, **options: object) -> torch.UntypedStorage:
        made = mapped(*args, **options)
        os.utime(tmp_path / "x.safetensors", (1, 1))
        return made

    with monkeypatch.context() as patched:
        patched.setattr(torch.UntypedStorage, "from_file", map_and_replace)
        with pytest.raises(CorruptCheckpointError, match="x.safetensors: it is changed or replaced at this moment"):
            checkpoint.tensor("a")
    assert torch.equal(checkpoint.tensor("a"), torch.zeros(16))


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (b"", CorruptCheckpointError, "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", CorruptCheckpointError, "Git LFS pointer"),
        (b"<!DOCTYPE html><html>login</html>", CorruptCheckpointError, "web page"),
        (b'{"error": "not found"}', CorruptCheckpointError, "web page"),
        (b"GGUF\x04\x00\x00\x00" + b"\0" * 64, UnsupportedCheckpointError, "version 4"),
        (b"PK\x03\x04" + b"\0" * 64, CorruptCheckpointError, "zip archive"),
        (b"\x80\x02}q\x00." + b"\0" * 64, UnsupportedCheckpointError, "pickle .*use the safetensors file"),
        (b"abc", CorruptCheckpointError, "3 bytes"),
        (bytes(range(1, 8)) + b"\xff" * 64, CorruptCheckpointError, "not a safetensors file"),
    ],
)
def test_other_files_are_named(tmp_path: Path, content: bytes, error: type[Exception], words: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(error, match=words):
        open_model(path)


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({"a": {**TENSOR, "dtype": "F33"}}, b"\0" * 8, "unknown dtype"),
        ({"a": {**TENSOR, "shape": [3]}}, b"\0" * 8, "needs 12"),
        ({"a": {**TENSOR, "shape": [-2]}}, b"\0" * 8, "whole number"),
        ({"a": {**TENSOR, "shape": [True, 2]}}, b"\0" * 8, "whole number"),
        ({"a": TENSOR, "b": TENSOR}, b"\0" * 8, "overlap"),
        ({"a": {**TENSOR, "data_offsets": [8, 16]}}, b"\0" * 16, "hole"),
        ({"a": {"dtype": "F32"}}, b"", "damaged"),
        ({"a": TENSOR}, b"\0" * 4, "incomplete"),
        ({"a": TENSOR}, b"\0" * 12, "after its last tensor"),
        ({"n" * 2000: TENSOR}, b"\0" * 8, "1024"),
        ([1, 2], b"", "not a safetensors file"),
        ({"__metadata__": [1]}, b"", "metadata is not an object"),
        ({"a": 5}, b"", "damaged"),
    ],
)
def test_damaged_headers_are_refused(tmp_path: Path, header: dict, data: bytes, words: str) -> None:
    with pytest.raises(CorruptCheckpointError, match=words):
        open_model(write(tmp_path / "x.safetensors", header, data))


def test_a_repeated_name_is_refused(tmp_path: Path) -> None:
    row = json.dumps(TENSOR)
    path = write(tmp_path / "x.safetensors", {}, b"\0" * 8, raw=f'{{"a": {row}, "a": {row}}}'.encode())
    with pytest.raises(CorruptCheckpointError, match="twice"):
        open_model(path)


def test_every_truncation_is_a_typed_error(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(8, 8), "b": torch.ones(3)}, tmp_path / "whole.safetensors")
    content = (tmp_path / "whole.safetensors").read_bytes()
    for length in range(0, len(content), 7):
        path = tmp_path / "cut.safetensors"
        path.write_bytes(content[:length])
        with pytest.raises(CorruptCheckpointError):
            open_model(path)


def test_types_that_are_not_read_are_named(tmp_path: Path) -> None:
    header = {"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}
    with pytest.raises(UnsupportedCheckpointError, match=r"x.safetensors: this file stores 'a' as F4; .*bf16"):
        open_model(write(tmp_path / "x.safetensors", header, b"\0" * 2))


@pytest.mark.parametrize("first", [0x7B, 0x80, 0x50, 0x20])
def test_the_length_of_a_header_may_look_like_another_format(tmp_path: Path, first: int) -> None:
    """Its low byte is a brace, a pickle, a zip archive, a space."""
    text = json.dumps({"a": TENSOR}).encode()
    text += b" " * ((first - len(text)) % 256)
    assert list(open_model(write(tmp_path / "x.safetensors", {}, b"\0" * 8, raw=text)).tensors) == ["a"]


def test_missing_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        open_model(tmp_path / "none.safetensors")
    with pytest.raises(ModelNotFoundError, match="is a folder and holds no model"):
        open_model(tmp_path)
