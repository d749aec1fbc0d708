"""Budgets of real and of planned cards, and which units of a network stay: arithmetic on bytes, on many sizes."""

from __future__ import annotations

import random
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch

from lightweight_engine.backend.devices import Card, card_of
from lightweight_engine.backend.host_memory import GIB, MIB
from lightweight_engine.backend.memory_manager import (
    MARGIN,
    MARGIN_SHARE,
    PRESETS,
    SLOTS,
    MemoryManager,
    Residency,
    place,
    spread,
)

CARD = Card("RTX 4090", "cuda", 24 * GIB, 23 * GIB)


def usable(taken: int) -> int:
    return taken - int(MARGIN_SHARE * taken) - MARGIN


# --- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", PRESETS)
def test_a_budget_is_what_is_free_less_the_margin(state: str) -> None:
    budget = MemoryManager(CARD, state).budget()  # type: ignore[arg-type]
    assert budget.total == usable(int(0.95 * CARD.total))  # less than the 23 GiB that are free
    assert budget.preset is PRESETS[state]
    assert budget.weights == int(18 * GIB * PRESETS[state].weights)


def test_states_differ_as_they_are_described() -> None:
    assert {name for name, preset in PRESETS.items() if preset.keep} == {"HIGH_VRAM", "SHARED", "NORMAL_VRAM"}
    assert {name for name, preset in PRESETS.items() if preset.drop_modulation} == {
        "NORMAL_VRAM",
        "LOW_VRAM",
        "NO_VRAM",
    }
    assert {name for name, preset in PRESETS.items() if preset.stream_text} == {"LOW_VRAM", "NO_VRAM"}
    assert {name for name, preset in PRESETS.items() if preset.weights == 0} == {"NO_VRAM"}
    assert PRESETS["SHARED"] == PRESETS["HIGH_VRAM"]


def test_what_others_hold_is_not_taken() -> None:
    busy = replace(CARD, free=5 * GIB)
    assert MemoryManager(busy).budget().total == usable(5 * GIB)
    assert MemoryManager(busy).budget(held=6 * GIB).total == usable(11 * GIB)
    assert MemoryManager(busy).budget(held=30 * GIB).total == usable(int(0.95 * 24 * GIB)), "never over the fraction"


@pytest.mark.parametrize(("fraction", "taken"), [(0.5, 12 * GIB), (0.95, int(0.95 * 24 * GIB)), (1.0, 23 * GIB)])
def test_the_fraction_of_a_card_that_may_be_taken(fraction: float, taken: int) -> None:
    assert MemoryManager(CARD, fraction=fraction).budget().total == usable(taken)


@pytest.mark.parametrize("reserve", [0.0, 0.25, 0.9])
def test_the_reserve_is_of_weights_alone(reserve: float) -> None:
    budget = MemoryManager(CARD, reserve=reserve).budget()
    assert budget.total == usable(int(0.95 * CARD.total))
    assert budget.weights == min(budget.total, int(CARD.total * (1 - reserve)))


def test_a_limit_is_kept_to_the_byte_and_raises_nothing() -> None:
    """The margin is for what others take; below a limit they have the rest of the card."""
    free = MemoryManager(CARD).budget()
    assert MemoryManager(CARD, limit=8 * GIB).budget().total == 8 * GIB
    assert MemoryManager(CARD, limit=8 * GIB).budget().weights == 8 * GIB
    assert MemoryManager(CARD, limit=24 * GIB).budget() == free, "a limit that limits nothing leaves the margin"
    assert MemoryManager(replace(CARD, free=GIB), limit=8 * GIB).budget().total == usable(GIB)


@pytest.mark.parametrize("free", [0, MIB, 256 * MIB])
def test_a_full_card_has_no_budget_and_not_a_negative_one(free: int) -> None:
    budget = MemoryManager(replace(CARD, free=free)).budget()
    assert (budget.total, budget.weights) == (0, 0)


def test_a_planned_card_is_taken_at_its_word_and_a_real_one_is_read_anew() -> None:
    real = card_of(torch.device("cpu"))
    planned = replace(real, free=1 * GIB, device=None)
    assert MemoryManager(planned).budget().total == usable(1 * GIB)
    stale = replace(real, free=0)
    assert MemoryManager(stale).budget().total > 0, "what was free when the card was first looked at is old news"


# --- which units stay ------------------------------------------------------------------------------------------------


def cases(count: int = 300) -> list[tuple[list[int], int, int, int]]:
    """(units, fixed, room, slots) of networks like Flux's: two sizes of blocks, or any; room from none to plenty."""
    draw = random.Random(0)
    made = []
    for _ in range(count):
        large, small = draw.randint(0, 20), draw.randint(0, 40)
        units = [648] * large + [270] * small if draw.random() < 0.5 else [draw.randint(1, 700) for _ in range(small)]
        fixed = draw.randint(0, 500)
        made.append((units, fixed, draw.randint(0, fixed + sum(units) + 100), draw.choice([1, 2, 3])))
    return made


CASES = cases()


def on_device(units: list[int], fixed: int, streamed: tuple[int, ...], slots: int) -> int:
    """Bytes on the device, counted from the description alone."""
    through = [units[i] for i in streamed]
    resident = sum(nbytes for i, nbytes in enumerate(units) if i not in streamed)
    return fixed + resident + min(slots, len(through)) * max(through, default=0)


def test_bytes_add_up() -> None:
    for units, fixed, room, slots in CASES:
        placed = place(units, fixed, room, slots=slots)
        through = sum(units[i] for i in placed.streamed)
        assert placed.fixed == fixed and placed.moved == through and placed.resident + through == sum(units)
        assert placed.nbytes == on_device(units, fixed, placed.streamed, slots)


def test_it_fits_wherever_anything_fits() -> None:
    for units, fixed, room, slots in CASES:
        placed = place(units, fixed, room, slots=slots)
        least = min(on_device(units, fixed, spread(len(units), n), slots) for n in range(len(units) + 1))
        assert placed.nbytes <= room or least > room
        if placed.nbytes > room:
            assert len(placed.streamed) == len(units), "what does not fit anyhow is asked for at its smallest"


def test_no_more_is_streamed_than_is_needed() -> None:
    for units, fixed, room, slots in CASES:
        placed = place(units, fixed, room, slots=slots)
        fewer = (spread(len(units), n) for n in range(len(placed.streamed)))
        assert all(on_device(units, fixed, streamed, slots) > room for streamed in fewer)


def test_more_room_never_streams_more() -> None:
    for units, fixed, room, slots in CASES[:100]:
        counts = [len(place(units, fixed, room + extra, slots=slots).streamed) for extra in range(0, 4000, 200)]
        assert counts == sorted(counts, reverse=True)


def test_streamed_units_are_evenly_spread() -> None:
    for total in range(1, 60):
        for count in range(1, total + 1):
            numbers = spread(total, count)
            gaps = {b - a for a, b in zip(numbers, numbers[1:], strict=False)}
            assert len(set(numbers)) == count and numbers[0] >= 0 and numbers[-1] < total
            assert not gaps or max(gaps) - min(gaps) <= 1
    assert spread(57, 57) == tuple(range(57)) and spread(9, 0) == () and spread(0, 0) == ()


def test_all_stream_where_that_is_asked_for() -> None:
    placed = place([5, 7, 6], 3, 1000, stream_all=True)
    assert placed == Residency(fixed=3, resident=0, streamed=(0, 1, 2), slots=SLOTS * 7, moved=18)
    assert place([], 3, 1000, stream_all=True) == Residency(3, 0)


def test_one_unit_is_no_smaller_on_its_way_than_at_home() -> None:
    assert place([100], 0, 100) == Residency(0, 100)
    assert place([100], 0, 99) == Residency(0, 0, (0,), 100, 100)


@pytest.mark.parametrize(("figures", "cached"), [({}, 0), ({"reserved_bytes": 7, "allocated_bytes": 4}, 3)])
def test_what_torch_holds_and_does_not_use_is_free(
    monkeypatch: pytest.MonkeyPatch, figures: dict[str, int], cached: int
) -> None:
    known = {kind: {"all": {"current": count}, "small_pool": {"current": 1}} for kind, count in figures.items()}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Mock(total_memory=100))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60, 100))
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: known)
    card = card_of(torch.device("cuda"))
    assert (card.total, card.free) == (100, 60 + cached)
