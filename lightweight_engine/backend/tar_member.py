"""Where one regular file lies in an uncompressed tar archive, so that it is copied by its place and never by a path.

Nothing is extracted and no name of the archive becomes a path. Python's own reader keeps an object for every entry and
reads extended headers of any length into memory; this one keeps nothing and reads 512 bytes for an entry.

Source: POSIX.1-2017, pax, "ustar Interchange Format". Loads no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ..errors import CorruptCheckpointError, UnsupportedCheckpointError
from .checkpoint import corrupt

BLOCK = 512
MAX_ENTRIES = 10_000

REGULAR = (b"0", b"\0")
PASSED = (*REGULAR, b"5", b"x", b"g", b"L", b"K")  # files, folders, and headers that extend the next or say more of it


@dataclass(frozen=True)
class Span:
    """Bytes ``start`` to ``end`` of the archive."""

    start: int
    end: int


def find_member(path: Path, name: str, max_bytes: int) -> Span:
    """The place of the regular file ``name`` in the archive ``path``.

    Raises:
        CorruptCheckpointError: truncated, damaged, no tar archive, two files of that name, or too many entries.
        UnsupportedCheckpointError: no such file in it, one longer than ``max_bytes``, a link or device, or a name that
            leads out of the archive.
    """
    size = path.stat().st_size
    found: Span | None = None
    with path.open("rb") as file:
        for entry, kind, span in _entries(path, file, size):
            if kind not in PASSED:
                raise UnsupportedCheckpointError(f"{path.name} holds {entry!r:.80}, a link or device, which is refused")
            if entry.startswith("/") or ".." in PurePosixPath(entry).parts:
                raise UnsupportedCheckpointError(f"{path.name} holds {entry!r:.80}, which leads out of the archive")
            if kind not in REGULAR or str(PurePosixPath(entry)) != name:
                continue
            if found is not None:
                raise corrupt(path, f"the archive has two files {name!r}")
            if span.end - span.start > max_bytes:
                raise UnsupportedCheckpointError(f"{name} is longer than the {max_bytes:,} bytes that are allowed")
            found = span
    if found is None:
        raise UnsupportedCheckpointError(f"the archive holds no file {name!r}; give the URL of the right archive")
    return found


def _entries(path: Path, file: BinaryIO, size: int) -> Iterator[tuple[str, bytes, Span]]:
    """Name, type and place of each entry."""
    at = 0
    for _ in range(MAX_ENTRIES):
        file.seek(at)
        header = file.read(BLOCK)
        if len(header) < BLOCK:
            raise corrupt(path, "the archive is incomplete, or no tar archive")
        if not header.strip(b"\0"):
            return
        length = _checked_length(path, header)
        start = at + BLOCK
        if start + length > size:
            raise corrupt(path, "the archive is incomplete")
        prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
        name = _text(header[:100])
        yield f"{prefix}/{name}" if prefix else name, header[156:157], Span(start, start + length)
        at = start + -(-length // BLOCK) * BLOCK
    raise corrupt(path, f"the archive has more than {MAX_ENTRIES:,} entries")


def _checked_length(path: Path, header: bytes) -> int:
    """The length that a header tells, after its checksum."""
    try:
        total = sum(header) - sum(header[148:156]) + 8 * ord(" ")
        if _octal(header[148:156]) != total:
            raise ValueError("checksum")
        return _octal(header[124:136])
    except ValueError:
        raise CorruptCheckpointError(
            f"{path.name} is no plain tar archive, or damaged; give an archive that is not compressed"
        ) from None


def _octal(field: bytes) -> int:
    digits = field.strip(b" \0")
    if not digits.isdigit():  # the other form, base 256, is for sizes of 8 GiB and more
        raise ValueError(field)
    return int(digits, 8)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "replace")
