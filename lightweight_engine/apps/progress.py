"""The progress of a job for a person: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from .console import Console

if TYPE_CHECKING:
    from ..results import Progress

SECONDS_BETWEEN_LINES = 5.0

STAGES = {
    "load": "loading",
    "encode": "reading the prompt",
    "sample": "drawing",
    "decode": "decoding",
    "upscale": "enlarging",
    "detect": "looking for faces and hands",
    "detail": "detailing",
    "done": "done",
}


class Reporter(AbstractContextManager["Reporter"], Protocol):
    """Shows what it is called with while its context lasts."""

    def __call__(self, progress: Progress) -> None: ...


def reporter(console: Console, label: str = "") -> Reporter:
    """The reporter that suits the console: nothing when quiet, a bar on a terminal, lines otherwise."""
    if console.quiet:
        return Silent()
    return Bar(label) if console.terminal else Lines(console, label)


def describe(progress: Progress) -> str:
    """Stage, step, speed and time left in one line."""
    parts = [STAGES[progress.stage]]
    if progress.image_count > 1:
        parts.append(f"picture {progress.image_index + 1} of {progress.image_count}")
    if progress.stage == "sample" or (progress.stage == "detail" and progress.steps):
        parts.append(f"step {progress.step}/{progress.steps}" if progress.step else f"{progress.steps} steps")
    if progress.stage == "upscale" and progress.steps:
        parts.append(f"tile {progress.step}/{progress.steps}")
    if progress.steps_per_second:
        parts.append(speed(progress.steps_per_second))
    if progress.eta_seconds is not None and progress.stage != "done":
        parts.append(f"{clock(progress.eta_seconds)} left")
    return ", ".join(parts)


def speed(steps_per_second: float) -> str:
    """Steps a second, or seconds a step where that is the larger number."""
    return f"{steps_per_second:.2f} it/s" if steps_per_second >= 1 else f"{1 / steps_per_second:.2f} s/it"


def clock(seconds: float) -> str:
    """A stretch of time as M:SS or H:MM:SS."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Silent(nullcontext[Any]):
    """Shows nothing."""

    def __enter__(self) -> Silent:
        return self

    def __call__(self, progress: Progress) -> None:
        return


class Lines:
    """A line when drawing begins, and one every few seconds."""

    def __init__(self, console: Console, label: str = "") -> None:
        self._console = console
        self._prefix = f"{label}: " if label else ""
        self._last = time.monotonic()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *error: object) -> None:
        return

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        begins = progress.stage == "sample" and not progress.step
        waited = progress.stage != "done" and now - self._last >= SECONDS_BETWEEN_LINES
        if begins or waited:
            self._console.say(self._prefix + describe(progress))
            self._last = now


class Bar:
    """A bar that is redrawn in place and gone when the job is done."""

    def __init__(self, label: str = "") -> None:
        from rich.console import Console as Terminal
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Columns

        self._columns = Columns(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            console=Terminal(stderr=True),
            transient=True,
        )
        self._label = label
        self._task = self._columns.add_task(label or STAGES["load"], total=1.0)

    def __enter__(self) -> Bar:
        self._columns.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._columns.stop()

    def __call__(self, progress: Progress) -> None:
        text = describe(progress)
        self._columns.update(
            self._task, completed=progress.fraction, description=f"{self._label}: {text}" if self._label else text
        )
