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
def collector_paused(*, keep: bool = False) -> Iterator[None]:
    """Without passes of Python's garbage collector, for imports: they make much and drop nothing, and each pass would
    walk all of it again. It is a sixth of the time that torch takes.

    Args:
        keep: later passes leave out all that is there by then, as it stays for as long as the process. For processes
            that are the engine's own, which give memory back between stages: each time that is a pass.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
        if keep:
            gc.freeze()
    finally:
        if was:
            gc.enable()
