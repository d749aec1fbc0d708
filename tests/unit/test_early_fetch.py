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

from lightweight_engine import Config, LightweightEngine
from lightweight_engine.backend import devices, page_locked
from lightweight_engine.backend.checkpoint import Checkpoint, open_checkpoint
from lightweight_engine.backend.early_fetch import EarlyFetch
from lightweight_engine.backend.page_locked import PageLocked
from lightweight_engine.backend.read_ahead import Span
from lightweight_engine.backend.staging import Staging
from lightweight_engine.core import head_start
from lightweight_engine.core import networks as networks_module
from lightweight_engine.core.networks import Networks
from lightweight_engine.errors import MemoryBudgetError

PIECE = 1 << 16
GIB = 1 << 30
HOST = torch.device("cpu")

pytestmark = pytest.mark.skipif(not page_locked.can_lock(), reason="files are not mapped so on this system")


@pytest.fixture(autouse=True)
def small_pieces_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_locked, "PIECE", PIECE)
    monkeypatch.setattr(page_locked, "lies_in_memory", lambda path: True)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """Tensors that begin and end anywhere in the pieces, the last of them over several."""
    torch.manual_seed(0)
    tensors = {"a": torch.randn(101), "b": torch.randn(3, 5).half(), "c": torch.randn(301, 251).bfloat16()}
    save_file(tensors, tmp_path / "x.safetensors")
    return open_checkpoint(tmp_path / "x.safetensors")


@pytest.fixture
def locked() -> Iterator[PageLocked]:
    made = PageLocked()
    yield made
    if (thread := made.close()) is not None:
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture
def early() -> EarlyFetch:
    return EarlyFetch()


def whole(checkpoint: Checkpoint) -> Span:
    return Span(checkpoint.path, 0, checkpoint.path.stat().st_size)


def staging(checkpoint: Checkpoint, locked: PageLocked, early: EarlyFetch) -> Staging:
    """A way to a device, with the memory of this process in place of it."""
    made = Staging(torch.device("cuda"), pinned=True, checkpoint=checkpoint, locked=locked, early=early)
    made._device = HOST
    assert made._arrived is not None
    made._arrived._device = HOST
    return made


def check(checkpoint: Checkpoint, way: Staging) -> None:
    """All tensors arrive as they are, new or where they are to be."""
    for tensor in (*map(checkpoint.tensor, "abc"), checkpoint.tensor("c")[7:200]):
        made, into = way.bring(tensor), torch.zeros_like(tensor)
        assert made.dtype == tensor.dtype and torch.equal(made, tensor)
        assert way.bring(tensor, into) is into and torch.equal(into, tensor)


def from_gpu(driver: StandIn, checkpoint: Checkpoint, way: Staging) -> list[bool]:
    """Of each piece of the largest tensor, whether it is copied from the GPU's memory."""
    found = way._fetched(checkpoint.tensor("c"))
    assert found is not None
    return [driver.holds(piece.data_ptr(), piece.nbytes) for _, piece in found]


def test_all_is_copied_from_the_gpu(checkpoint: Checkpoint, locked: PageLocked, early: EarlyFetch) -> None:
    driver = StandIn()
    locked.lock(driver, [whole(checkpoint)], EVERYTHING, early)
    assert early.fetched == early.nbytes == locked.nbytes == whole(checkpoint).end
    way = staging(checkpoint, locked, early)
    assert way.fetches and from_gpu(driver, checkpoint, way) == [True, True, True]
    check(checkpoint, way)


@pytest.mark.parametrize(
    ("driver", "there"),
    [
        (StandIn(refuses="reserve"), [False] * 3),
        (StandIn(refuses="stream"), [False] * 3),
        (StandIn(refuses="fetch"), [True, False, False]),
    ],
    ids=lambda given: getattr(given, "refuses", ""),
)
def test_what_the_driver_refuses_comes_from_the_file(
    checkpoint: Checkpoint, locked: PageLocked, early: EarlyFetch, driver: StandIn, there: list[bool]
) -> None:
    locked.lock(driver, [whole(checkpoint)], EVERYTHING, early)
    way = staging(checkpoint, locked, early)
    assert from_gpu(driver, checkpoint, way) == there
    check(checkpoint, way)


def test_what_is_not_locked_is_not_fetched(checkpoint: Checkpoint, locked: PageLocked, early: EarlyFetch) -> None:
    driver = StandIn(most=1)
    locked.lock(driver, [whole(checkpoint)], EVERYTHING, early)
    assert early.fetched == PIECE
    check(checkpoint, staging(checkpoint, locked, early))


def test_no_more_is_taken_of_the_gpu_than_is_locked(
    checkpoint: Checkpoint, locked: PageLocked, early: EarlyFetch
) -> None:
    locked.lock(StandIn(), [whole(checkpoint)], 2 * PIECE, early)
    assert early.nbytes == early.fetched == 2 * PIECE
    check(checkpoint, staging(checkpoint, locked, early))


def test_it_is_given_back_once_all_is_done(checkpoint: Checkpoint, locked: PageLocked, early: EarlyFetch) -> None:
    driver = StandIn()
    locked.lock(driver, [whole(checkpoint)], EVERYTHING, early)
    early.close()
    assert driver.told[-2:] == ["settle", "release"] and not driver.reserved and not early.nbytes
    way = staging(checkpoint, locked, early)
    assert from_gpu(driver, checkpoint, way) == [False] * 3
    check(checkpoint, way)
    early.open(driver, PIECE)
    early.fetch(next(iter(driver.locked)), PIECE)
    early.close()
    assert not driver.reserved and driver.told.count("release") == 1, "nothing after that"


def test_closing_in_the_middle_ends_it(checkpoint: Checkpoint, locked: PageLocked, early: EarlyFetch) -> None:
    may_go_on = threading.Semaphore(1)
    driver = StandIn(may_go_on=may_go_on)
    locking = threading.Thread(target=locked.lock, args=(driver, [whole(checkpoint)], EVERYTHING, early))
    locking.start()
    while not early.fetched:
        locking.join(0.01)
    early.close()
    assert not driver.reserved and driver.told == ["fetch", "settle", "release"]
    for _ in range(10):
        may_go_on.release()
    locking.join(20)
    assert driver.told.count("fetch") == 1
    check(checkpoint, staging(checkpoint, locked, early))


def test_files_are_unlocked_once_the_gpu_has_fetched_from_them(checkpoint: Checkpoint) -> None:
    locked, driver = PageLocked(), StandIn()
    locked.lock(driver, [whole(checkpoint)], EVERYTHING)
    thread = locked.close()
    assert thread is not None
    thread.join(20)
    assert driver.told[0] == "settle" and not driver.locked


def test_it_counts_as_free(monkeypatch: pytest.MonkeyPatch, early: EarlyFetch) -> None:
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
    early.open(driver, 3 * PIECE)
    assert driver.free() == 7 * PIECE
    free.append(devices.card_of(cuda).free)
    early.close()
    assert [*free, devices.card_of(cuda).free] == [10 * PIECE] * 3


def test_nothing_is_taken_while_memory_is_measured(early: EarlyFetch) -> None:
    driver = StandIn()
    with early.held() as held:
        opening = threading.Thread(target=early.open, args=(driver, PIECE))
        opening.start()
        opening.join(0.2)
        assert held == 0 and opening.is_alive() and not driver.reserved
    opening.join(20)
    assert driver.reserved
    early.close()


@pytest.mark.parametrize(
    ("settings", "free", "taken"),
    [
        ({}, EVERYTHING, True),
        ({}, 2 * GIB + 100_000, False),
        ({"vram_limit": 2.5}, EVERYTHING, True),
        ({"vram_limit": 1.9}, EVERYTHING, False),
    ],
    ids=str,
)
def test_it_is_fetched_early_where_there_is_room_for_it_twice(
    checkpoint: Checkpoint, locked: PageLocked, early: EarlyFetch, monkeypatch: pytest.MonkeyPatch,
    settings: dict, free: int, taken: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(head_start, "page_locked", lambda: locked)
    monkeypatch.setattr(head_start, "early_fetch", lambda: early)
    driver = StandIn(free=free)
    head_start._lock(Config(**settings), driver, [whole(checkpoint)])
    assert driver.locked and bool(driver.reserved) == taken
    check(checkpoint, staging(checkpoint, locked, early))
    head_start.end()
    assert not driver.reserved and not early.nbytes


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
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, early: EarlyFetch, room: int
) -> None:
    early.open(driver := StandIn(), PIECE)
    held: list[bool] = []
    load = Networks.load
    monkeypatch.setattr(networks_module, "early_fetch", lambda: early)
    monkeypatch.setattr(networks_module, "available_memory", lambda device: room)
    monkeypatch.setattr(Networks, "load", lambda self, role: (held.append(bool(driver.reserved)), load(self, role))[1])
    LightweightEngine(Config(models_dir=tmp_path, cache_dir=tmp_path, device="cpu", offline=True)).setup()
    assert held and all(each == (room > 0) for each in held)
    early.close()
