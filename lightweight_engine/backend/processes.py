"""What the system knows of processes, and Python of this one. Loads no torch."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def resident_bytes(pid: int | str | None = "self") -> int:
    """Memory of a process on the host; 0 where that cannot be known."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def collector_paused() -> Iterator[None]:
    """Without passes of Python's garbage collector, for imports: they make much and drop nothing, and each pass would
    walk all of it again. It is a sixth of the time that torch takes."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
