"""How much memory there is, what may be taken of it, and which units of a network stay on the device.

All but reading the device is arithmetic on bytes known beforehand, so that one can plan for a card without having it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .devices import Card, card_of
from .host_memory import MIB

VRAMState = Literal["NO_VRAM", "LOW_VRAM", "NORMAL_VRAM", "HIGH_VRAM", "SHARED"]

# A slot holds one unit: two let the copy of one overlap with the computing of the other.
SLOTS = 2

# What is never planned for: fragmentation, and other programs that take a little more.
MARGIN_SHARE, MARGIN = 0.03, 256 * MIB


@dataclass(frozen=True)
class Preset:
    """What a VRAM state means.

    Attributes:
        keep: networks stay on the device between stages and jobs as long as there is room.
        weights: largest share of the budget that weights may take.
        stream_text: text encoders pass through layer by layer, whatever room there is.
        drop_modulation: modulation weights leave the device once the vectors of all steps are computed.
    """

    keep: bool
    weights: float
    stream_text: bool
    drop_modulation: bool


# Source: the states of the reference (its HIGH keeps models on the card, LOW and NO move text encoders off it).
PRESETS: dict[str, Preset] = {
    "HIGH_VRAM": Preset(keep=True, weights=1.0, stream_text=False, drop_modulation=False),
    "SHARED": Preset(keep=True, weights=1.0, stream_text=False, drop_modulation=False),
    "NORMAL_VRAM": Preset(keep=True, weights=1.0, stream_text=False, drop_modulation=True),
    "LOW_VRAM": Preset(keep=False, weights=1.0, stream_text=True, drop_modulation=True),
    "NO_VRAM": Preset(keep=False, weights=0.0, stream_text=True, drop_modulation=True),
}


# What a budget is bound by -> how there may be more.
BOUNDS = {
    "vram_limit": "raise vram_limit",
    "allocator_fraction": "raise allocator_fraction",
    "free": "free memory that other programs hold",
    "card": "use a card with more memory",
}

# An ``allocator_fraction`` below this leaves so much that raising it is worth a word.
WORTH_RAISING = 0.9


@dataclass(frozen=True)
class Budget:
    """Bytes that may be allocated on a device.

    Attributes:
        total: in all, weights and work together.
        weights: of weights that stay; the rest of ``total`` is for work.
        bound: what keeps ``total`` from being more: a key of ``BOUNDS``.
        overlap: what can be done while the device computes is.
        record: steps may be recorded and replayed.
    """

    total: int
    weights: int
    preset: Preset
    bound: str = "card"
    overlap: bool = True
    record: bool = True


@dataclass(frozen=True)
class MemoryManager:
    """The memory of one device and the rules under which the engine takes of it.

    Attributes:
        card: the device, or one that is only planned for.
        state: a row of ``PRESETS``.
        reserve: share of the card that weights leave free for work.
        fraction: share of the card that may be taken at all.
        limit: a cap in bytes that the user set.
        pinned: weights that wait on the host are page-locked.
        overlap: they are copied while the device computes.
        fast: the transformer's weights are kept at hand as numbers, where all of them fit beside what stays anyway.
        record: steps may be recorded and replayed.
    """

    card: Card
    state: VRAMState = "HIGH_VRAM"
    reserve: float = 0.25
    fraction: float = 0.95
    limit: int | None = None
    pinned: bool = True
    overlap: bool = True
    fast: bool = False
    record: bool = True

    def budget(self, held: int = 0) -> Budget:
        """What may be allocated now; ``held`` bytes of it are the engine's own already."""
        card = card_of(self.card.device) if self.card.device is not None else self.card
        preset = PRESETS[self.state]
        allowed, free = int(card.total * self.fraction), card.free + held
        taken = min(allowed, free)
        bound = "free" if free < allowed else "allocator_fraction" if self.fraction < WORTH_RAISING else "card"
        usable = max(taken - int(MARGIN_SHARE * taken) - MARGIN, 0)
        if self.limit is not None and self.limit < usable:  # others have the rest: it needs no margin of its own
            usable, bound = self.limit, "vram_limit"
        weights = int(min(usable, card.total * (1 - self.reserve)) * preset.weights)
        return Budget(usable, weights, preset, bound, self.overlap, self.record)


@dataclass(frozen=True)
class Residency:
    """Which units of a network are on the device for good, and which pass through.

    Attributes:
        fixed: bytes that belong to no unit and are always there.
        resident: bytes of units that stay.
        streamed: numbers of the units that pass through.
        slots: bytes of the ring that they pass through.
        moved: bytes that one pass copies.
        dropped: whether units that run once a job pass through too, instead of staying.
        at_hand: bytes of weights that are kept as numbers beside what is stored, LoRAs in them.
        ahead: bytes for the numbers of one weight more than is used, so that it is unpacked in time.
        recorded: bytes that a recorded step takes beside what a step works in; without them none is recorded.
    """

    fixed: int
    resident: int
    streamed: tuple[int, ...] = ()
    slots: int = 0
    moved: int = 0
    dropped: bool = False
    at_hand: int = 0
    ahead: int = 0
    recorded: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.fixed + self.resident + self.slots + self.at_hand + self.ahead + self.recorded


def place(units: Sequence[int], fixed: int, room: int, *, stream_all: bool = False, slots: int = SLOTS) -> Residency:
    """As many units resident as fit into ``room`` bytes; the others evenly spread, so that copies overlap everywhere.

    Args:
        units: bytes of each unit, in the order in which they run.
        fixed: bytes that are there in any case.
        slots: units that a ring holds at once.

    Returns:
        What takes the least streaming. It may be larger than ``room`` where even one ring is too large: the caller
        compares.
    """
    if not stream_all and fixed + sum(units) <= room:
        return Residency(fixed, sum(units))
    for count in () if stream_all else range(1, len(units)):
        candidate = _streaming(units, fixed, count, slots)
        if candidate.nbytes <= room:
            return candidate
    return _streaming(units, fixed, len(units), slots)


def _streaming(units: Sequence[int], fixed: int, count: int, slots: int) -> Residency:
    """``count`` of the units streamed, every k-th."""
    streamed = spread(len(units), count)
    sizes = [units[i] for i in streamed]
    return Residency(fixed, sum(units) - sum(sizes), streamed, min(slots, count) * max(sizes, default=0), sum(sizes))


def spread(total: int, count: int) -> tuple[int, ...]:
    """``count`` numbers of 0 … total-1, as far from one another as can be."""
    return tuple(int((i + 0.5) * total / count) for i in range(count))
