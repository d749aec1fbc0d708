"""Packed weights become numbers while the product before theirs runs, which leaves the memory's bandwidth unused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .linear import PackedLinear


class Ahead:
    """Two places for numbers on a GPU: the product at work reads one, the next one's weight is unpacked to the other.

    Which weight comes after which is learned as they are asked for; where another is asked for, it is unpacked then.

    Args:
        linears: that are used one after another, all on one GPU.
        dtype: that their numbers are computed in.
    """

    def __init__(self, linears: Sequence[PackedLinear], dtype: torch.dtype) -> None:
        self.dtype = dtype
        device = linears[0].packed.device
        largest = max(linear.out_features * linear.in_features for linear in linears)
        self._places = [torch.empty(largest, dtype=dtype, device=device) for _ in range(2)]
        self._stream = torch.cuda.Stream(device)
        self._after: dict[PackedLinear, PackedLinear] = {}
        self._last = linears[-1]
        self._coming: tuple[PackedLinear, Any] | None = None
        self._linears = list(linears)
        for linear in linears:
            linear.ahead = self

    def numbers(self, linear: PackedLinear) -> Tensor:
        """The weight ``[out, in]``, until the next one is asked for."""
        now = torch.cuda.current_stream(self._places[0].device)
        coming, self._coming = self._coming, None
        if coming is not None:
            now.wait_event(coming[1])
        self._places.reverse()
        weight = self._place(linear)
        if coming is None or coming[0] is not linear:
            linear.packed.dequantize_into(weight, linear.added)
        self._after[self._last] = linear
        self._last = linear
        if (following := self._after.get(linear)) is not None:
            self._unpack(following, now)
        return weight

    def settle(self) -> None:
        """The stream at work waits for what is on its way, and the next weight is unpacked anew."""
        torch.cuda.current_stream(self._places[0].device).wait_stream(self._stream)
        self._coming = None

    def close(self) -> None:
        """Linears unpack for themselves again."""
        for linear in self._linears:
            linear.ahead = None
        self._linears.clear()
        self.settle()

    def _unpack(self, linear: PackedLinear, now: torch.cuda.Stream) -> None:
        """Into the place that the product before the present one has read."""
        self._stream.wait_stream(now)
        with torch.cuda.stream(self._stream):
            linear.packed.dequantize_into(self._place(linear, 1), linear.added)
        self._coming = linear, self._stream.record_event()

    def _place(self, linear: PackedLinear, index: int = 0) -> Tensor:
        shape = (linear.out_features, linear.in_features)
        return self._places[index][: shape[0] * shape[1]].view(shape)
