"""The loop in C is built once, whole or not at all, and loaded only where nobody else could have written it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lightweight_engine.backend import reader

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it is for Linux")


@pytest.fixture
def built(tmp_path: Path) -> Path:
    made = reader.build(tmp_path / "kernels")
    if made is None:
        pytest.skip("there is no compiler of C here")
    return made


def test_it_is_built_once_and_found(built: Path) -> None:
    assert list(built.parent.iterdir()) == [built] == [reader.library_path(built.parent)]
    before = built.stat()
    assert reader.build(built.parent) == built and built.stat() == before
    loop = reader.read_pieces(built.parent)
    assert loop is not None and loop.restype is None


def test_it_has_no_warnings(tmp_path: Path, built: Path) -> None:
    command = ["cc", "-Wall", "-Wextra", "-Werror", "-std=gnu11", "-fsyntax-only", str(reader.SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_another_source_is_another_library(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = tmp_path / "reader.c"
    changed.write_text(reader.SOURCE.read_text() + "\n/* changed */\n")
    monkeypatch.setattr(reader, "SOURCE", changed)
    assert reader.library_path(built.parent) != built and reader.read_pieces(built.parent) is None
    assert re.fullmatch(rf"reader-[0-9a-f]{{8}}-{os.uname().machine}\.so", built.name)


@pytest.mark.parametrize("where", ["file", "folder"])
def test_what_anybody_may_write_is_not_loaded(built: Path, where: str) -> None:
    at = built if where == "file" else built.parent
    at.chmod(0o777)
    assert reader.read_pieces(built.parent) is None
    at.chmod(0o755)
    assert reader.read_pieces(built.parent) is not None


def test_what_cannot_be_loaded_is_left_out(built: Path) -> None:
    built.write_bytes(b"\x7fELF, and nothing else")
    assert reader.read_pieces(built.parent) is None
    assert reader.read_pieces(built.parent / "gone") is None


@pytest.mark.parametrize("fault", ["no compiler", "it fails", "no folder"])
def test_where_it_cannot_be_built_nothing_is_left(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, tools = tmp_path / "kernels", tmp_path / "tools"
    tools.mkdir()
    if fault == "it fails":
        (tools / "cc").write_text("#!/bin/sh\nexit 1\n")
        (tools / "cc").chmod(0o755)
    if fault == "no folder":
        folder.write_text("a file")
        (tools / "cc").symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(tools))
    assert reader.build(folder) is None and reader.read_pieces(folder) is None
    assert folder.is_file() or not folder.exists() or not list(folder.iterdir())


def test_several_may_build_it_at_once(tmp_path: Path, built: Path) -> None:
    folder = tmp_path / "others"
    threads = [reader.build_later(folder) for _ in range(4)]
    for thread in threads:
        thread.join(60)
    assert [each.name for each in folder.iterdir()] == [built.name] and threading.active_count() < 50
    assert reader.read_pieces(folder) is not None
