"""Files mapped and page-locked where they lie, so that a GPU fetches from them with nobody copying. Loads no torch.

It costs no memory beside the page cache, a twentieth of a second for a GiB, and can be done while torch is imported.
Where it cannot be done nothing is lost: what is not locked goes the way of ``staging``.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from .read_ahead import Span, is_cached, lies_in_memory

PIECE = 128 << 20
"""Bytes that are locked at a time: the process's own memory cannot grow meanwhile."""

PROBE = 4 << 20
READ_ONLY = 8


class Driver(Protocol):
    """What page-locks memory for a GPU."""

    def enter(self) -> bool:
        """Let this thread speak for the GPU."""
        ...

    def lock(self, address: int, nbytes: int) -> bool: ...

    def unlock(self, address: int) -> None: ...

    def free(self) -> int:
        """Bytes of the GPU that nobody has."""
        ...


class CudaDriver:
    """The GPU's own.

    Args:
        library: of the driver.
        context: the GPU's, which all of this process shares.
    """

    def __init__(self, library: Any, context: ctypes.c_void_p) -> None:
        self._library, self._context = library, context

    def enter(self) -> bool:
        return self._library.cuCtxSetCurrent(self._context) == 0

    def lock(self, address: int, nbytes: int) -> bool:
        return self._library.cuMemHostRegister_v2(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), READ_ONLY) == 0

    def unlock(self, address: int) -> None:
        self._library.cuMemHostUnregister(ctypes.c_void_p(address))

    def free(self) -> int:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        done = self._library.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
        return free.value if done == 0 else 0


@dataclass(eq=False)
class LockedFile:
    """A mapped file, some pieces of which are page-locked.

    Attributes:
        address, size: of the mapping.
        pieces: start -> whether it is locked by now; those that will not be are missing.
    """

    identity: tuple[int, ...]
    address: int
    size: int
    pieces: dict[int, bool] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether all of it is locked, or will be."""
        return len(self.pieces) * PIECE >= self.size

    def cuts(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Bytes ``start`` to ``end`` of the file cut where pieces are: each is locked by itself."""
        while start < end:
            stop = min(end, (start // PIECE + 1) * PIECE)
            yield start, stop
            start = stop


class PageLocked:
    """What this process has page-locked, told by any thread: a file is known by what it is, not by its name.

    Attributes:
        nbytes: that were locked, whether they still are or not.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._files: dict[tuple[int, ...], LockedFile] = {}
        self._changed = threading.Condition()
        self._locking = threading.Lock()  # held for as long as anything may still be locked
        self._driver: Driver | None = None
        self._closed = False

    def lock(self, driver: Driver, spans: Sequence[Span], limit: int) -> None:
        """Lock files, each piece that is in memory, in order, until ``limit`` bytes are or the driver refuses."""
        with self._locking:
            try:
                if driver.enter():
                    self._driver = driver
                    self._lock_all(driver, self._opened(spans), limit)
            finally:
                with self._changed:
                    for file in self._files.values():
                        file.pieces = {start: True for start, locked in file.pieces.items() if locked}
                    self._changed.notify_all()

    def _opened(self, spans: Sequence[Span]) -> list[tuple[LockedFile, int]]:
        """The pieces in order, each file mapped: from now on whoever asks for one of them waits."""
        found: list[tuple[LockedFile, int]] = []
        with self._changed:
            for span in spans:
                if self._closed or not os.path.isfile(span.path):
                    continue
                with span.path.open("rb") as opened:
                    file, in_memory = self._mapped(opened.fileno()), lies_in_memory(span.path)
                    for start in range(span.start // PIECE * PIECE, span.end, PIECE):
                        whole = in_memory or _is_cached(opened.fileno(), start, span.end)
                        if whole and start not in file.pieces:
                            file.pieces[start] = False
                            found.append((file, start))
        return found

    def _mapped(self, file: int) -> LockedFile:
        identity = _identity(os.fstat(file))
        if identity not in self._files:
            size = os.fstat(file).st_size
            self._files[identity] = LockedFile(identity, _map(file, size), size)
        return self._files[identity]

    def _lock_all(self, driver: Driver, pieces: Sequence[tuple[LockedFile, int]], limit: int) -> None:
        for file, start in pieces:
            nbytes = min(PIECE, file.size - start)
            limit -= nbytes
            if limit < 0 or self._closed or not driver.lock(file.address + start, nbytes):
                return
            with self._changed:
                file.pieces[start] = True
                self.nbytes += nbytes
                self._changed.notify_all()

    def file(self, path: Path) -> LockedFile | None:
        """The file at a path, where it is the one that was mapped."""
        try:
            return self._files.get(_identity(os.stat(path))) if self._files else None
        except OSError:
            return None

    def holds(self, file: LockedFile, start: int, end: int) -> bool:
        """Whether bytes of a file are locked; waits for those that are about to be, as that is the faster way."""
        wanted = range(start // PIECE * PIECE, end, PIECE)
        if all(map(file.pieces.get, wanted)):
            return not self._closed
        with self._changed:
            self._changed.wait_for(lambda: self._closed or all(file.pieces.get(each) is not False for each in wanted))
            return not self._closed and all(map(file.pieces.get, wanted))

    def close(self) -> threading.Thread | None:
        """Unlock all, in a thread, once nobody fetches any more; nothing is locked after that.

        Returns:
            The thread, which nobody has to wait for.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if not self._files:
            return None
        thread = threading.Thread(target=self._unlock, name="page-locked files", daemon=True)
        thread.start()
        return thread

    def _unlock(self) -> None:
        with self._locking, self._changed:
            files, self._files = list(self._files.values()), {}
        if self._driver is None or not self._driver.enter():
            return
        for file in files:
            for start in [start for start, locked in file.pieces.items() if locked]:
                self._driver.unlock(file.address + start)
            _c_library().munmap(ctypes.c_void_p(file.address), ctypes.c_size_t(file.size))


@cache
def page_locked() -> PageLocked:
    """That of this process, as the GPU's context is: a start begins it, and the load that follows uses it up."""
    return PageLocked()


def _identity(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _is_cached(file: int, start: int, end: int) -> bool:
    """Whether the page cache has a piece; where it has not, locking it would read it, page by page."""
    with suppress(OSError, AttributeError):
        return all(is_cached(file, at) for at in range(start, min(start + PIECE, end), PROBE))
    return False


def _map(file: int, size: int) -> int:
    """The address of a file that is mapped for reading, shared with the page cache."""
    address = _c_library().mmap(None, ctypes.c_size_t(size), mmap.PROT_READ, mmap.MAP_SHARED, file, ctypes.c_long(0))
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError("the file cannot be mapped")
    return address


@cache
def _c_library() -> Any:
    library = ctypes.CDLL(None)
    library.mmap.restype = ctypes.c_void_p
    return library


def can_lock() -> bool:
    """Whether this system maps files in this way."""
    return sys.platform == "linux"
