"""What a start does while torch is imported: the right bytes, no more of them, and no harm where there are none."""

from __future__ import annotations

import errno
import os
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from factories import save_family
from fresh import called_fresh
from head_starts import headers_read, left_to_the_collector, read_for_a_request, started, waited_for

from lightweight_engine import Config
from lightweight_engine.backend import host_memory, read_ahead
from lightweight_engine.backend.model_files import open_model
from lightweight_engine.backend.read_ahead import PIECE, Span, joined
from lightweight_engine.core import head_start
from lightweight_engine.core.head_start import _index, _read, begin, spans
from lightweight_engine.core.models import TINY, ModelLibrary
from lightweight_engine.core.quantized_names import file_name
from lightweight_engine.flux.keymaps import find_parts


def read_of(
    found: list[Span], limit: int, monkeypatch: pytest.MonkeyPatch, error: int = errno.EAGAIN, in_memory: bool = False
) -> list[tuple[int, int]]:
    """What is asked of the system, as (start, length), with nothing in the page cache.

    Args:
        error: how the file system says so.
    """
    asked, lock, real = [], threading.Lock(), os.preadv

    def preadv(file: int, buffers: list[memoryview], start: int, flags: int = 0) -> int:
        if flags:
            raise OSError(error, "not there")
        with lock:
            asked.append((start, len(buffers[0])))
        return real(file, buffers, start)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", preadv)
        patch.setattr(read_ahead, "lies_in_memory", lambda path: in_memory)
        for thread in read_ahead.read_ahead(found, limit):
            thread.join(10)
    return sorted(asked)


def test_every_byte_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(2 * PIECE + 5))
    assert read_of([Span(path, 3, 2 * PIECE + 5)], 1 << 40, monkeypatch) == [
        (3, PIECE),
        (PIECE + 3, PIECE),
        (2 * PIECE + 3, 2),
    ]


def test_no_more_is_read_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(2 * PIECE))
    assert read_of([Span(path, 0, 2 * PIECE)], PIECE + 7, monkeypatch) == [(0, PIECE), (PIECE, 7)]
    assert read_of([Span(path, 0, PIECE)], 0, monkeypatch) == []


def test_what_lies_in_memory_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot say that it is there; nor can file systems of a network, whose files are read."""
    path = tmp_path / "file"
    path.write_bytes(bytes(PIECE))
    span = Span(path, 0, PIECE)
    assert read_of([span], PIECE, monkeypatch, errno.EOPNOTSUPP) == [(0, PIECE)]
    assert read_of([span], PIECE, monkeypatch, errno.EOPNOTSUPP, in_memory=True) == []


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="this system has no storage in memory")
def test_storage_in_memory_is_known(tmp_path: Path) -> None:
    assert read_ahead.lies_in_memory(Path("/dev/shm"))
    assert not read_ahead.lies_in_memory(Path("/proc/self/status"))
    assert not read_ahead.lies_in_memory(tmp_path / "gone")


def test_what_is_not_there_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_of([Span(tmp_path / "gone", 0, 9)], 99, monkeypatch) == []


def test_neighbours_are_one_span(tmp_path: Path) -> None:
    a, b, far = tmp_path / "a", tmp_path / "b", 10 * PIECE
    given = [Span(b, 8, 9), Span(a, 4, 6), Span(a, 0, 4), Span(b, far, far + 1)]
    assert joined(given) == [Span(b, 8, 9), Span(b, far, far + 1), Span(a, 0, 6)]


def test_the_bytes_are_those_of_the_parts() -> None:
    found = spans(Config(models_dir=TINY, offline=True))
    files = {span.path for span in found}
    assert files and all(span.end <= span.path.stat().st_size for span in found)
    assert {path.suffix for path in files} == {".safetensors"}


def test_what_is_quantised_already_is_read_in_its_place(tmp_path: Path) -> None:
    path = save_family(tmp_path) / "Stable-diffusion" / "small.safetensors"
    config = Config(models_dir=tmp_path, cache_dir=tmp_path / "cache", quantized_cache=True, storage_dtype="nf4")
    stand_in = tmp_path / "cache" / "quantized" / file_name(find_parts(open_model(path))["transformer"], "nf4")
    stand_in.parent.mkdir(parents=True)
    stand_in.write_bytes(bytes(100))
    assert _span_of(config, path) is None and _span_of(config, stand_in) == Span(stand_in, 0, 100)
    off = config.model_copy(update={"quantized_cache": False})
    assert _span_of(off, path) is not None and _span_of(off, stand_in) is None


def _span_of(config: Config, path: Path) -> Span | None:
    return next((span for span in spans(config) if span.path == path), None)


@pytest.mark.parametrize(("device", "index"), [("auto", 0), ("cuda", 0), ("cuda:3", 3), ("cpu", None), ("mps", None)])
def test_the_gpu_is_that_of_the_settings(device: str, index: int | None) -> None:
    assert _index(device) == index


def test_nothing_is_begun_where_torch_is_here() -> None:
    assert torch.__version__ and begin(Config(models_dir=TINY)) == []


@pytest.mark.parametrize("folder", [TINY, Path("no such folder")], ids=["tiny", "missing"])
def test_it_loads_no_torch_and_fails_in_silence(folder: Path) -> None:
    names, torch_is_here, errors = called_fresh(started, str(folder))
    assert names == ["head start: GPU", "head start: files"]
    assert not torch_is_here
    assert errors == []


def test_headers_that_a_start_has_read_are_read_by_nobody_else() -> None:
    """They go to the engine that comes first; the next reads its own."""
    assert called_fresh(headers_read, str(TINY)) == [True, False]


def test_headers_that_the_check_of_a_request_has_read_are_not_read_by_a_start() -> None:
    files, times = called_fresh(read_for_a_request, str(TINY))
    assert files == times > 0


def test_imports_wait_for_headers_but_not_for_long() -> None:
    """A GPU fetches files once it is known which they are."""
    assert called_fresh(waited_for, str(TINY)) == [True, False]


def test_passes_of_the_collector_leave_out_what_a_command_imports() -> None:
    """A model may be in a circle, and is released."""
    assert called_fresh(left_to_the_collector, str(TINY)) == [True, True, False]


def test_nobody_waits_for_headers_that_could_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: Future[ModelLibrary | None] = Future()

    def fails(config: Config) -> ModelLibrary:
        raise PermissionError("no entry")

    monkeypatch.setattr(ModelLibrary, "of", fails)
    assert _read(Config(models_dir=TINY, offline=True), begun) == []
    assert begun.done() and begun.result() is None


def test_of_what_a_container_may_have_a_share_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int] = []
    monkeypatch.setattr(host_memory, "_cgroup_limit", lambda: 1000)
    monkeypatch.setattr(head_start, "read_ahead", lambda found, limit: limits.append(limit))
    _read(Config(models_dir=TINY, offline=True), Future())
    assert limits == [500]


def test_the_loop_for_the_next_start_is_left_by_a_start_with_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Once; a program that has imported torch by itself had no start."""
    begun, built, config = head_start._Begun(), [], Config(cache_dir=tmp_path)
    monkeypatch.setattr(head_start, "_begun", lambda: begun)
    monkeypatch.setattr(head_start, "build_later", built.append)
    head_start.leave(config, "cuda")
    begun.begin(tmp_path)
    head_start.leave(config, "cpu")
    assert not built
    head_start.leave(config, "cuda")
    head_start.leave(config, "cuda")
    assert built == [tmp_path / "kernels"]
