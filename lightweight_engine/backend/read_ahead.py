"""Bytes of files into the page cache, in threads, before anybody asks for them. Loads no torch.

Nothing is kept of them here, and the system may drop them again: this can cost time and no memory.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

READERS = 4
PIECE = 4 << 20
IN_MEMORY = frozenset({0x01021994, 0x858458F6, 0x958458F6})
"""What Linux calls file systems whose files lie in memory: tmpfs, ramfs, hugetlbfs."""


class Span(NamedTuple):
    """Bytes of a file from ``start`` to ``end``."""

    path: Path
    start: int
    end: int


def joined(spans: Iterable[Span]) -> list[Span]:
    """The same bytes in few spans, each file where it came first and its bytes in order."""
    by_file: dict[Path, list[tuple[int, int]]] = {}
    for path, start, end in spans:
        by_file.setdefault(path, []).append((start, end))
    made: list[Span] = []
    for path, found in by_file.items():
        found.sort()
        first, last = found[0]
        for start, end in found:
            if start > last + PIECE:
                made.append(Span(path, first, last))
                first, last = start, end
            last = max(last, end)
        made.append(Span(path, first, last))
    return made


def read_ahead(spans: Iterable[Span], limit: int) -> list[threading.Thread]:
    """Start to read ``limit`` bytes of files at most, none of those in memory; what cannot be read is left to whoever
    needs it.

    Returns:
        The threads, which nobody has to wait for.
    """
    pieces, lock = _pieces([span for span in spans if not lies_in_memory(span.path)], limit), threading.Lock()

    def read() -> None:
        buffer = bytearray(PIECE)
        while True:
            with lock:
                piece = next(pieces, None)
            if piece is None:
                return
            _read(piece, memoryview(buffer))

    threads = [threading.Thread(target=read, name="read ahead", daemon=True) for _ in range(READERS)]
    for thread in threads:
        thread.start()
    return threads


def _pieces(spans: Iterable[Span], limit: int) -> Iterator[Span]:
    for span in spans:
        for start in range(span.start, span.end, PIECE):
            end = min(start + PIECE, span.end, start + limit)
            if end <= start:
                return
            limit -= end - start
            yield Span(span.path, start, end)


def _read(piece: Span, buffer: memoryview) -> None:
    try:
        file = os.open(piece.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError:
        return
    try:
        if not is_cached(file, piece.start):
            os.preadv(file, [buffer[: piece.end - piece.start]], piece.start)
    except OSError:
        return
    finally:
        os.close(file)


def is_cached(file: int, start: int) -> bool:
    """Whether the page cache has a byte: then what follows is taken to be there, and not copied for nothing.

    File systems that cannot tell, as many of a network, are taken not to have it.
    """
    try:
        return os.preadv(file, [bytearray(1)], start, os.RWF_NOWAIT) > 0
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL):
            return False
        raise


def lies_in_memory(path: Path) -> bool:
    """Whether a file's storage is memory: such a file system cannot tell that all is there."""
    if sys.platform != "linux":
        return False
    told = (ctypes.c_long * 64)()  # a ``struct statfs``, which begins with the type
    found = ctypes.CDLL(None).statfs(os.fsencode(path), told)
    return found == 0 and told[0] & 0xFFFFFFFF in IN_MEMORY
