"""Files of torch.save: the tensors are those that were saved, and nothing of the file is ever run."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightweight_engine.backend.model_files import open_model
from lightweight_engine.errors import CorruptCheckpointError, ModelError, UnsupportedCheckpointError

TENSORS = {
    "plain": torch.randn(3, 5),
    "bfloat16": torch.randn(4, 4).bfloat16(),
    "fp8": torch.randn(2, 2).to(torch.float8_e5m2),
    "transposed": torch.randn(3, 4).t(),
    "slice": torch.randn(9, 9)[2:5, 1:4],
    "parameter": torch.nn.Parameter(torch.ones(2), requires_grad=True),
    "scalar": torch.tensor(4.0),
    "empty": torch.zeros(0, 3),
    "integers": torch.arange(5),
}


def check(path: Path) -> None:
    checkpoint = open_model(path)
    assert checkpoint.container == "pickle" and set(checkpoint.tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        read = checkpoint.tensor(name)
        assert read.dtype == tensor.dtype and read.shape == tensor.shape, name
        assert torch.equal(read.float(), tensor.float()), name


@pytest.mark.parametrize("key", [None, "state_dict", "model", "module", "params_ema", "params"])
@pytest.mark.parametrize("suffix", ["pt", "pth", "ckpt", "bin"])
def test_tensors_are_those_that_were_saved(tmp_path: Path, key: str | None, suffix: str) -> None:
    torch.save({key: TENSORS, "epoch": 3} if key else TENSORS, tmp_path / f"x.{suffix}")
    check(tmp_path / f"x.{suffix}")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_protocols(tmp_path: Path, protocol: int) -> None:
    torch.save(OrderedDict(TENSORS), tmp_path / "x.pt", pickle_protocol=protocol)
    check(tmp_path / "x.pt")


def test_what_training_programs_save_beside(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    model = torch.nn.Linear(2, 3)
    state = {"state_dict": model.state_dict(), "epoch": 7, "loss": numpy.float64(0.5), "history": [1, (2, None)]}
    torch.save(state, tmp_path / "x.ckpt")
    checkpoint = open_model(tmp_path / "x.ckpt")
    assert checkpoint.metadata == {"epoch": "7"} and set(checkpoint.tensors) == {"weight", "bias"}
    assert torch.equal(checkpoint.tensor("weight"), model.weight)


def test_plain_tensors_are_views(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1000), "b": torch.ones(1000)}, tmp_path / "x.pt")
    checkpoint = open_model(tmp_path / "x.pt")
    assert len({checkpoint.tensor(name).untyped_storage().data_ptr() for name in "ab"}) == 1


class Runs:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, "system"), (eval, "builtins.eval"), (open, "io.open"), (torch.load, "torch.serialization.load")],
)
def test_no_code_runs(tmp_path: Path, function: Callable[..., Any], name: str) -> None:
    trap = tmp_path / "trap"
    torch.save({"a": torch.zeros(1), "b": Runs(function, f"touch {trap}")}, tmp_path / "x.ckpt")
    with pytest.raises(UnsupportedCheckpointError, match=rf"x.ckpt.*asks for .*{name.rpartition('.')[2]}.*safetensors"):
        open_model(tmp_path / "x.ckpt")
    assert not trap.exists()


def test_a_pickled_module_is_named(tmp_path: Path) -> None:
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "x.pt")
    with pytest.raises(UnsupportedCheckpointError, match=r"asks for torch.nn.modules.linear.Linear"):
        open_model(tmp_path / "x.pt")


@pytest.mark.parametrize("key", [None, "params_ema", "net"])
def test_the_format_before_torch_1_6(tmp_path: Path, key: str | None) -> None:
    state = {key: TENSORS, "epoch": 3} if key else TENSORS
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    check(tmp_path / "old.pth")


def test_old_files_that_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for length in (*range(1, 200, 7), *range(200, len(whole), 61), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises((UnsupportedCheckpointError, CorruptCheckpointError)):
            open_model(path)


def test_old_files_run_no_code_either(tmp_path: Path) -> None:
    trap, path = tmp_path / "trap", tmp_path / "old.pth"
    for content in ({"a": torch.zeros(1), "b": Runs(os.system, f"touch {trap}")}, Runs(os.system, f"touch {trap}")):
        torch.save(content, path, _use_new_zipfile_serialization=False)
        with pytest.raises(UnsupportedCheckpointError, match=r"asks for .*system"):
            open_model(path)
    path.write_bytes(pickle.dumps({"a": 1}, protocol=2))
    with pytest.raises((UnsupportedCheckpointError, CorruptCheckpointError)):
        open_model(path)
    assert not trap.exists()


def test_an_old_file_whose_storage_claims_another_length(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save({"a": torch.arange(6.0)}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for count in (5, 2**62, 2**64 - 1):
        path.write_bytes(whole[:-32] + struct.pack("<Q", count) + whole[-24:])
        with pytest.raises(CorruptCheckpointError, match="a storage of 6 numbers has"):
            open_model(path)


def test_other_objects(tmp_path: Path) -> None:
    for name, value in (("tensor", torch.zeros(2)), ("list", [torch.zeros(2)]), ("text", {"a": "b"})):
        torch.save(value, tmp_path / f"{name}.pt")
        with pytest.raises(UnsupportedCheckpointError, match="no dictionary of tensors"):
            open_model(tmp_path / f"{name}.pt")


def archive(
    path: Path, program: bytes, entries: dict[str, bytes] | None = None, method: int = zipfile.ZIP_STORED
) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("x/data.pkl", program)
        for name, content in (entries or {"x/data/0": b"\0" * 64}).items():
            file.writestr(name, content)
    return path


def storage(count: int = 16, key: bytes = b"0", dtype: bytes = b"FloatStorage") -> bytes:
    """A storage of that many numbers, as an instruction that refers to one."""
    name = b"X" + struct.pack("<I", len(key)) + key
    size = b"J" + struct.pack("<i", count)
    return b"(X\x07\x00\x00\x00storagectorch\n" + dtype + b"\n" + name + b"X\x03\x00\x00\x00cpu" + size + b"tQ"


def tensor(
    storage: bytes, shape: bytes = b"K\x10\x85", strides: bytes = b"K\x01\x85", offset: bytes = b"K\x00"
) -> bytes:
    """{'a': a tensor}"""
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return b"\x80\x02}X\x01\x00\x00\x00a" + rebuild + storage + offset + shape + strides + b"\x89NtRs."


def test_the_hand_written_program_is_right(tmp_path: Path) -> None:
    checkpoint = open_model(archive(tmp_path / "x.pt", tensor(storage())))
    assert checkpoint.tensors["a"].shape == (16,)


NESTED = b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 60
"""A tuple of two of a tuple of two of …: 2**60 leaves for whoever looks at all of them."""


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (b"", "ends too soon"),
        (b"\x80\x02", "ends too soon"),
        (b"\x80\x02.", "damaged"),
        (b"\x80\x02}K\x01.", "no dictionary"),
        (b"\x80\x02\x81.", "instruction"),
        (b"\x80\x02h\x05.", "damaged"),
        (b"\x80\x02t.", "damaged"),
        (b"\x80\x02\x86.", "empty stack"),
        (b"\x80\x02X\xff\xff\xff\x7f", "ends too soon"),
        (b"\x80\x02K\x01)R.", "calls what is no function"),
        (b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R.", "asks for os.system"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "calls torch.FloatStorage"),
        (b"\x80\x02ccollections\nOrderedDict\n]\x85R.", "damaged"),
        (b"\x80\x02" + b"}0" * 600_000 + b".", "more than 1,000,000 instructions"),
        (NESTED + b"}h\x00K\x01s.", "keys that are neither"),
        (
            NESTED + b"0ctorch\nFloatStorage\nq\x010(X\x07\x00\x00\x00storageh\x01h\x00h\x00K\x01tQ.",
            "no storage of torch",
        ),
        (tensor(storage(key=b"../../etc")), "damaged"),
        (tensor(storage(), shape=b"K\x11\x85"), "does not fit its storage"),
        (tensor(storage(), offset=b"K\x01"), "does not fit its storage"),
        (tensor(storage(), shape=b"J\xff\xff\xff\xff\x85"), "not a whole number"),
        (tensor(storage(), shape=b"K\x10K\x10\x86"), "not a whole number"),
        (tensor(storage(), shape=b"K\x10\x85", strides=b"K\x00\x85"), "repeats its numbers"),
        (tensor(storage(), shape=b"]"), "dimensions"),
        (tensor(b"K\x01"), "damaged"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_programs_that_are_refused(tmp_path: Path, program: bytes, words: str) -> None:
    with pytest.raises(ModelError, match=rf"x.pt: its pickle is .*{words}"):
        open_model(archive(tmp_path / "x.pt", program))


GOOD = tensor(storage())


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"x/data/../../evil": b""}, "no file of torch.save"),
        ({"/etc/passwd": b""}, "no file of torch.save"),
        ({"x/code/model.py": b""}, "no file of torch.save"),
        ({"x/byteorder": b"big", "x/data/0": b"\0" * 64}, "big-endian"),
        ({"y/data/0": b"\0" * 64, "x/data/0": b"\0" * 64}, "twice"),
        ({"x/data/1": b"\0" * 64}, "damaged"),
    ],
    ids=str,
)
def test_archives_that_are_refused(tmp_path: Path, entries: dict[str, bytes], words: str) -> None:
    with pytest.raises(ModelError, match=f"x.pt.*{words}"):
        open_model(archive(tmp_path / "x.pt", GOOD, entries))


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.pt", GOOD, {"x/data/0": b"\0" * 50_000_000}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    with pytest.raises(CorruptCheckpointError, match="compressed or encrypted"):
        open_model(path)


def test_entries_of_one_name(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = archive(tmp_path / "x.pt", GOOD)
        with zipfile.ZipFile(path, "a") as file:
            file.writestr("x/data/0", b"\1" * 64)
    with pytest.raises(CorruptCheckpointError, match="two entries 'x/data/0'"):
        open_model(path)


def test_rows_that_point_elsewhere(tmp_path: Path) -> None:
    """A row of the directory points to the bytes of another entry, as zip bombs have it."""
    path = archive(tmp_path / "x.pt", GOOD, {"x/data/0": b"\0" * 64, "x/data/1": b"\1" * 64})
    content = path.read_bytes()
    last_row = content.rfind(b"PK\x01\x02")
    path.write_bytes(content[: last_row + 42] + struct.pack("<I", 0) + content[last_row + 46 :])
    with pytest.raises(CorruptCheckpointError, match="not where the directory"):
        open_model(path)


def test_entries_that_overlap(tmp_path: Path) -> None:
    """The first entry claims to be as long as the file."""
    path = archive(tmp_path / "x.pt", GOOD)
    content = path.read_bytes()
    row = content.find(b"PK\x01\x02")
    path.write_bytes(content[: row + 20] + struct.pack("<II", 300, 300) + content[row + 28 :])
    with pytest.raises(CorruptCheckpointError, match="overlaps others"):
        open_model(path)


def test_every_truncation_is_a_typed_error(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.randn(20)}, buffer)
    content = buffer.getvalue()
    for length in range(4, len(content), 13):
        (tmp_path / "cut.pt").write_bytes(content[:length])
        with pytest.raises(CorruptCheckpointError):
            open_model(tmp_path / "cut.pt")


def test_damaged_bytes_never_raise_anything_else(tmp_path: Path) -> None:
    """Bytes of the program are changed, one at a time: a typed error, or the same tensors in another order."""
    for at in range(2, len(GOOD)):
        for byte in (0x00, 0x28, 0x52, 0x74, 0x81, 0xFF):
            changed = GOOD[:at] + bytes([byte]) + GOOD[at + 1 :]
            try:
                open_model(archive(tmp_path / "x.pt", changed))
            except ModelError:
                pass
