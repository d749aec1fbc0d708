"""Whose turn it is to work with an engine: one thread's at a time, and one piece of work of that thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import EngineError
from .progress import Watch

LOOK = 0.05
"""Seconds between looks at whether the caller still wants what waits."""

NESTED = (
    "a job is being done in this thread, as on_progress is called in the middle of one; call the engine when it has "
    "ended, or from another thread, which waits for its turn"
)


class Turns:
    """The turns of one engine."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._working = False

    @contextmanager
    def look(self) -> Iterator[None]:
        """A turn for what changes nothing that a job works with, in the middle of one too."""
        with self._lock:
            yield

    @contextmanager
    def work(self, watch: Watch | None = None) -> Iterator[None]:
        """A turn for a job, and for whatever loads, places or releases what jobs work with.

        Args:
            watch: its cancel ends the wait too.

        Raises:
            EngineError: this thread is in the middle of a job, which would go on with other weights.
            GenerationCancelled: the caller wants it no more.
        """
        while not self._lock.acquire(timeout=LOOK):
            if watch is not None:
                watch.check()
        try:
            if self._working:
                raise EngineError(NESTED)
            self._working = True
            try:
                yield
            finally:
                self._working = False
        finally:
            self._lock.release()
