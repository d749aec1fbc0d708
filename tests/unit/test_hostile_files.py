"""Hostile and broken files: refused in under a second, by name and with the fix, in little memory, running nothing."""

from __future__ import annotations

import json
import os
import re
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from factories import save_flux
from safetensors.torch import save_file
from sparse_files import Hole, gguf_pair, text, write_safetensors
from test_pickles import GOOD, Runs, archive
from test_stored import four_bit

from lightweight_engine.backend.model_files import open_model
from lightweight_engine.backend.stored import find_stored
from lightweight_engine.core.inspect import describe_file
from lightweight_engine.errors import ModelError
from lightweight_engine.flux.keymaps import find_parts

SECONDS = 1.0
MEMORY = 24 << 20

# What to do, in the words of the messages.
FIX = re.compile(
    r"download (it|the file|that file too)|use (a|the|one)\b|fetch the file|name (a|one)|correct it|convert it"
    r"|put the file|save it again|join them|check the name|open .* or its folder"
)

HUGE = 1 << 60
Build = Callable[[Path], Path]


def raw(path: Path, content: bytes, size: int | None = None) -> Path:
    """A file with these bytes, and a hole up to ``size``."""
    with path.open("wb") as file:
        file.write(content)
        file.truncate(max(size or 0, len(content)))
    return path


def header(rows: dict | str, claimed: int | None = None) -> bytes:
    encoded = (rows if isinstance(rows, str) else json.dumps(rows)).encode()
    return struct.pack("<Q", len(encoded) if claimed is None else claimed) + encoded


def row(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def truncated(tenths: int) -> Build:
    def build(folder: Path) -> Path:
        content = save_flux(folder / "whole.safetensors").read_bytes()
        return raw(folder / "x.safetensors", content[: len(content) * tenths // 10])

    return build


def tensors(changes: dict[str, torch.Tensor]) -> Build:
    """A 4-bit matrix of a file, some of its tensors replaced."""

    def build(folder: Path) -> Path:
        save_file({**four_bit("img_in.weight"), **changes}, folder / "x.safetensors")
        return folder / "x.safetensors"

    return build


def gguf(content: bytes) -> Build:
    return lambda folder: raw(folder / "x.gguf", b"GGUF" + content)


def bomb(folder: Path) -> Path:
    return archive(folder / "x.pt", GOOD, {"x/data/0": b"\0" * 200_000_000}, zipfile.ZIP_DEFLATED)


def many_entries(folder: Path) -> Path:
    """A directory that claims the most entries and bytes that a zip archive can have."""
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0xFFFE, 0xFFFE, 0xFFFFFFF0, 0, 0)
    return raw(folder / "x.pt", b"PK\x03\x04" + b"\0" * 100 + end)


def code(folder: Path) -> Path:
    torch.save({"a": torch.zeros(1), "b": Runs(os.system, f"touch {folder / 'trap'}")}, folder / "x.ckpt")
    return folder / "x.ckpt"


def old_code(folder: Path) -> Path:
    return raw(folder / "x.pt", b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.")


def link_out(folder: Path) -> Path:
    inner = folder / "model"
    save_flux(folder / "outside.safetensors")
    inner.mkdir()
    (inner / "model.safetensors").symlink_to("../outside.safetensors")
    return inner


def index_out(folder: Path) -> Path:
    save_flux(folder / "outside.safetensors")
    (folder / "x").mkdir()
    index = folder / "x" / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    return index


def shards_of_one_name(folder: Path) -> Path:
    for name in ("m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"):
        write_safetensors(folder / name, {"a": Hole("F32", (2,))})
    places = {"a": "m-00001-of-00002.safetensors", "b": "m-00002-of-00002.safetensors"}
    (folder / "m.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder / "m.safetensors.index.json"


def big_state(folder: Path) -> Path:
    """A JSON that describes a weight, of 10 GB."""
    name = "img_in.weight.quant_state.bitsandbytes__nf4"
    return write_safetensors(folder / "x.safetensors", {name: Hole("U8", (10 << 30,))})


def deep(folder: Path) -> Path:
    return raw(folder / "x.safetensors", header('{"a":' + "[" * 2_000_000))


def untrue_state(folder: Path) -> Path:
    """A matrix of 2**80 numbers in one byte."""
    state = {"quant_type": "nf4", "blocksize": 64, "shape": [1 << 40, 1 << 40]}
    name = "img_in.weight"
    sizes = {name: Hole("U8", (1, 1)), f"{name}.absmax": Hole("F32", (1,)), f"{name}.quant_map": Hole("F32", (16,))}
    return write_safetensors(folder / "x.safetensors", {**sizes, f"{name}.quant_state.bitsandbytes__nf4": text(state)})


TWO = {"a": row([2], 0, 8), "b": row([2], 4, 12)}

FILES: dict[str, Build] = {
    **{f"truncated at {tenths * 10} %": truncated(tenths) for tenths in range(10)},
    "a header of 100 MB that is not there": lambda f: raw(f / "x.safetensors", header("{}", 100_000_000)),
    "a header of 100 MB that is a hole": lambda f: raw(f / "x.safetensors", header("{", 100_000_000), 200_000_000),
    "a header of 2**60 bytes": lambda f: raw(f / "x.safetensors", header("{}", HUGE)),
    "a header nested two million deep": deep,
    "overlapping ranges": lambda f: raw(f / "x.safetensors", header(TWO) + b"\0" * 12),
    "a hole between ranges": lambda f: raw(f / "x.safetensors", header({"a": row([2], 4, 12)}) + b"\0" * 12),
    "a shape of 2**120 numbers": lambda f: raw(f / "x.safetensors", header({"a": row([HUGE, HUGE], 0, 4)}) + b"\0" * 4),
    "bytes after the end": lambda f: raw(f / "x.safetensors", header({"a": row([1], 0, 4)}), 10 << 30),
    "duplicate keys": lambda f: raw(f / "x.safetensors", header('{"a": 1, "a": 1}')),
    "a name of 5000 letters": lambda f: raw(f / "x.safetensors", header({"n" * 5000: row([1], 0, 4)}) + b"\0" * 4),
    "NaN scales": tensors({"img_in.weight.absmax": torch.full((128,), torch.nan)}),
    "wrong packed size": tensors({"img_in.weight": torch.zeros(7, 1, dtype=torch.uint8)}),
    "wrong count of scales": tensors({"img_in.weight.absmax": torch.zeros(5)}),
    "a description of 10 GB": big_state,
    "a matrix of 2**80 numbers": untrue_state,
    "a zip bomb": bomb,
    "a zip directory of 4 GB": many_entries,
    "a pickle with code": code,
    "an old pickle with code": old_code,
    "GGUF with 2**60 tensors": gguf(struct.pack("<IQQ", 3, HUGE, 0)),
    "GGUF with 2**60 entries": gguf(struct.pack("<IQQ", 3, 0, HUGE)),
    "GGUF with a text of 2**60": gguf(struct.pack("<IQQQ", 3, 0, 1, HUGE)),
    "GGUF with a list of 2**60": gguf(struct.pack("<IQQ", 3, 0, 1) + gguf_pair("a", 9, struct.pack("<IQ", 8, HUGE))),
    "GGUF with a row of 2**60": gguf(struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"a", 1, HUGE, 8, 0)),
    "a link out of the folder": link_out,
    "an index that names a file elsewhere": index_out,
    "a tensor in two shards": shards_of_one_name,
    "a Git LFS pointer": lambda f: raw(f / "x.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
    "a web page": lambda f: raw(f / "x.safetensors", b"\n<!DOCTYPE html><title>Sign in</title>"),
    "an error of a server": lambda f: raw(f / "x.safetensors", b'{"error": "Repository not found"}'),
    "nothing": lambda f: raw(f / "x.safetensors", b""),
    "zeros": lambda f: raw(f / "x.safetensors", b"\0", 10 << 30),
    "noise": lambda f: raw(f / "x.safetensors", bytes(range(255, 0, -1)) * 40),
}  # fmt: skip


def use(path: Path) -> None:
    """Open a file, find what it holds, and read every weight."""
    checkpoint = open_model(path)
    for stored in find_stored(checkpoint).values():
        stored.read()
    find_parts(checkpoint)


@pytest.mark.parametrize("name", FILES)
def test_refused(tmp_path: Path, name: str) -> None:
    path = FILES[name](tmp_path)
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(ModelError) as caught:
        use(path)
    seconds, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    message = str(caught.value)
    assert path.name in message, message
    assert FIX.search(message), message
    assert seconds < SECONDS and peak < MEMORY, (seconds, peak)
    assert not (tmp_path / "trap").exists()
    assert len(message) < 600


def test_there_are_enough() -> None:
    assert len(FILES) >= 30


def test_a_description_never_fails(tmp_path: Path) -> None:
    for number, build in enumerate(FILES.values()):
        (tmp_path / str(number)).mkdir()
        describe_file(build(tmp_path / str(number)))
