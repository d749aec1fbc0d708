"""What is page-locked is what the file has, waited for where it is about to be, and let go of again, whatever fails."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightweight_engine import Config
from lightweight_engine.backend import page_locked
from lightweight_engine.backend.checkpoint import Checkpoint, open_checkpoint
from lightweight_engine.backend.page_locked import PageLocked
from lightweight_engine.backend.read_ahead import Span
from lightweight_engine.backend.staging import Staging
from lightweight_engine.core import head_start

PIECE = 1 << 16
EVERYTHING = 1 << 40

pytestmark = pytest.mark.skipif(not page_locked.can_lock(), reason="files are not mapped so on this system")


class StandIn:
    """A driver that notes what it is asked for.

    Args:
        most: pieces that it locks before it refuses.
        free: bytes of its GPU.
        may_go_on: waited for before each piece.
    """

    def __init__(
        self, most: int = 1 << 20, free: int = EVERYTHING, may_go_on: threading.Semaphore | None = None
    ) -> None:
        self.most, self.bytes_free, self.may_go_on = most, free, may_go_on
        self.locked: dict[int, int] = {}
        self.count = 0

    def enter(self) -> bool:
        return True

    def lock(self, address: int, nbytes: int) -> bool:
        if self.may_go_on is not None:
            assert self.may_go_on.acquire(timeout=20)
        self.count += 1
        if self.count > self.most:
            return False
        self.locked[address] = nbytes
        return True

    def unlock(self, address: int) -> None:
        del self.locked[address]  # an error where it is not locked

    def free(self) -> int:
        return self.bytes_free


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_locked, "PIECE", PIECE)


@pytest.fixture(autouse=True)
def all_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
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
    close(made)


def close(locked: PageLocked) -> None:
    if (thread := locked.close()) is not None:
        thread.join(20)
        assert not thread.is_alive()


def whole(checkpoint: Checkpoint) -> Span:
    return Span(checkpoint.path, 0, checkpoint.path.stat().st_size)


def fetched(checkpoint: Checkpoint, locked: PageLocked, tensor: Tensor) -> Tensor | None:
    """What a device would fetch from page-locked memory for a tensor."""
    staging = Staging(torch.device("cuda"), pinned=True, checkpoint=checkpoint, locked=locked)
    found = staging._fetched(tensor)
    if found is None:
        return None
    made = torch.zeros(tensor.nbytes, dtype=torch.uint8)
    for start, piece in found:
        made[start : start + len(piece)] = piece
    return made.view(tensor.dtype).view(tensor.shape)


def test_the_bytes_are_those_of_the_file(checkpoint: Checkpoint, locked: PageLocked) -> None:
    driver = StandIn()
    locked.lock(driver, [whole(checkpoint)], EVERYTHING)
    assert sum(driver.locked.values()) == whole(checkpoint).end
    for name in "abc":
        tensor = checkpoint.tensor(name)
        found = fetched(checkpoint, locked, tensor)
        assert found is not None and torch.equal(found, tensor)
    rows = checkpoint.tensor("c")[7:200]
    found = fetched(checkpoint, locked, rows)
    assert found is not None and torch.equal(found, rows)


def test_what_is_fetched_has_its_shape_and_goes_to_its_place(checkpoint: Checkpoint, locked: PageLocked) -> None:
    """With the CPU in place of a device."""
    locked.lock(StandIn(), [whole(checkpoint)], EVERYTHING)
    staging = Staging(torch.device("cuda"), pinned=True, checkpoint=checkpoint, locked=locked)
    staging._device = torch.device("cpu")
    for name in "abc":
        tensor = checkpoint.tensor(name)
        made, into = staging.bring(tensor), torch.zeros_like(tensor)
        assert made.dtype == tensor.dtype and torch.equal(made, tensor) and not checkpoint.holds(made)
        assert staging.bring(tensor, into) is into and torch.equal(into, tensor)


def test_no_copy_goes_over_a_seam(checkpoint: Checkpoint, locked: PageLocked) -> None:
    """Pieces are locked one by one, and a device refuses a copy that leaves the one in which it begins."""
    locked.lock(StandIn(), [whole(checkpoint)], EVERYTHING)
    file = locked.file(checkpoint.path)
    assert file is not None and file.is_whole
    assert list(file.cuts(5, 2 * PIECE + 1)) == [(5, PIECE), (PIECE, 2 * PIECE), (2 * PIECE, 2 * PIECE + 1)]
    assert list(file.cuts(PIECE, 2 * PIECE)) == [(PIECE, 2 * PIECE)] and list(file.cuts(3, 3)) == []


def test_what_the_driver_refuses_goes_another_way(checkpoint: Checkpoint, locked: PageLocked) -> None:
    driver = StandIn(most=1)
    locked.lock(driver, [whole(checkpoint)], EVERYTHING)
    held = [fetched(checkpoint, locked, checkpoint.tensor(name)) is not None for name in "abc"]
    assert len(driver.locked) == 1 and False in held
    assert not Staging(torch.device("cuda"), pinned=True, checkpoint=checkpoint, locked=locked).fetches
    close(locked)
    assert not driver.locked


def test_no_more_is_locked_than_the_limit(checkpoint: Checkpoint, locked: PageLocked) -> None:
    driver = StandIn()
    locked.lock(driver, [whole(checkpoint)], 2 * PIECE)
    assert sum(driver.locked.values()) == locked.nbytes == 2 * PIECE


def test_what_is_on_a_disk_is_left_there(
    checkpoint: Checkpoint, locked: PageLocked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_locked, "lies_in_memory", lambda path: False)
    monkeypatch.setattr(page_locked, "is_cached", lambda file, start: start >= PIECE)
    driver = StandIn()
    locked.lock(driver, [whole(checkpoint)], EVERYTHING)
    assert sum(driver.locked.values()) == whole(checkpoint).end - PIECE


def test_what_is_about_to_be_locked_is_waited_for(checkpoint: Checkpoint, locked: PageLocked) -> None:
    may_go_on = threading.Semaphore(0)
    driver = StandIn(may_go_on=may_go_on)
    locking = threading.Thread(target=locked.lock, args=(driver, [whole(checkpoint)], EVERYTHING))
    locking.start()
    while locked.file(checkpoint.path) is None or not locked.file(checkpoint.path).is_whole:  # type: ignore[union-attr]
        locking.join(0.01)
    made: list[Tensor | None] = []
    waiting = threading.Thread(target=lambda: made.append(fetched(checkpoint, locked, checkpoint.tensor("c"))))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive() and not made
    for _ in range(10):
        may_go_on.release()
    waiting.join(20)
    locking.join(20)
    assert made[0] is not None and torch.equal(made[0], checkpoint.tensor("c"))


def test_closing_in_the_middle_lets_go_of_all(checkpoint: Checkpoint, locked: PageLocked) -> None:
    may_go_on = threading.Semaphore(1)
    driver = StandIn(may_go_on=may_go_on)
    locking = threading.Thread(target=locked.lock, args=(driver, [whole(checkpoint)], EVERYTHING))
    locking.start()
    while not driver.locked:
        locking.join(0.01)
    thread = locked.close()
    assert fetched(checkpoint, locked, checkpoint.tensor("c")) is None
    may_go_on.release()
    assert thread is not None
    thread.join(20)
    locking.join(20)
    assert not driver.locked and driver.count <= 2
    locked.lock(driver, [whole(checkpoint)], EVERYTHING)
    assert not driver.locked, "nothing after that"


def test_another_file_in_its_place_is_not_taken_for_it(checkpoint: Checkpoint, locked: PageLocked) -> None:
    locked.lock(StandIn(), [whole(checkpoint)], EVERYTHING)
    other = checkpoint.path.with_name("other")
    save_file({"a": torch.zeros(7)}, other)
    other.replace(checkpoint.path)
    assert locked.file(checkpoint.path) is None
    assert fetched(open_checkpoint(checkpoint.path), locked, torch.zeros(7)) is None


def test_memory_of_ones_own_is_not_taken_for_a_file(checkpoint: Checkpoint, locked: PageLocked) -> None:
    locked.lock(StandIn(), [whole(checkpoint)], EVERYTHING)
    assert fetched(checkpoint, locked, checkpoint.tensor("c").clone()) is None


@pytest.mark.parametrize(
    ("settings", "free"),
    [
        ({"vram_state": "LOW_VRAM"}, EVERYTHING),
        ({"vram_state": "NO_VRAM"}, EVERYTHING),
        ({"pinned_memory": False}, EVERYTHING),
        ({"vram_limit": 1e-6}, EVERYTHING),
        ({}, 100),
    ],
    ids=str,
)
def test_nothing_is_locked_that_does_not_stay_on_the_gpu(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, settings: dict, free: int
) -> None:
    monkeypatch.setattr(head_start, "page_locked", PageLocked)
    spared, driver = StandIn(free=free), StandIn()
    head_start._lock(Config(**settings), spared, [whole(checkpoint)])
    head_start._lock(Config(), driver, [whole(checkpoint)])
    assert not spared.locked and driver.locked
