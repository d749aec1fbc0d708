"""Ctrl-C of a command, from before the command line is imported: it imports nothing that takes time."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

INTERRUPTED = 130

IMPORT_SYSTEM = "<frozen importlib"
"""How the names of the files begin that Python's own code for imports has."""


def end_by_interrupt() -> None:
    """Have Ctrl-C raise ``KeyboardInterrupt`` in this process, and end it at once while anything is imported.

    Imports of numpy and torch may swallow an exception, or cannot be begun again after one.
    """
    signal.signal(signal.SIGINT, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith(IMPORT_SYSTEM):
            leave()
        frame = frame.f_back
    raise KeyboardInterrupt


@contextmanager
def on_interrupt(first: Callable[[], None]) -> Iterator[None]:
    """Call ``first`` at the first Ctrl-C. The second ends the command, which closes what is open; a third does not."""
    previous: Any = signal.getsignal(signal.SIGINT)
    presses: list[int] = []

    def stop(number: int, frame: Any) -> None:
        presses.append(number)
        if len(presses) == 1:
            first()
        elif len(presses) == 2:
            raise KeyboardInterrupt
        else:
            leave()

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        if not presses:  # else the command is ending, and whoever presses again shall have a word
            signal.signal(signal.SIGINT, previous)


def leave() -> NoReturn:
    """End the process at once, as one that Ctrl-C stopped."""
    os.write(sys.stderr.fileno(), b"error: stopped by Ctrl-C\n")
    os._exit(INTERRUPTED)
