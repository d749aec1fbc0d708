"""What the system knows of processes. Loads no torch."""

from __future__ import annotations

import os
from pathlib import Path


def resident_bytes(pid: int | str | None = "self") -> int:
    """Memory of a process on the host; 0 where that cannot be known."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
