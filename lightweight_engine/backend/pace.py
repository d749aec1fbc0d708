"""A host starts work on a GPU and goes on: how far it is ahead of what the GPU has done."""

from __future__ import annotations

from typing import Any

import torch

Mark = Any
"""A point in a GPU's work, which is reached when everything before it is done."""


def mark(device: torch.device) -> Mark | None:
    """The point up to which work has been started; None where nothing is computed behind the host's back."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(blocking=True)  # whoever waits leaves the core to others
    event.record(torch.cuda.current_stream(device))
    return event


class Span:
    """The time that a GPU takes for the work that is started between two places of a program; it begins here."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device)
        self._ends = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._ends[0].record(self._stream)

    def end(self) -> None:
        """The work has been started."""
        self._ends[1].record(self._stream)

    def seconds(self) -> float | None:
        """What it took; None as long as it is not done. Asks, and does not wait."""
        begun, done = self._ends
        return begun.elapsed_time(done) / 1e3 if done.query() else None


class Lead:
    """Lets the host be one step ahead of the GPU, and no more.

    So the GPU always has work, and yet what is told of the progress is true but for one step, and a cancel acts within
    one. Without it a host that replays recorded steps would have started them all before the first is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: Mark | None = None

    def step(self) -> None:
        """A step has been started: waits until the one before it is done."""
        last, self._last = self._last, mark(self._device)
        if last is not None:
            last.synchronize()
