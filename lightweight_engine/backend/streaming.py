"""Weights that wait on the host and pass through a ring of slots on the device, unit by unit, as the network runs.

A unit is a module and those of its tensors that travel with it. Hooks bring them: before a unit runs its tensors are
views of a slot, filled on a copy stream while the units before it computed; afterwards the slot is free for another.
The numbers are those of a resident network, bit for bit, as the same kernels run on the same bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .devices import available_memory

log = logging.getLogger(__name__)

ALIGNMENT = 256

# Of the host's free memory; more than that page-locked starves everything else on the machine.
PINNED_SHARE = 0.6


@dataclass(frozen=True, eq=False)
class Place:
    """One tensor of a unit: the dictionary of the module that holds it, and its name there."""

    holder: dict[str, Any]
    name: str

    @property
    def tensor(self) -> Tensor:
        return self.holder[self.name]

    def put(self, tensor: Tensor) -> None:
        held = self.holder[self.name]
        if isinstance(held, nn.Parameter):
            held.data = tensor
        else:
            self.holder[self.name] = tensor


@dataclass(frozen=True, eq=False)
class Unit:
    """A module that is brought to the device as a whole.

    Attributes:
        name: for messages and plans.
        module: whose call needs the tensors.
        places: the tensors; those of units inside it are left out.
    """

    name: str
    module: nn.Module
    places: tuple[Place, ...]

    @property
    def nbytes(self) -> int:
        return sum(place.tensor.nbytes for place in self.places)

    @property
    def slot_bytes(self) -> int:
        """Bytes in a slot, where each tensor starts at a multiple of ``ALIGNMENT``."""
        return sum(aligned(place.tensor.nbytes) for place in self.places)


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def views(buffer: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of the same dtypes and shapes one after another in a byte buffer, each aligned."""
    made, start = [], 0
    for tensor in tensors:
        made.append(buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        start += aligned(tensor.nbytes)
    return made


@dataclass(eq=False)
class _Waiting:
    """A unit's bytes on the host, one after another, so that it is one copy."""

    unit: Unit
    buffer: Tensor
    tensors: list[Tensor]


class HostArena:
    """One buffer on the host for the units of a ring, page-locked as a whole where that can be.

    Args:
        pinned: page-lock it. Torch's own pinned tensors would take up to twice the bytes, and keep them.
    """

    def __init__(self, nbytes: int, *, pinned: bool) -> None:
        self.buffer = torch.empty(nbytes, dtype=torch.uint8)
        self.pinned = pinned and nbytes > 0 and self._lock()
        if pinned and not self.pinned:
            log.warning("%d MiB of weights cannot be page-locked: they are copied more slowly", nbytes >> 20)

    def close(self) -> None:
        """Unlock the pages; the tensors in them stay."""
        if self.pinned:
            _runtime().cudaHostUnregister(self.buffer.data_ptr())
            self.pinned = False

    def _lock(self) -> bool:
        if self.buffer.nbytes > PINNED_SHARE * available_memory(self.buffer.device):
            return False
        return int(_runtime().cudaHostRegister(self.buffer.data_ptr(), self.buffer.nbytes, 0)) == 0


def _runtime() -> Any:
    """CUDA's own functions, which a torch with CUDA has."""
    return torch.cuda.cudart()


@dataclass(eq=False)
class _Slot:
    buffer: Tensor
    owner: Unit | None = None
    filled: Any = None
    free: Any = None


class Ring:
    """Streams units through slots on a device.

    Args:
        units: in the order in which they run; each runs once a pass.
        slots: how many units are on the device at once, at least two for copies to overlap with computing.
        pinned: page-lock the host's buffers (CUDA only): faster copies that the host need not wait for.
        overlap: copy ahead on a stream of its own.
    """

    def __init__(
        self, units: Sequence[Unit], device: torch.device, *, slots: int = 2, pinned: bool = True, overlap: bool = True
    ) -> None:
        self.device = device
        cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if cuda and overlap else None
        self._arena = HostArena(sum(unit.slot_bytes for unit in units), pinned=pinned and cuda)
        self._waiting = _to_host(units, self._arena.buffer)
        size = max((waiting.buffer.nbytes for waiting in self._waiting), default=0)
        count = min(slots, len(units))
        self._slots = [_Slot(torch.empty(size, dtype=torch.uint8, device=device)) for _ in range(count)]
        self._index = {unit: i for i, unit in enumerate(units)}
        self._next = 0
        if self._stream is not None:  # slots may be memory that the device is still busy with
            self._stream.wait_stream(torch.cuda.current_stream(device))
        self._hooks = [
            hook
            for unit in units
            for hook in (
                unit.module.register_forward_pre_hook(lambda *_, unit=unit: self._bring(unit)),
                unit.module.register_forward_hook(lambda *_, unit=unit: self._leave(unit)),
            )
        ]

    @property
    def units(self) -> list[Unit]:
        return list(self._index)

    @property
    def slot_bytes(self) -> int:
        """Bytes of all slots."""
        return sum(slot.buffer.nbytes for slot in self._slots)

    @property
    def nbytes(self) -> int:
        """Bytes that one pass copies."""
        return sum(waiting.buffer.nbytes for waiting in self._waiting)

    def close(self) -> None:
        """Take the hooks off; the units' tensors are left on the host."""
        for hook in self._hooks:
            hook.remove()
        for slot in self._slots:
            self._empty(slot)
        if self._stream is not None:
            self._stream.synchronize()  # nothing may still read the pages that are unlocked now
        self._arena.close()
        self._hooks.clear()
        self._slots.clear()

    def _bring(self, unit: Unit) -> None:
        slot = self._slot_of(unit) or self._fill(unit)
        if slot.filled is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.filled)
        buffer = slot.buffer[: self._waiting[self._index[unit]].buffer.nbytes]
        for place, view in zip(unit.places, views(buffer, [p.tensor for p in unit.places]), strict=True):
            place.put(view)
        self._fill_ahead(unit)

    def _leave(self, unit: Unit) -> None:
        """The unit has run: its slot is free as soon as the device is done with it."""
        slot = self._slot_of(unit)
        if slot is not None and self._stream is not None:
            slot.free = torch.cuda.current_stream(self.device).record_event()

    def _fill_ahead(self, unit: Unit) -> None:
        """Copy the units that run next into the other slots."""
        if self._stream is None:
            return
        order = self._waiting
        for step in range(1, len(self._slots)):
            following = order[(self._index[unit] + step) % len(order)].unit
            if following is not unit and self._slot_of(following) is None:
                self._fill(following, keep=unit)

    def _fill(self, unit: Unit, keep: Unit | None = None) -> _Slot:
        slot = self._slots[self._next]
        if slot.owner is keep and keep is not None:
            self._next = (self._next + 1) % len(self._slots)
            slot = self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        self._empty(slot)
        slot.owner = unit
        source = self._waiting[self._index[unit]].buffer
        target = slot.buffer[: source.nbytes]
        if self._stream is None:
            target.copy_(source)
            return slot
        if slot.free is not None:
            self._stream.wait_event(slot.free)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            slot.filled = self._stream.record_event()
        return slot

    def _empty(self, slot: _Slot) -> None:
        """The unit in a slot is bound to its host tensors again."""
        if slot.owner is not None:
            waiting = self._waiting[self._index[slot.owner]]
            for place, tensor in zip(slot.owner.places, waiting.tensors, strict=True):
                place.put(tensor)
        slot.owner = None

    def _slot_of(self, unit: Unit) -> _Slot | None:
        return next((slot for slot in self._slots if slot.owner is unit), None)


def _to_host(units: Sequence[Unit], arena: Tensor) -> list[_Waiting]:
    """Move the tensors of units into a buffer on the host and bind them there."""
    waiting, start = [], 0
    for unit in units:
        tensors = [place.tensor for place in unit.places]
        buffer = arena[start : start + unit.slot_bytes]
        start += unit.slot_bytes
        homes = views(buffer, tensors)
        for place, home, tensor in zip(unit.places, homes, tensors, strict=True):
            home.copy_(tensor.detach())
            place.put(home)
        waiting.append(_Waiting(unit, buffer, homes))
    return waiting


def to_device(unit: Unit, device: torch.device) -> None:
    """Make a unit resident; on a GPU its tensors lie as they do in a slot, one after another."""
    tensors = [place.tensor.detach() for place in unit.places]
    if device.type == "cpu" or all(tensor.device.type == device.type for tensor in tensors):
        homes = [tensor.to(device) for tensor in tensors]
    else:
        homes = views(torch.empty(unit.slot_bytes, dtype=torch.uint8, device=device), tensors)
        for home, tensor in zip(homes, tensors, strict=True):
            home.copy_(tensor)
    for place, home in zip(unit.places, homes, strict=True):
        place.put(home)
