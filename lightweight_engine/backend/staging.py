"""Tensors of mapped files to the GPU by way of page-locked memory, several times as fast as from where they lie.

Where the file itself is page-locked the device fetches them from there, in its own time, or has done so before torch
was there. Otherwise a thread copies a piece into one half of its buffer while the device fetches the other half. The
bytes are the same.
"""

from __future__ import annotations

import ctypes
import threading
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .early_fetch import EarlyFetch
from .page_locked import LockedFile, PageLocked

HOST = torch.device("cpu")
HALF = 16 << 20
SMALL = 1 << 20
"""Bytes below which the driver's own copy is as fast."""


class Staging:
    """A way to the device; threads may use it at once.

    Args:
        device: a GPU; anything else is copied to plainly.
        pinned: page-locked memory may be taken.
        checkpoint: whose tensors come; those of other files go by way of the buffer.
        locked: what is page-locked of its files.
        early: what the device has fetched of that already.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        pinned: bool,
        checkpoint: Checkpoint | None = None,
        locked: PageLocked | None = None,
        early: EarlyFetch | None = None,
    ) -> None:
        self._device = device
        self._pinned = pinned and device.type == "cuda"
        self._buffers = _Buffers(device)
        self._locked, self._checkpoint = locked, checkpoint
        self._arrived = None if early is None else _Arrived(early, device)
        self._files: dict[Path, tuple[LockedFile, Tensor]] = {}
        if locked is not None and checkpoint is not None and self._pinned:
            for path in checkpoint.all_files:
                if (file := locked.file(path)) is not None:
                    self._files[path] = file, _bytes_at(file.address, file.size)

    @property
    def fetches(self) -> bool:
        """Whether the device fetches all from files that are page-locked, so that threads are of no use."""
        return bool(self._files) and all(file.is_whole for file, _ in self._files.values())

    def bring(self, tensor: Tensor, into: Tensor | None = None) -> Tensor:
        """A tensor on the device: all of it there for whatever the device is told to do next.

        Args:
            into: where to, of the same shape and dtype.
        """
        source = self._fetched(tensor) if self._files and tensor.device.type == "cpu" else None
        if source is None and not self._buffered(tensor):
            return tensor.to(self._device) if into is None else into.copy_(tensor)
        made = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device) if into is None else into
        target = made.view(-1).view(torch.uint8)
        if source is None:
            self._buffers.copy(tensor.detach().view(-1).view(torch.uint8), target)
        else:
            for start, piece in source:
                target[start : start + len(piece)].copy_(piece, non_blocking=True)
        return made

    def _buffered(self, tensor: Tensor) -> bool:
        """Whether a tensor goes by way of the buffer."""
        there = tensor.device.type != "cpu" or tensor.nbytes < SMALL or tensor.is_pinned()
        return self._pinned and not there and tensor.is_contiguous()

    def _fetched(self, tensor: Tensor) -> list[tuple[int, Tensor]] | None:
        """The bytes of a tensor in page-locked memory or on the device, piece by piece, with their places in it."""
        assert self._checkpoint is not None and self._locked is not None
        place = self._checkpoint.place_of(tensor)
        if place is None or place[0] not in self._files or not tensor.is_contiguous():
            return None
        (path, begin), end = place, place[1] + tensor.nbytes
        file, whole = self._files[path]
        if not self._locked.holds(file, begin, end):
            return None
        return [(start - begin, self._nearest(file, whole, start, stop)) for start, stop in file.cuts(begin, end)]

    def _nearest(self, file: LockedFile, whole: Tensor, start: int, stop: int) -> Tensor:
        """Bytes of one piece of a file, on the device where it has fetched them."""
        arrived = None
        if self._arrived is not None:
            arrived = self._arrived.bytes(*file.piece_of(start), stop - start)
        return whole[start:stop] if arrived is None else arrived


class _Arrived:
    """What a device fetched before torch was there, as tensors."""

    def __init__(self, early: EarlyFetch, device: torch.device) -> None:
        self._early, self._device = early, device
        self._awaited: set[int] = set()

    def bytes(self, piece: int, start: int, nbytes: int) -> Tensor | None:
        """Some bytes of a piece, there for whatever the device is told to do next; None where it has not fetched it."""
        place = self._early.place(piece)
        if place is None:
            return None
        if place not in self._awaited:  # by the stream that all loading is told to
            self._wait()
            self._awaited.add(place)
        return self._memory[place + start : place + start + nbytes]

    @cached_property
    def _memory(self) -> Tensor:
        return _bytes_at(self._early.address, self._early.nbytes, self._device)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            fetching = torch.cuda.ExternalStream(self._early.stream, self._device)
            torch.cuda.current_stream(self._device).wait_stream(fetching)


class _Buffers(threading.local):
    """Two halves of a buffer and a stream, for each thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._halves: list[Tensor] = []
        self._stream: Any = None

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Bytes to the device, all there in the end."""
        self._open()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))  # which may still use this memory
        fetched: list[Any] = [None, None]
        for number, start in enumerate(range(0, len(source), HALF)):
            turn, count = number % 2, min(HALF, len(source) - start)
            if fetched[turn] is not None:
                fetched[turn].synchronize()
            half = self._halves[turn]
            ctypes.memmove(half.data_ptr(), source.data_ptr() + start, count)  # in this thread, without Python's lock
            with torch.cuda.stream(self._stream):
                target[start : start + count].copy_(half[:count], non_blocking=True)
                fetched[turn] = self._stream.record_event()
        self._stream.synchronize()

    def _open(self) -> None:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
            self._halves = [torch.empty(HALF, dtype=torch.uint8, pin_memory=True) for _ in range(2)]


def _bytes_at(address: int, nbytes: int, device: torch.device = HOST) -> Tensor:
    """Bytes of this process or its GPU as a tensor, which may only be read, and only while they are there."""
    if device.type == "cuda":
        return torch.as_tensor(_Memory(address, nbytes), device=device)
    return torch.frombuffer((ctypes.c_ubyte * nbytes).from_address(address), dtype=torch.uint8)


class _Memory:
    """Memory of a GPU as libraries tell it to one another."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 2}
