"""What a GPU fetched before torch was there is what the file has, counts as free, and is given back, whatever fails."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from drivers import EVERYTHING, StandIn
from safetensors.torch import save_file
from torch import Tensor

from lightweight_engine import Config, LightweightEngine
from lightweight_engine.backend import devices, early_fetch, reader
from lightweight_engine.backend.checkpoint import Checkpoint, open_checkpoint
from lightweight_engine.backend.early_fetch import ALIGNED, EarlyFetch, FetchedFile, Pace
from lightweight_engine.backend.kept_files import FileVersion
from lightweight_engine.backend.read_ahead import Span
from lightweight_engine.backend.staging import Staging
from lightweight_engine.core import current_model, head_start
from lightweight_engine.core.choice import choose_models
from lightweight_engine.core.models import TINY
from lightweight_engine.core.networks import Networks
from lightweight_engine.errors import MemoryBudgetError

PIECE = 1 << 16
GIB = 1 << 30

pytestmark = pytest.mark.skipif(not early_fetch.can_fetch(), reason="files are not read so on this system")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    with_readers(2, monkeypatch)


def with_readers(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("IN_PYTHON", "IN_C"):
        monkeypatch.setattr(early_fetch, name, Pace(count, PIECE))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """Tensors that begin and end anywhere in the pieces, one over several; in the file ``b`` is the last."""
    torch.manual_seed(0)
    tensors = {"a": torch.randn(101), "b": torch.randn(3, 5).half(), "c": torch.randn(301, 251).bfloat16()}
    save_file(tensors, tmp_path / "x.safetensors")
    return open_checkpoint(tmp_path / "x.safetensors")


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """That in C."""
    folder = tmp_path_factory.mktemp("kernels")
    if reader.build(folder) is None:
        pytest.skip("there is no compiler of C here")
    loop = reader.read_pieces(folder)
    assert loop is not None
    return loop


@pytest.fixture(params=["in Python", "in C"])
def early(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[EarlyFetch]:
    """Closed in the end, with no error in any thread meanwhile; reads in Python and in C."""
    failed: list[object] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: failed.append(args.exc_value))
    monkeypatch.setattr(sys, "unraisablehook", lambda args: failed.append(args.exc_value))
    made = EarlyFetch()
    if request.param == "in C":
        in_c, fetch = request.getfixturevalue("loop"), made.fetch
        made.fetch = lambda driver, spans, room, loop=None: fetch(driver, spans, room, in_c)  # type: ignore[method-assign]
    yield made
    made.close(wait=True)
    assert not failed


def whole(checkpoint: Checkpoint) -> Span:
    return Span(checkpoint.path, 0, checkpoint.path.stat().st_size)


def file_of(early: EarlyFetch, path: Path) -> FetchedFile | None:
    return early.file(FileVersion.of(path))


def begun(early: EarlyFetch, driver: StandIn, checkpoint: Checkpoint) -> tuple[threading.Thread, FetchedFile]:
    """A thread that fetches a file, which has its place by now."""
    fetching = threading.Thread(target=early.fetch, args=(driver, [whole(checkpoint)], EVERYTHING))
    fetching.start()
    while (file := file_of(early, checkpoint.path)) is None:
        fetching.join(0.01)
    return fetching, file


def staging(checkpoint: Checkpoint, early: EarlyFetch) -> Staging:
    """A way to a device, with the memory of this process in place of it."""
    made = Staging(torch.device("cuda"), pinned=True, checkpoint=checkpoint, early=early)
    made._device = torch.device("cpu")
    return made


def three(checkpoint: Checkpoint) -> list[Tensor]:
    return [*map(checkpoint.tensor, "abc"), checkpoint.tensor("c")[7:200]]


def arrived(checkpoint: Checkpoint, early: EarlyFetch) -> list[bool]:
    """Of each tensor, whether it is copied from the GPU's memory; all are what they were, new or put where told."""
    way = staging(checkpoint, early)
    for tensor in three(checkpoint):
        made, into = way.bring(tensor), torch.zeros_like(tensor)
        assert made.dtype == tensor.dtype and torch.equal(made, tensor)
        assert way.bring(tensor, into) is into and torch.equal(into, tensor)
    return [way._may_be_there and way._fetched(tensor) is not None for tensor in three(checkpoint)]


def test_all_is_copied_from_the_gpu(checkpoint: Checkpoint, early: EarlyFetch) -> None:
    driver = StandIn()
    early.fetch(driver, [whole(checkpoint)], EVERYTHING)
    assert sum(driver.copied) == early.fetched == early.nbytes == whole(checkpoint).end
    assert len(driver.copied) == 3 and not driver.streams
    assert staging(checkpoint, early).fetches and arrived(checkpoint, early) == [True] * 4


def test_words_stay_whole(checkpoint: Checkpoint, early: EarlyFetch, tmp_path: Path) -> None:
    """Places on the GPU differ from those in files by a multiple: a copy within it is of whole words."""
    (tmp_path / "y").write_bytes(bytes(range(1, 256)) * 9)
    spans = [Span(tmp_path / "y", 3, 700), Span(tmp_path / "y", 1001, 1009), whole(checkpoint)]
    driver = StandIn()
    early.fetch(driver, spans, EVERYTHING)
    for span in spans:
        file = file_of(early, span.path)
        assert file is not None
        place = early.place(file, span.start, span.end)
        assert place is not None and (place - span.start) % ALIGNED == 0
        memory = bytes(driver.reserved[early.address])[place : place + span.end - span.start]
        assert memory == span.path.read_bytes()[span.start : span.end]
        assert span.path != tmp_path / "y" or early.place(file, span.start, span.end + 1) is None
    assert arrived(checkpoint, early) == [True] * 4


@pytest.mark.parametrize("refuses", ["enter", "reserve", "stream", "buffer", "copy", "settle"])
def test_what_the_driver_refuses_comes_from_the_file(
    checkpoint: Checkpoint, early: EarlyFetch, monkeypatch: pytest.MonkeyPatch, refuses: str
) -> None:
    with_readers(1, monkeypatch)  # pieces in order: the first of them is not refused
    driver = StandIn(refuses=refuses)
    early.fetch(driver, [whole(checkpoint)], EVERYTHING)
    assert not staging(checkpoint, early).fetches, "several threads read it from the file"
    assert arrived(checkpoint, early) == [refuses == "copy", False, False, False]
    early.close()
    assert not driver.streams and not driver.buffers and not driver.reserved


def test_no_more_is_taken_than_there_is_room_for(checkpoint: Checkpoint, early: EarlyFetch) -> None:
    early.fetch(StandIn(), [whole(checkpoint)], PIECE + 100)
    assert early.nbytes == early.fetched == PIECE + 100
    assert arrived(checkpoint, early) == [True, False, False, False]
    assert not staging(checkpoint, early).fetches


@pytest.mark.parametrize("room", [0, -5])
def test_without_room_nothing_is_taken(checkpoint: Checkpoint, early: EarlyFetch, room: int) -> None:
    early.fetch(driver := StandIn(), [whole(checkpoint)], room)
    assert not driver.reserved and arrived(checkpoint, early) == [False] * 4


def test_files_that_are_not_there_or_end_early_are_left_to_whoever_needs_them(
    checkpoint: Checkpoint, early: EarlyFetch, tmp_path: Path
) -> None:
    short = Span(checkpoint.path, 0, whole(checkpoint).end + 9)
    early.fetch(StandIn(), [Span(tmp_path / "gone", 0, 9), short], EVERYTHING)
    assert arrived(checkpoint, early) == [True, False, False, True], "b and the end of c lie in the last piece"


def test_what_is_on_its_way_is_waited_for(checkpoint: Checkpoint, early: EarlyFetch) -> None:
    may_go_on = threading.Semaphore(0)
    driver = StandIn(may_go_on=may_go_on)
    fetching, _ = begun(early, driver, checkpoint)
    made: list[Tensor] = []
    way = staging(checkpoint, early)
    waiting = threading.Thread(target=lambda: made.append(way.bring(checkpoint.tensor("c"))))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive() and not made
    for _ in range(10):
        may_go_on.release()
    waiting.join(20)
    fetching.join(20)
    assert torch.equal(made[0], checkpoint.tensor("c"))


def test_it_is_given_back_once_all_is_done(checkpoint: Checkpoint, early: EarlyFetch) -> None:
    driver = StandIn()
    early.fetch(driver, [whole(checkpoint)], EVERYTHING)
    early.close()
    early.close()
    assert driver.told == ["settle", "release", "drop"] and not driver.reserved and not early.nbytes
    assert arrived(checkpoint, early) == [False] * 4
    early.fetch(driver, [whole(checkpoint)], EVERYTHING)
    early.close()
    assert not driver.reserved and len(driver.told) == 3, "nothing after that"


def test_what_takes_the_driver_long_is_done_before_it_copies_or_at_the_end(
    checkpoint: Checkpoint, early: EarlyFetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would hold up copies, which are told with Python's lock held."""
    told: list[str] = []
    driver = StandIn()

    def noted(name: str, does: Callable[..., int], *args: int) -> int:
        told.append(name)
        return does(*args)

    for name in ("reserve", "buffer", "stream", "copy", "end", "release", "drop"):
        monkeypatch.setattr(driver, name, partial(noted, name, getattr(driver, name)))
    with_readers(2, monkeypatch)
    early.fetch(driver, [whole(checkpoint)], EVERYTHING)
    early.close()
    assert told == ["reserve", "buffer", *["stream"] * 2, *["copy"] * 3, *["end"] * 2, "release", "drop"]


def test_python_s_lock_changes_hands_soon_while_anything_is_fetched(checkpoint: Checkpoint, early: EarlyFetch) -> None:
    usual, may_go_on = sys.getswitchinterval(), threading.Semaphore(0)
    driver = StandIn(may_go_on=may_go_on)
    fetching, _ = begun(early, driver, checkpoint)
    while not any(thread.name == "early fetch" for thread in threading.enumerate()):
        fetching.join(0.01)
    assert sys.getswitchinterval() == pytest.approx(early_fetch.TURN) != usual
    for _ in range(10):
        may_go_on.release()
    fetching.join(20)
    assert sys.getswitchinterval() == usual


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_imports_come_first(checkpoint: Checkpoint, early: EarlyFetch, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    driver = StandIn()

    def copy(*args: int) -> bool:
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return type(driver).copy(driver, *args)

    monkeypatch.setattr(driver, "copy", copy)
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    early.fetch(driver, [whole(checkpoint)], EVERYTHING)
    assert len(found) == 3 and all(each == min(usual + early_fetch.NICE, 19) for each in found)
    assert os.getpriority(os.PRIO_PROCESS, 0) == usual


@pytest.mark.parametrize("wait", [False, True])
def test_closing_in_the_middle_ends_it(
    checkpoint: Checkpoint, early: EarlyFetch, monkeypatch: pytest.MonkeyPatch, wait: bool
) -> None:
    """At once, or when all is given back; nobody waits for what will not come."""
    with_readers(1, monkeypatch)
    may_go_on = threading.Semaphore(1)
    driver = StandIn(may_go_on=may_go_on)
    fetching = threading.Thread(target=early.fetch, args=(driver, [whole(checkpoint)], EVERYTHING))
    fetching.start()
    while not driver.copied:
        fetching.join(0.01)
    closing = threading.Thread(target=early.close, kwargs={"wait": wait})
    closing.start()
    closing.join(0.3)
    assert closing.is_alive() == wait and driver.reserved
    assert arrived(checkpoint, early) == [False] * 4
    for _ in range(10):
        may_go_on.release()
    closing.join(20)
    fetching.join(20)
    assert not driver.reserved and not driver.buffers and len(driver.copied) <= 2
    assert driver.told == ["settle", "release", "drop"]


def test_threads_that_cannot_be_had_are_done_without(
    checkpoint: Checkpoint, early: EarlyFetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One does all; without any, nobody waits for it."""
    start, left = threading.Thread.start, iter([True, False])

    def refused(thread: threading.Thread) -> None:
        if thread.name == "early fetch" and not next(left, False):
            raise RuntimeError("can't start new thread")
        start(thread)

    none = EarlyFetch()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        early.fetch(StandIn(), [whole(checkpoint)], EVERYTHING)
        none.fetch(StandIn(), [whole(checkpoint)], EVERYTHING)
    assert arrived(checkpoint, early) == [True] * 4
    assert arrived(checkpoint, none) == [False] * 4
    none.close()


def test_a_piece_is_waited_for_that_comes_after_another_was_refused(
    checkpoint: Checkpoint, early: EarlyFetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_readers(1, monkeypatch)
    may_go_on, driver = threading.Semaphore(0), StandIn()
    copy = driver.copy

    def second_refused(target: int, source: int, nbytes: int, stream: int) -> bool:
        assert may_go_on.acquire(timeout=20)
        asked.append(target)
        return len(asked) != 2 and copy(target, source, nbytes, stream)

    asked: list[int] = []
    monkeypatch.setattr(driver, "copy", second_refused)
    fetching, file = begun(early, driver, checkpoint)
    places: dict[str, int | None] = {}
    end = whole(checkpoint).end
    waiting = [
        threading.Thread(
            target=lambda name=name, start=start: places.update({name: early.place(file, start, start + 9)})
        )
        for name, start in (("second", PIECE), ("last", end - 9))
    ]
    for each in waiting:
        each.start()
    for _ in range(9):
        may_go_on.release()
    for each in (*waiting, fetching):
        each.join(20)
    assert places == {"second": None, "last": end - 9}


def test_a_piece_is_used_before_the_last_is_there(
    checkpoint: Checkpoint, early: EarlyFetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_readers(1, monkeypatch)
    may_go_on = threading.Semaphore(0)
    driver = StandIn(may_go_on=may_go_on)
    fetching, file = begun(early, driver, checkpoint)
    places: list[int | None] = []
    waiting = threading.Thread(target=lambda: places.append(early.place(file, 0, 9)))
    waiting.start()
    waiting.join(0.1)
    may_go_on.release()
    waiting.join(20)
    assert places == [0] and fetching.is_alive()
    for _ in range(9):
        may_go_on.release()
    fetching.join(20)


def test_once_a_load_begins_no_fetch_does(checkpoint: Checkpoint, early: EarlyFetch) -> None:
    early.stand()
    early.fetch(driver := StandIn(), [whole(checkpoint)], EVERYTHING)
    assert not driver.reserved and not early.nbytes


def test_it_happens_once(checkpoint: Checkpoint, early: EarlyFetch) -> None:
    driver = StandIn()
    for _ in range(2):
        early.fetch(driver, [whole(checkpoint)], EVERYTHING)
    assert len(driver.reserved) == 1 and sum(driver.copied) == whole(checkpoint).end


def test_another_file_in_its_place_is_not_taken_for_it(checkpoint: Checkpoint, early: EarlyFetch) -> None:
    """Of the same size too, and whichever of them is mapped by then."""
    tensors = {name: torch.zeros_like(checkpoint.tensor(name)) for name in "abc"}
    other = checkpoint.path.with_name("other")
    save_file(tensors, other)
    assert other.stat().st_size == whole(checkpoint).end
    os.utime(other, ns=(1, 1))  # clocks of file systems tick slowly
    other.replace(checkpoint.path)
    early.fetch(StandIn(), [whole(checkpoint)], EVERYTHING)
    assert arrived(checkpoint, early) == [False] * 4, "the first is mapped"
    later = open_checkpoint(checkpoint.path)
    assert arrived(later, early) == [True] * 4
    save_file({"a": torch.zeros(7)}, other)
    other.replace(checkpoint.path)
    assert file_of(early, checkpoint.path) is None
    assert not staging(open_checkpoint(checkpoint.path), early).fetches


def test_a_file_that_is_touched_once_it_is_mapped_is_the_same(checkpoint: Checkpoint, early: EarlyFetch) -> None:
    """As files of the cache are, which tells by it when they were used."""
    early.fetch(StandIn(), [whole(checkpoint)], EVERYTHING)
    checkpoint.tensor("a")
    os.utime(checkpoint.path)
    assert staging(checkpoint, early).fetches and arrived(checkpoint, early) == [True] * 4


def test_memory_of_ones_own_is_not_taken_for_a_file(checkpoint: Checkpoint, early: EarlyFetch) -> None:
    early.fetch(StandIn(), [whole(checkpoint)], EVERYTHING)
    assert staging(checkpoint, early)._fetched(checkpoint.tensor("c").clone()) is None


def test_it_counts_as_free(monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint, early: EarlyFetch) -> None:
    """A plan that is made meanwhile is the one that would be made without it."""
    driver = StandIn(free=10 * PIECE)
    monkeypatch.setattr(devices, "early_fetch", lambda: early)
    monkeypatch.setattr(devices, "available_memory", lambda device: driver.free())
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="x", total_memory=11 * PIECE)
    )
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: {})
    cuda = torch.device("cuda")
    free = [devices.card_of(cuda).free]
    early.fetch(driver, [whole(checkpoint)], EVERYTHING)
    assert driver.free() == 10 * PIECE - whole(checkpoint).end
    free.append(devices.card_of(cuda).free)
    early.close()
    assert [*free, devices.card_of(cuda).free] == [10 * PIECE] * 3


def test_nothing_is_taken_while_memory_is_measured(checkpoint: Checkpoint, early: EarlyFetch) -> None:
    driver = StandIn()
    with early.held(0) as held:
        fetching = threading.Thread(target=early.fetch, args=(driver, [whole(checkpoint)], EVERYTHING))
        fetching.start()
        fetching.join(0.2)
        assert held == 0 and fetching.is_alive() and not driver.reserved
    fetching.join(20)
    assert driver.reserved


@pytest.mark.parametrize(
    ("settings", "free", "host", "taken"),
    [
        ({}, EVERYTHING, EVERYTHING, "all"),
        ({"vram_limit": 2.5}, EVERYTHING, EVERYTHING, "all"),
        ({"vram_limit": 1.9}, EVERYTHING, EVERYTHING, "nothing"),
        ({}, 2 * GIB + 200_000, EVERYTHING, "some"),
        ({}, 2 * GIB, EVERYTHING, "nothing"),
        ({}, EVERYTHING, 2 * PIECE, "nothing"),
        ({"vram_state": "LOW_VRAM"}, EVERYTHING, EVERYTHING, "nothing"),
        ({"vram_state": "NO_VRAM"}, EVERYTHING, EVERYTHING, "nothing"),
        ({"pinned_memory": False}, EVERYTHING, EVERYTHING, "nothing"),
    ],
    ids=str,
)
def test_it_is_fetched_as_far_as_there_is_room_for_it_beside_the_model(
    checkpoint: Checkpoint, early: EarlyFetch, monkeypatch: pytest.MonkeyPatch,
    settings: dict, free: int, host: int, taken: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(head_start, "early_fetch", lambda: early)
    monkeypatch.setattr(head_start, "host_available", lambda: host)
    span = whole(checkpoint)
    head_start._fetch(Config(**settings), StandIn(free=free), [span])
    some = min(free, EVERYTHING) - span.end - 2 * GIB
    assert early.fetched == {"all": span.end, "some": some, "nothing": 0}[taken]
    arrived(checkpoint, early)
    head_start.end()
    assert not early.nbytes


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, early: EarlyFetch) -> EarlyFetch:
    """It is the process's own, and a CPU that is loaded to is taken for its GPU."""
    monkeypatch.setattr(head_start, "early_fetch", lambda: early)
    monkeypatch.setattr(head_start, "stand", lambda device: None)
    return early


def engine_in(folder: Path) -> LightweightEngine:
    (folder / "m").mkdir()
    return LightweightEngine(Config(models_dir=folder / "m", cache_dir=folder, device="cpu", offline=True))


@pytest.mark.parametrize("fails", [False, True])
def test_a_start_ends_with_its_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, checkpoint: Checkpoint, started: EarlyFetch, fails: bool
) -> None:
    """Nothing stays taken where no model can be had: a service goes on without one."""
    started.fetch(driver := StandIn(), [whole(checkpoint)], EVERYTHING)
    if fails:
        monkeypatch.setattr(Networks, "load_all", lambda *_: (_ for _ in ()).throw(OSError("gone")))
        with pytest.raises(OSError, match="gone"):
            engine_in(tmp_path).setup()
    else:
        engine_in(tmp_path).setup()
    assert not driver.reserved and not started.nbytes


@pytest.mark.parametrize("fetched", [False, True])
@pytest.mark.parametrize("where", ["assemble", "load_all"])
def test_it_is_given_up_where_memory_runs_out_beside_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, checkpoint: Checkpoint, started: EarlyFetch,
    where: str, fetched: bool,
) -> None:  # fmt: skip
    driver = StandIn()
    if fetched:
        started.fetch(driver, [whole(checkpoint)], EVERYTHING)
    owner: Any = {"assemble": current_model, "load_all": Networks}[where]
    real, tried = getattr(owner, where), []

    def runs_out(*given: Any, **named: Any) -> Any:
        tried.append(bool(driver.reserved))
        if driver.reserved or not fetched:
            raise MemoryError
        return real(*given, **named)

    monkeypatch.setattr(owner, where, runs_out)
    engine = engine_in(tmp_path)
    if fetched:
        engine.setup()
        assert tried == [True, False] and len(engine.notes) == len(set(engine.notes))
    else:
        with pytest.raises(MemoryBudgetError):
            engine.setup()
        assert tried == [False]


def test_nothing_stays_on_a_gpu_that_is_not_loaded_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, checkpoint: Checkpoint, early: EarlyFetch
) -> None:
    """As where torch has no CUDA, and the host a driver."""
    early.fetch(driver := StandIn(), [whole(checkpoint)], EVERYTHING)
    monkeypatch.setattr(head_start, "early_fetch", lambda: early)
    for device, held in (("cuda", True), ("cpu", False)):
        head_start.stand(device)
        assert bool(driver.reserved) == held
    with early.held(0) as nbytes:
        assert nbytes == 0


def test_it_counts_for_its_own_gpu(checkpoint: Checkpoint, early: EarlyFetch) -> None:
    early.fetch(StandIn(), [whole(checkpoint)], EVERYTHING)
    for index, held in ((0, whole(checkpoint).end), (1, 0)):
        with early.held(index) as nbytes:
            assert nbytes == held


def test_all_of_a_model_is_found_by_what_loads_it(started: EarlyFetch) -> None:
    """What a start asks for is what is asked of it, tensor by tensor."""
    config = Config(models_dir=TINY, offline=True)
    head_start._fetch(config, StandIn(), head_start.spans(config))
    for part in choose_models(config, []).parts.values():
        way = staging(part.checkpoint, started)
        assert way.fetches
        for source in part.sources.values():
            for key in (key for stored, _ in source.pieces for key in stored.keys):
                tensor = part.checkpoint.tensor(key)
                found = way._fetched(tensor)
                assert found is not None and found.dtype == tensor.dtype and found.shape == tensor.shape
                assert torch.equal(found.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))
