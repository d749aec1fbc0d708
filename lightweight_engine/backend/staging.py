"""Tensors of mapped files to the GPU by way of page-locked memory, several times as fast as from where they lie.

Where the file itself is page-locked the device fetches them from there, in its own time. Otherwise a thread copies a
piece into one half of its buffer while the device fetches the other half. The bytes are the same.
"""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .page_locked import LockedFile, PageLocked

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
    """

    def __init__(
        self,
        device: torch.device,
        *,
        pinned: bool,
        checkpoint: Checkpoint | None = None,
        locked: PageLocked | None = None,
    ) -> None:
        self._device = device
        self._pinned = pinned and device.type == "cuda"
        self._buffers = _Buffers(device)
        self._locked, self._checkpoint = locked, checkpoint
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
        """The bytes of a tensor in page-locked memory, piece by piece, with their places in it."""
        assert self._checkpoint is not None and self._locked is not None
        place = self._checkpoint.place_of(tensor)
        if place is None or place[0] not in self._files or not tensor.is_contiguous():
            return None
        (path, begin), end = place, place[1] + tensor.nbytes
        file, whole = self._files[path]
        if not self._locked.holds(file, begin, end):
            return None
        return [(start - begin, whole[start:stop]) for start, stop in file.cuts(begin, end)]


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


def _bytes_at(address: int, nbytes: int) -> Tensor:
    """Bytes of this process as a tensor, which may only be read, and only while they are there."""
    return torch.frombuffer((ctypes.c_ubyte * nbytes).from_address(address), dtype=torch.uint8)
