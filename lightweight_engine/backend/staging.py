"""Tensors of mapped files to the GPU by way of page-locked memory, several times as fast as from where they lie.

A thread copies a piece into one half of its buffer while the device fetches the other half. The bytes are the same.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import torch
from torch import Tensor

HALF = 16 << 20
SMALL = 1 << 20
"""Bytes below which the driver's own copy is as fast."""


class Staging(threading.local):
    """A way to the device, with a buffer and a stream for each thread that uses it.

    Args:
        device: a GPU; anything else is copied to plainly.
        pinned: page-locked memory may be taken.
    """

    def __init__(self, device: torch.device, *, pinned: bool) -> None:
        self._device = device
        self._pinned = pinned and device.type == "cuda"
        self._halves: list[Tensor] = []
        self._stream: Any = None

    def bring(self, tensor: Tensor, into: Tensor | None = None) -> Tensor:
        """A tensor on the device, all of it there.

        Args:
            into: where to, of the same shape and dtype.
        """
        there = tensor.device.type != "cpu" or tensor.is_pinned()
        if not self._pinned or there or tensor.nbytes < SMALL or not tensor.is_contiguous():
            return tensor.to(self._device) if into is None else into.copy_(tensor)
        made = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device) if into is None else into
        self._copy(tensor.detach().view(-1).view(torch.uint8), made.view(-1).view(torch.uint8))
        return made

    def _copy(self, source: Tensor, target: Tensor) -> None:
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
