"""Ctrl-C of a command, from before the command line is imported: it imports nothing that takes time."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

INTERRUPTED = 130
TERMINATED = 143
STOPPING = (signal.SIGINT, signal.SIGTERM)

IMPORT_SYSTEM = "<frozen importlib"
"""How the names of the files begin that Python's own code for imports has."""


def end_by_interrupt() -> None:
    """Have Ctrl-C raise ``KeyboardInterrupt`` in this process, and end it at once while anything is imported.

    Imports of numpy and torch may swallow an exception, or cannot be begun again after one. When all is done and
    Python takes itself apart, nothing is left to be stopped, and the exit code stays what it is.
    """
    signal.signal(signal.SIGINT, _stop)
    if os.getpid() == 1:  # of a container, where the system ends nobody by a signal that is not handled
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(TERMINATED))
    atexit.register(ignore_signals)  # the first to be registered is the last to be called


def _stop(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith(IMPORT_SYSTEM) or _is_text(frame):
            leave()
        frame = frame.f_back
    raise KeyboardInterrupt


def _is_text(frame: FrameType) -> bool:
    """Whether it runs a text given to ``exec``, as dataclasses do.

    After ``KeyboardInterrupt`` from there Python ends itself by SIGINT in place of any exit code, caught or not.
    """
    code = frame.f_code
    return (code.co_filename, code.co_name) == ("<string>", "<module>") and frame.f_back is not None


@contextmanager
def signals_held() -> Iterator[None]:
    """Have Ctrl-C and SIGTERM wait; in a process that is started meanwhile, until it calls ``leave_signals``."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows, where nothing is handed on so
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # it is started with a first process else, and then lets the signals through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals() -> None:
    """Leave Ctrl-C and SIGTERM, those that wait too, to the process that started this one."""
    ignore_signals()
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def ignore_signals() -> None:
    """Let Ctrl-C and SIGTERM do nothing from now on."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


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
