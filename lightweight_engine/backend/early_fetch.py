"""Bytes of files that a GPU fetches before torch is there, to be copied from there by it. Loads no torch.

A few threads read files into page-locked buffers and pass them on: waits for the system, during which Python's lock is
free. Page-locking the files where they lie would copy once less, and makes imports wait for as long as it takes.

They lie in memory of the driver's, as torch's own cannot be had without torch, and are given back once all is loaded.
Until then they count as free (``held``): nothing that is planned meanwhile has less room because of them.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from .gpu_driver import Driver
from .read_ahead import Span

READERS = min(4, os.cpu_count() or 1)
"""More are quicker, and slow down what is imported meanwhile."""

PIECE = 64 << 20
"""Bytes that are read at a time, after which a thread waits for Python's lock. Each has two such buffers."""

ALIGNED = 512
"""Bytes, by a multiple of which a place on the GPU differs from that in the file: words stay whole."""


@dataclass(eq=False)
class Stretch:
    """Bytes of a file that have a place on the GPU.

    Attributes:
        file: descriptor, while it is read.
        place: how far into the GPU's memory the first lies.
        pieces: where each begins -> whether it is there by now; one that will not come is missing.
    """

    file: int
    start: int
    end: int
    place: int
    pieces: dict[int, bool] = field(default_factory=dict)

    def wanted(self, start: int, end: int) -> range:
        """The pieces that have bytes ``start`` to ``end``."""
        return range(start - (start - self.start) % PIECE, end, PIECE)


@dataclass(eq=False)
class FetchedFile:
    """What is fetched of a file.

    Attributes:
        whole: all that was asked for.
    """

    stretches: list[Stretch] = field(default_factory=list)
    whole: bool = True

    def stretch_of(self, start: int, end: int) -> Stretch | None:
        """The one that has all of these bytes."""
        return next((each for each in self.stretches if each.start <= start and end <= each.end), None)


class EarlyFetch:
    """What this process has on a GPU before torch is there, told by any thread: a file is known by what it is, not by
    its name.

    Attributes:
        address, nbytes: of the GPU's memory that is held; 0 without any.
        fetched: bytes that have arrived, whether they still are there or not.
    """

    def __init__(self) -> None:
        self.address = self.nbytes = self.fetched = 0
        self._driver: Driver | None = None
        self._files: dict[tuple[int, ...], FetchedFile] = {}
        self._changed = threading.Condition()
        self._fetching = threading.Lock()  # held for as long as anything may still arrive
        self._closed = False

    def fetch(self, driver: Driver, spans: Sequence[Span], room: int) -> None:
        """Fetch files in order, as far as ``room`` bytes of the GPU go; whatever comes is there in the end."""
        with self._fetching, ExitStack() as opened:
            stretches = self._open(driver, spans, room, opened)
            pieces = [(stretch, start) for stretch in stretches for start in stretch.pieces]
            left = iter(pieces)
            readers = [
                threading.Thread(target=self._read, args=(driver, left), name="early fetch", daemon=True)
                for _ in range(min(READERS, len(pieces)))
            ]
            for reader in readers:
                reader.start()
            for reader in readers:
                reader.join()
            with self._changed:
                for stretch in stretches:
                    stretch.pieces = {start: True for start, there in stretch.pieces.items() if there}
                self._changed.notify_all()

    def _open(self, driver: Driver, spans: Sequence[Span], room: int, opened: ExitStack) -> list[Stretch]:
        """Hold memory for what there is room for: from now on whoever asks for any of it waits."""
        with self._changed:
            if self._closed or self.address or not driver.enter():
                return []
            files: dict[tuple[int, ...], FetchedFile] = {}
            stretches: list[Stretch] = []
            used = 0
            for span in spans:
                with suppress(OSError):
                    descriptor = opened.enter_context(span.path.open("rb", buffering=0)).fileno()
                    file = files.setdefault(_identity(os.fstat(descriptor)), FetchedFile())
                    place = -(-used // ALIGNED) * ALIGNED + span.start % ALIGNED
                    end = min(span.end, span.start + max(0, room - place))
                    file.whole &= end == span.end
                    if end > span.start:
                        pieces = dict.fromkeys(range(span.start, end, PIECE), False)
                        stretches.append(Stretch(descriptor, span.start, end, place, pieces))
                        file.stretches.append(stretches[-1])
                        used = place + end - span.start
            self.address = driver.reserve(used) if used else 0
            if not self.address:
                return []
            self._driver, self.nbytes, self._files = driver, used, files
            return stretches

    def _read(self, driver: Driver, pieces: Iterator[tuple[Stretch, int]]) -> None:
        """Bring pieces to the GPU, until none is left, one cannot be read, or nobody wants them any more.

        While one is read, the GPU fetches the one before.
        """
        fetching: tuple[Stretch, int, int] | None = None
        with _lane(driver) as (stream, buffers):
            while all(buffers) and not self._closed and (piece := next(pieces, None)) is not None:
                (stretch, start), buffer = piece, buffers[0]
                count = min(PIECE, stretch.end - start)
                if not _fill(buffer, stretch.file, start, count):
                    break
                self._arrived(driver, stream, fetching)
                target = self.address + stretch.place + start - stretch.start
                fetching = (stretch, start, count) if driver.copy(target, buffer, count, stream) else None
                buffers.reverse()
            self._arrived(driver, stream, fetching)

    def _arrived(self, driver: Driver, stream: int, fetching: tuple[Stretch, int, int] | None) -> None:
        """Wait for a piece, and say so."""
        if fetching is None or not driver.settle(stream):
            return
        stretch, start, count = fetching
        with self._changed:
            stretch.pieces[start] = True
            self.fetched += count
            self._changed.notify_all()

    def file(self, path: Path) -> FetchedFile | None:
        """What is fetched of the file at a path, where it is the one that was there."""
        try:
            return self._files.get(_identity(os.stat(path))) if self._files else None
        except OSError:
            return None

    def place(self, file: FetchedFile, start: int, end: int) -> int | None:
        """How far into the GPU's memory bytes of a file lie, all there by now; None for those that are not.

        Waits for those on their way, as that is the faster way.
        """
        stretch = file.stretch_of(start, end)
        if stretch is None:
            return None
        wanted = stretch.wanted(start, end)
        if not all(map(stretch.pieces.get, wanted)):
            with self._changed:
                self._changed.wait_for(
                    lambda: self._closed or all(stretch.pieces.get(each) is not False for each in wanted)
                )
        there = not self._closed and all(map(stretch.pieces.get, wanted))
        return stretch.place + start - stretch.start if there else None

    @contextmanager
    def held(self) -> Iterator[int]:
        """Bytes of the GPU that are held, and stay so inside the block, where what is free can be asked for."""
        with self._changed:
            yield self.nbytes

    def close(self) -> None:
        """Give the GPU's memory back, once it has done all that it was told; nothing is fetched after that."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if not self._files:
            return
        with self._fetching:
            giving = threading.Thread(target=self._give_back, name="early fetch")  # as it enters the GPU's context
            giving.start()
            giving.join()

    def _give_back(self) -> None:
        if self._driver is not None and self._driver.enter():
            self._driver.settle()
            with self._changed:
                self._driver.release(self.address)
                self.address = self.nbytes = 0
                self._files = {}


@contextmanager
def _lane(driver: Driver) -> Iterator[tuple[int, list[int]]]:
    """A stream and two buffers; 0 in place of what the driver refuses."""
    stream = driver.stream() if driver.enter() else 0
    buffers = [driver.buffer(PIECE) if stream else 0 for _ in range(2)]
    try:
        yield stream, buffers
    finally:
        if stream:
            driver.settle(stream)
            driver.end(stream)
        for buffer in filter(None, buffers):
            driver.drop(buffer)


def _fill(buffer: int, file: int, start: int, count: int) -> bool:
    """Bytes of a file to an address; whether all could be read: whoever needs them says why not."""
    view = memoryview((ctypes.c_ubyte * count).from_address(buffer)).cast("B")
    with suppress(OSError):
        while len(view) and (done := os.preadv(file, [view], start)):
            view, start = view[done:], start + done
    return not len(view)


@cache
def early_fetch() -> EarlyFetch:
    """That of this process, as the GPU's context is: a start begins it, and the load that follows uses it up."""
    return EarlyFetch()


def _identity(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def can_fetch() -> bool:
    """Whether this system reads files in this way."""
    return hasattr(os, "preadv")


def buffered() -> int:
    """Bytes of the host that fetching takes."""
    return READERS * 2 * PIECE
