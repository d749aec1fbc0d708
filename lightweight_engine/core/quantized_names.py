"""What a part that was quantised on load is called in the cache. Loads no torch, so that it can be looked for early."""

from __future__ import annotations

import hashlib

from ..flux.keymaps import Part
from .folders import title_of
from .models import files_of

VERSION = 1
"""Raised whenever the same numbers would be written otherwise."""


def file_name(part: Part, format: str) -> str:
    """Tells the source files by path, size and time of change."""
    stats = [(str(path.absolute()), path.stat()) for path in files_of(part)]
    made_from = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    digest = hashlib.sha256(repr((VERSION, part.role, part.prefix, format, made_from)).encode()).hexdigest()
    return f"{title_of(part.checkpoint.path)}-{part.role}-{format}-{digest[:16]}.safetensors"
