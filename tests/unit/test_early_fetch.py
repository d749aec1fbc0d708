"""What a GPU fetched before torch was there is what the file has, counts as free, and is given back, whatever fails."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from drivers import EVERYTHING, StandIn
from safetensors.torch import save_file
from torch import Tensor

from lightweight_engine import Config, LightweightEngine
from lightweight_engine.backend import devices, early_fetch
from lightweight_engine.backend.checkpoint import Checkpoint, open_checkpoint
from lightweight_engine.backend.early_fetch import ALIGNED, EarlyFetch
from lightweight_engine.backend.read_ahead import Span
from lightweight_engine.backend.staging import Staging
from lightweight_engine.core import head_start
from lightweight_engine.core import networks as networks_module
from lightweight_engine.core.networks import Networks
from lightweight_engine.errors import MemoryBudgetError

PIECE = 1 << 16
GIB = 1 << 30

pytestmark = pytest.mark.skipif(not early_fetch.can_fetch(), reason="files are not read so on this system")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early_fetch, "PIECE", PIECE)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """Tensors that begin and end anywhere in the pieces, one over several; in the file ``b`` is the last."""
    torch.manual_seed(0)
    tensors = {"a": torch.randn(101), "b": torch.randn(3, 5).half(), "c": torch.randn(301, 251).bfloat16()}
    save_file(tensors, tmp_path / "x.safetensors")
    return open_checkpoint(tmp_path / "x.safetensors")


@pytest.fixture
def early() -> Iterator[EarlyFetch]:
    made = EarlyFetch()
    yield made
    made.close()


def whole(checkpoint: Checkpoint) -> Span:
    return Span(checkpoint.path, 0, checkpoint.path.stat().st_size)


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
    return [bool(way._files) and way._fetched(tensor) is not None for tensor in three(checkpoint)]


def test_all_is_copied_from_the_gpu(checkpoint: Checkpoint, early: EarlyFetch) -> None:
    driver = StandIn()
    early.fetch(driver, [whole(checkpoint)], EVERYTHING)
    assert sum(driver.copied) == early.fetched == early.nbytes == whole(checkpoint).end
    assert len(driver.copied) == 3 and not driver.streams and not driver.buffers
    assert staging(checkpoint, early).fetches and arrived(checkpoint, early) == [True] * 4


def test_words_stay_whole(checkpoint: Checkpoint, early: EarlyFetch, tmp_path: Path) -> None:
    """Places on the GPU differ from those in files by a multiple: a copy within it is of whole words."""
    (tmp_path / "y").write_bytes(bytes(range(1, 256)) * 9)
    spans = [Span(tmp_path / "y", 3, 700), Span(tmp_path / "y", 1001, 1009), whole(checkpoint)]
    driver = StandIn()
    early.fetch(driver, spans, EVERYTHING)
    for span in spans:
        file = early.file(span.path)
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
    monkeypatch.setattr(early_fetch, "READERS", 1)  # pieces in order: the first of them is not refused
    driver = StandIn(refuses=refuses)
    early.fetch(driver, [whole(checkpoint)], EVERYTHING)
    assert arrived(checkpoint, early) == [refuses == "copy", False, False, False]
    assert not driver.streams and not driver.buffers


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
    fetching = threading.Thread(target=early.fetch, args=(driver, [whole(checkpoint)], EVERYTHING))
    fetching.start()
    while early.file(checkpoint.path) is None:
        fetching.join(0.01)
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
    assert driver.told == ["settle", "release"] and not driver.reserved and not early.nbytes
    assert arrived(checkpoint, early) == [False] * 4
    early.fetch(driver, [whole(checkpoint)], EVERYTHING)
    early.close()
    assert not driver.reserved and len(driver.told) == 2, "nothing after that"


def test_closing_in_the_middle_ends_it(
    checkpoint: Checkpoint, early: EarlyFetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(early_fetch, "READERS", 1)
    may_go_on = threading.Semaphore(1)
    driver = StandIn(may_go_on=may_go_on)
    fetching = threading.Thread(target=early.fetch, args=(driver, [whole(checkpoint)], EVERYTHING))
    fetching.start()
    while not driver.copied:
        fetching.join(0.01)
    closing = threading.Thread(target=early.close)
    closing.start()
    while not early._closed:
        closing.join(0.01)
    assert arrived(checkpoint, early) == [False] * 4, "nobody waits for what will not come"
    for _ in range(10):
        may_go_on.release()
    closing.join(20)
    fetching.join(20)
    assert not driver.reserved and not driver.buffers and len(driver.copied) <= 2


def test_another_file_in_its_place_is_not_taken_for_it(checkpoint: Checkpoint, early: EarlyFetch) -> None:
    early.fetch(StandIn(), [whole(checkpoint)], EVERYTHING)
    other = checkpoint.path.with_name("other")
    save_file({"a": torch.zeros(7)}, other)
    other.replace(checkpoint.path)
    assert early.file(checkpoint.path) is None
    assert not staging(open_checkpoint(checkpoint.path), early)._files


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
    with early.held() as held:
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


@pytest.mark.parametrize("fails", [False, True])
def test_a_start_ends_with_its_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fails: bool) -> None:
    """Nothing stays taken where no model can be had: a service goes on without one."""
    ended: list[bool] = []
    monkeypatch.setattr(head_start, "end", lambda: ended.append(True))
    engine = LightweightEngine(Config(models_dir=tmp_path, cache_dir=tmp_path, device="cpu", offline=True))
    if fails:
        monkeypatch.setattr(Networks, "load_all", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryBudgetError):
            engine.setup()
    else:
        engine.setup()
        engine.setup()
    assert ended == [True]


@pytest.mark.parametrize("room", [0, EVERYTHING])
def test_it_is_given_up_where_what_is_loaded_has_no_room_beside_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, checkpoint: Checkpoint, early: EarlyFetch, room: int
) -> None:
    (tmp_path / "m").mkdir()
    early.fetch(driver := StandIn(), [whole(checkpoint)], EVERYTHING)
    held: list[bool] = []
    load = Networks.load
    monkeypatch.setattr(networks_module, "early_fetch", lambda: early)
    monkeypatch.setattr(networks_module, "available_memory", lambda device: room)
    monkeypatch.setattr(Networks, "load", lambda self, role: (held.append(bool(driver.reserved)), load(self, role))[1])
    LightweightEngine(Config(models_dir=tmp_path / "m", cache_dir=tmp_path, device="cpu", offline=True)).setup()
    assert held and all(each == (room > 0) for each in held)
