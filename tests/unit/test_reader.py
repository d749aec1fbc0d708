"""The loop in C is built once, whole or not at all, and loaded only from a folder that is this user's alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lightweight_engine.backend import reader

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it is for Linux")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kernels"


@pytest.fixture
def built(folder: Path) -> Path:
    made = reader.build(folder)
    if made is None:
        pytest.skip("there is no compiler of C here")
    return made


def test_it_is_built_once_and_found(built: Path, folder: Path) -> None:
    assert list(built.parent.iterdir()) == [built] == [reader.library_path(folder)]
    before = built.stat()
    assert reader.build(folder) == built and built.stat() == before
    assert (built.stat().st_mode & 0o777, built.parent.stat().st_mode & 0o777) == (0o700, 0o700)
    assert reader.read_pieces(folder) is not None


def test_it_has_no_warnings(built: Path) -> None:
    compiler = next(filter(None, map(shutil.which, reader.COMPILERS)))
    command = [compiler, "-Wall", "-Wextra", "-Werror", "-std=gnu11", "-fsyntax-only", str(reader.SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_another_source_is_another_library(
    built: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = tmp_path / "reader.c"
    changed.write_text(reader.SOURCE.read_text() + "\n/* changed */\n")
    monkeypatch.setattr(reader, "SOURCE", changed)
    assert reader.library_path(folder) != built and reader.read_pieces(folder) is None
    assert re.fullmatch(rf"[0-9a-f]{{8}}-{os.uname().machine}\.so", built.name)


@pytest.mark.parametrize("mode", [0o720, 0o702])
@pytest.mark.parametrize("where", ["file", "folder"])
def test_what_others_may_write_is_not_loaded_and_built_anew(built: Path, folder: Path, where: str, mode: int) -> None:
    at = built if where == "file" else built.parent
    at.chmod(mode)
    assert reader.read_pieces(folder) is None
    assert reader.build(folder) == built and reader.read_pieces(folder) is not None


def test_what_cannot_be_loaded_is_told_and_built_anew(
    built: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    built.unlink()
    assert reader.read_pieces(folder) is None and not caplog.records
    built.write_bytes(b"")
    built.chmod(0o700)
    assert reader.read_pieces(folder) is None and "more slowly" in caplog.text
    assert reader.build(folder) == built and reader.read_pieces(folder) is not None


@pytest.mark.parametrize("fault", ["no compiler", "it fails", "no folder", "no source"])
def test_where_it_cannot_be_built_nothing_is_left(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, tools = tmp_path / "kernels", tmp_path / "tools"
    tools.mkdir()
    if fault != "no compiler":
        (tools / "cc").write_text("#!/bin/sh\nexit 1\n")
        (tools / "cc").chmod(0o755)
    if fault == "no folder":
        folder.write_text("a file")
    if fault == "no source":
        monkeypatch.setattr(reader, "SOURCE", tmp_path / "gone")
    monkeypatch.setenv("PATH", str(tools))
    assert reader.build(folder) is None and reader.read_pieces(folder) is None
    assert not [each for each in folder.rglob("*") if each.is_file()]


def test_several_may_build_it_at_once(folder: Path, built: Path) -> None:
    built.unlink()
    threads = [reader.build_later(folder) for _ in range(4)]
    for thread in threads:
        assert thread is not None
        thread.join(60)
    assert list(built.parent.iterdir()) == [built] and reader.read_pieces(folder) is not None


def test_a_load_does_not_fail_for_want_of_a_thread(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuses)
    assert reader.build_later(folder) is None


INTERRUPTED = """
#include <errno.h>
#include <unistd.h>
#include <dlfcn.h>
ssize_t pread(int file, void *buffer, size_t count, off_t start)
{
    static int calls;
    ssize_t (*real)(int, void *, size_t, off_t) = dlsym(RTLD_NEXT, "pread");
    if (++calls == 2) { errno = EINTR; return -1; }
    return real(file, buffer, count > 7 ? 7 : count, start);
}
"""


def test_a_read_that_is_interrupted_or_short_goes_on(built: Path, folder: Path, tmp_path: Path) -> None:
    """Bytes arrive whole where the system interrupts the loop, and gives it seven bytes at a time."""
    source, library, content = tmp_path / "pread.c", tmp_path / "pread.so", bytes(range(100))
    source.write_text(INTERRUPTED)
    compiler = next(filter(None, map(shutil.which, reader.COMPILERS)))
    command = [compiler, "-D_GNU_SOURCE", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True)
    (tmp_path / "x").write_bytes(content)
    code = f"""
import ctypes, os, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from drivers import StandIn
from lightweight_engine.backend import reader
driver, file = StandIn(), os.open({str(tmp_path / "x")!r}, os.O_RDONLY)
target, source = driver.reserve(100), driver.buffer(2 * 64)
there = bytearray(2)
pieces = [(file, 0, 64, target), (file, 64, 36, target + 64)]
job = reader.Job(reader.table(pieces), 2, 0, 0, reader.flags(there), *driver.functions)
reader.read_pieces(Path({str(folder)!r}))(job, driver.stream(), source, source + 64)
print(bytes(there), ctypes.string_at(target, 100) == bytes(range(100)))
"""
    environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.strip() == r"b'\x01\x01' True", done.stderr
