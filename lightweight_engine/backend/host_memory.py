"""How much memory the host has, with limits of control groups honoured. Loads no torch."""

from __future__ import annotations

import os
from pathlib import Path

GIB = 1 << 30
MIB = 1 << 20

NO_LIMIT = 1 << 62


def host_total() -> int:
    """Bytes that there are, or that this process may have."""
    return min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), _cgroup_limit())


def host_available() -> int:
    """Bytes that can be allocated."""
    return min(_available(), _cgroup_available())


def _available() -> int:
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroup_limit() -> int:
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        return NO_LIMIT if limit == "max" else int(limit)
    except (OSError, ValueError):
        return NO_LIMIT


def _cgroup_available() -> int:
    """What the control group still allows; pages of files count as used there, but are given up when need be."""
    limit = _cgroup_limit()
    if limit == NO_LIMIT:
        return NO_LIMIT
    try:
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        rows = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        return max(limit - used + int(rows.get("inactive_file", 0)) + int(rows.get("active_file", 0)), 0)
    except (OSError, ValueError):
        return limit
