"""Tensors of mapped files to the GPU by way of page-locked memory, several times as fast as from where they lie.

What the device fetched before torch was there it copies by itself, in its own time. For anything else a thread copies a
piece into one half of its buffer while the device fetches the other half. The bytes are the same.
"""

from __future__ import annotations

import ctypes
import threading
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from .checkpoint import Checkpoint
from .early_fetch import EarlyFetch, FetchedFile

HALF = 16 << 20
SMALL = 1 << 20
"""Bytes below which the driver's own copy is as fast."""


class Staging:
    """A way to the device; threads may use it at once.

    Args:
        device: a GPU; anything else is copied to plainly.
        pinned: page-locked memory may be taken.
        checkpoint: whose tensors come; those of other files go by way of the buffer.
        early: what the device has fetched of its files.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        pinned: bool,
        checkpoint: Checkpoint | None = None,
        early: EarlyFetch | None = None,
    ) -> None:
        self._device = device
        self._pinned = pinned and device.type == "cuda"
        self._buffers = _Buffers(device)
        self._checkpoint = checkpoint
        self._early = early if checkpoint is not None and self._pinned else None
        self._files: dict[Path, FetchedFile | None] = {}

    @property
    def fetches(self) -> bool:
        """Whether the device has all, or will have, so that threads are of no use."""
        if self._early is None or self._checkpoint is None:
            return False
        return all(file is not None and file.whole for file in map(self._file, self._checkpoint.all_files))

    def _file(self, path: Path) -> FetchedFile | None:
        """What is fetched of a file of the checkpoint, where it is the one that is read, or will be."""
        assert self._early is not None and self._checkpoint is not None
        with suppress(OSError):
            return self._early.file(self._checkpoint.version_of(path))
        return None

    def bring(self, tensor: Tensor, into: Tensor | None = None) -> Tensor:
        """A tensor on the device: all of it there for whatever the device is told to do next.

        Args:
            into: where to, of the same shape and dtype.
        """
        source = self._fetched(tensor) if self._may_be_there and tensor.device.type == "cpu" else None
        if source is not None:
            return source.clone() if into is None else into.copy_(source, non_blocking=True)
        if not self._buffered(tensor):
            return tensor.to(self._device) if into is None else into.copy_(tensor)
        made = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device) if into is None else into
        self._buffers.copy(tensor.detach().view(-1).view(torch.uint8), made.view(-1).view(torch.uint8))
        return made

    def _buffered(self, tensor: Tensor) -> bool:
        """Whether a tensor goes by way of the buffer."""
        there = tensor.device.type != "cpu" or tensor.nbytes < SMALL or tensor.is_pinned()
        return self._pinned and not there and tensor.is_contiguous()

    @property
    def _may_be_there(self) -> bool:
        return self._early is not None and self._early.nbytes > 0

    def _fetched(self, tensor: Tensor) -> Tensor | None:
        """A tensor where the device has fetched it to."""
        assert self._checkpoint is not None and self._early is not None
        place = self._checkpoint.place_of(tensor)
        if place is None or not tensor.is_contiguous():
            return None
        path, start = place
        if path not in self._files:  # mapped by now: it is asked for once, which takes as long as to tell a copy
            self._files[path] = self._file(path)
        file = self._files[path]
        if file is None:
            return None
        there = self._early.place(file, start, start + tensor.nbytes)
        if there is None:
            return None
        here = torch.empty(0, dtype=tensor.dtype, device=self._device)
        return here.set_(self._memory, there // tensor.itemsize, tensor.shape, tensor.stride())

    @cached_property
    def _memory(self) -> UntypedStorage:
        assert self._early is not None
        return _bytes_at(self._early.address, self._early.nbytes, self._device).untyped_storage()


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


def _bytes_at(address: int, nbytes: int, device: torch.device) -> Tensor:
    """Memory of the device as a tensor, which may only be read, and only while it is held."""
    if device.type == "cuda":
        return torch.as_tensor(_Memory(address, nbytes), device=device)
    return torch.frombuffer((ctypes.c_ubyte * nbytes).from_address(address), dtype=torch.uint8)


class _Memory:
    """Memory of a GPU as libraries tell it to one another."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 2}
