"""A host starts work on a GPU and goes on: how far it is ahead of what the GPU has done."""

from __future__ import annotations

import time
from itertools import pairwise
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
    """Work on a GPU that a host starts between two places of a program; it begins here."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device)
        self._marks: list[tuple[float, Any]] = []
        self._mark()

    def end(self) -> None:
        """All of it has been started."""
        self._mark()

    def _mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        self._marks.append((time.perf_counter(), event))

    @property
    def is_done(self) -> bool:
        """Whether the GPU has done it. Asks, and does not wait."""
        return self._marks[-1][1].query()

    @property
    def seconds(self) -> float:
        """What it took the GPU."""
        (_, begun), (_, done) = self._marks
        return begun.elapsed_time(done) / 1e3

    def gaps(self, first: Span) -> list[float]:
        """Seconds that the GPU was behind the host at its beginning and end, less those at ``first``'s beginning."""
        host, event = first._marks[0]
        return [event.elapsed_time(reached) / 1e3 - (started - host) for started, reached in self._marks]


class Lags:
    """How long after a host a GPU is done with what is started on it, span by span.

    Each has a clock of its own. A GPU is never ahead of the host: where it is seen to have been least behind, it had
    nothing to do and began at once.
    """

    def __init__(self) -> None:
        self._first: Span | None = None
        self._least = 0.0

    def of(self, span: Span) -> float:
        """The seconds from when the host had started a span, which is done, to when the GPU had done it."""
        self._first = self._first or span
        begun, done = span.gaps(self._first)
        self._least = min(self._least, begun, done)
        return done - self._least


class Laps:
    """Seconds between points of a program, as the device gets to them where it works behind the host's back."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._points: list[Any] = []

    def mark(self) -> None:
        """A point: a lap ends, and the next begins."""
        if self._stream is None:
            self._points.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        self._points.append(event)

    def seconds(self) -> list[float]:
        """Of each lap; waits for the device to get to the last point."""
        if self._stream is None:
            return [end - begin for begin, end in pairwise(self._points)]
        if self._points:
            self._points[-1].synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in pairwise(self._points)]


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
