"""What a part that was quantised on load is called in the cache. Loads no torch, so that it can be looked for early."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..flux.keymaps import Part
from .folders import title_of
from .models import versions_of

VERSION = 1
"""Raised whenever the same numbers would be written otherwise."""

MAX_TITLE = 128
"""Bytes of a model's name: file systems take 255 for the whole."""


def file_name(part: Part, format: str) -> str:
    """Tells the source files by path, size and time of change."""
    made_from = [(str(Path(path).absolute()), size, changed) for path, size, changed in versions_of(part)]
    digest = hashlib.sha256(repr((VERSION, part.role, part.prefix, format, made_from)).encode()).hexdigest()
    title = title_of(part.checkpoint.path).encode(errors="ignore")[:MAX_TITLE].decode(errors="ignore")
    return f"{title}-{part.role}-{format}-{digest[:16]}.safetensors"
