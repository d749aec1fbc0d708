"""Bytes of files that a GPU fetches before torch is there, to be copied from there by it. Loads no torch.

A few threads read files into page-locked buffers and pass them on: waits for the system, during which Python's lock is
free. Page-locking the files where they lie would copy once less, and makes imports wait for as long as it takes.

They lie in memory of the driver's, as torch's own cannot be had without torch, and are given back once all is loaded.
Until then they count as free (``held``): nothing that is planned meanwhile has less room because of them.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

from .gpu_driver import Driver
from .kept_files import FileVersion
from .read_ahead import Span

READERS = min(2, os.cpu_count() or 1)
"""More are quicker, and slow down what is imported meanwhile, for longer than they gain."""

PIECE = 8 << 20
"""Bytes that are read at a time, after which a thread waits for Python's lock. Each has two such buffers; to page-lock
larger ones takes so long that imports wait for it."""

TURN = 0.0005
"""Seconds after which whoever has Python's lock gives it to a thread that waits, which then tells the GPU what to fetch
and reads on. It is ten times as long by default: the time that it takes to read several pieces."""

NICE = 5
"""How far the threads that read stand back behind those that import."""

ALIGNED = 512
"""Bytes, by a multiple of which a place on the GPU differs from that in the file: words stay whole."""


@dataclass(eq=False)
class Stretch:
    """Bytes of a file that have a place on the GPU.

    Attributes:
        place: how far into the GPU's memory the first lies.
        pieces: where each begins -> whether it is there by now; one that will not come is missing.
    """

    start: int
    end: int
    place: int
    pieces: dict[int, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pieces = dict.fromkeys(range(self.start, self.end, PIECE), False)

    def wanted(self, start: int, end: int) -> range:
        """The pieces that have bytes ``start`` to ``end``."""
        return range(start - (start - self.start) % PIECE, end, PIECE)


@dataclass(eq=False)
class FetchedFile:
    """What is fetched of a file.

    Attributes:
        descriptor: while it is read.
        whole: all that was asked for is there, or will be.
    """

    version: FileVersion
    descriptor: int
    stretches: list[Stretch] = field(default_factory=list)
    whole: bool = True

    def stretch_of(self, start: int, end: int) -> Stretch | None:
        """The one that has all of these bytes."""
        return next((each for each in self.stretches if each.start <= start and end <= each.end), None)

    def drop_missing(self) -> None:
        """Nothing comes any more."""
        for stretch in self.stretches:
            self.whole &= all(stretch.pieces.values())
            stretch.pieces = {start: True for start, there in stretch.pieces.items() if there}


@dataclass(frozen=True)
class _Piece:
    file: int
    stretch: Stretch
    start: int

    @property
    def count(self) -> int:
        return min(PIECE, self.stretch.end - self.start)

    @property
    def place(self) -> int:
        return self.stretch.place + self.start - self.stretch.start


class EarlyFetch:
    """What this process has on a GPU before torch is there; its threads may use it at once.

    Attributes:
        address, nbytes: of the GPU's memory that is held; 0 without any.
        fetched: bytes that have arrived, whether they still are there or not.
    """

    def __init__(self) -> None:
        self.address = self.nbytes = self.fetched = 0
        self._buffers = 0  # page-locked, kept to the end: while these are given back the driver does nothing else
        self._driver: Driver | None = None
        self._files: dict[FileVersion, FetchedFile] = {}
        self._changed = threading.Condition()
        self._fetching = threading.Lock()  # held for as long as anything may still arrive
        self._started = self._closed = False

    def fetch(self, driver: Driver, spans: Sequence[Span], room: int) -> None:
        """Fetch files in order, as far as ``room`` bytes of the GPU go; whatever comes is there in the end.

        Once in the life of a process, and not once anything is loaded.
        """
        with self._fetching, ExitStack() as opened:
            files, nbytes = _placed(spans, room, opened)
            if self._hold(driver, files, nbytes):
                try:
                    self._fetch(driver, files)
                finally:  # whoever waits is told, whatever happened
                    with self._changed:
                        for file in files:
                            file.drop_missing()
                        self._changed.notify_all()
        if self._closed:
            self.close(wait=True)

    def _hold(self, driver: Driver, files: Sequence[FetchedFile], nbytes: int) -> bool:
        """Hold memory for all of this: from now on whoever asks for any of it waits."""
        with self._changed:
            if self._started or not nbytes or not driver.enter():
                return False
            self._started = True
            self.address = driver.reserve(nbytes)
            if self.address:
                self._driver, self.nbytes = driver, nbytes
                self._files = {file.version: file for file in files}
            return bool(self.address)

    def _fetch(self, driver: Driver, files: Sequence[FetchedFile]) -> None:
        pieces = sorted(
            (
                _Piece(file.descriptor, stretch, start)
                for file in files
                for stretch in file.stretches
                for start in stretch.pieces
            ),
            key=lambda piece: piece.place,
        )
        left, nbytes, readers = iter(pieces), max(piece.count for piece in pieces), min(READERS, len(pieces))
        self._buffers = driver.buffer(2 * readers * nbytes)
        with _lanes(driver, readers if self._buffers else 0, self._buffers, nbytes) as lanes, _in_short_turns():
            for reader in _begun(partial(self._read, driver, left, lane) for lane in lanes):
                reader.join()

    def _read(self, driver: Driver, pieces: Iterator[_Piece], lane: _Lane) -> None:
        """Bring pieces to the GPU, until none is left, one cannot be read, or nobody wants them any more.

        While one is read, the GPU fetches the one before.
        """
        fetching: _Piece | None = None
        buffers = list(lane.buffers)
        _give_way()
        if not driver.enter():
            return
        while not self._closed and (piece := next(pieces, None)) is not None:
            if not _fill(buffers[0], piece):
                break
            self._arrived(driver, lane.stream, fetching)
            told = driver.copy(self.address + piece.place, buffers[0], piece.count, lane.stream)
            fetching = piece if told else None
            buffers.reverse()
        self._arrived(driver, lane.stream, fetching)

    def _arrived(self, driver: Driver, stream: int, piece: _Piece | None) -> None:
        """Wait for a piece, and say so."""
        if piece is not None and driver.settle(stream):
            with self._changed:
                piece.stretch.pieces[piece.start] = True
                self.fetched += piece.count
                self._changed.notify_all()

    def stand(self) -> None:
        """Something is going to be loaded: what has not begun by now is not begun any more."""
        with self._changed:
            self._started = True

    def file(self, version: FileVersion) -> FetchedFile | None:
        """What is fetched of a file, where it is the one that was there."""
        with self._changed:
            return self._files.get(version)

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
    def held(self, index: int) -> Iterator[int]:
        """Bytes of a GPU that are held, and stay so inside the block, where what is free can be asked for."""
        with self._changed:
            yield self.nbytes if self._driver is not None and self._driver.index == index else 0

    def close(self, *, wait: bool = False) -> None:
        """Give the GPU's memory back, once it has done all that it was told; nothing is fetched after that.

        Args:
            wait: it is free in the end; else, where a file is being read, whoever reads it does so: from a slow disk it
                may take long.
        """
        with self._changed:
            self._closed = self._started = True
            self._changed.notify_all()
        if self._fetching.acquire(blocking=wait):
            try:
                if self.address:
                    giving = threading.Thread(target=self._give_back, name="early fetch")  # it enters the GPU's context
                    giving.start()
                    giving.join()
            finally:
                self._fetching.release()

    def _give_back(self) -> None:
        if self._driver is not None and self._driver.enter():
            self._driver.settle()
            with self._changed:
                self._driver.release(self.address)
                self.address = self.nbytes = 0
                self._files = {}
            if self._buffers:
                self._driver.drop(self._buffers)
                self._buffers = 0


def _placed(spans: Sequence[Span], room: int, opened: ExitStack) -> tuple[list[FetchedFile], int]:
    """Files, each opened once, with places for as much of them as there is room for; and the bytes that they take."""
    files: dict[Path, FetchedFile] = {}
    used = 0
    for span in spans:
        with suppress(OSError):  # told by whoever loads it
            if span.path not in files:
                descriptor = opened.enter_context(span.path.open("rb", buffering=0)).fileno()
                files[span.path] = FetchedFile(FileVersion.of(span.path, descriptor), descriptor)
            file = files[span.path]
            place = -(-used // ALIGNED) * ALIGNED + span.start % ALIGNED
            end = min(span.end, span.start + max(0, room - place))
            file.whole &= end == span.end
            if end > span.start:
                file.stretches.append(Stretch(span.start, end, place))
                used = place + end - span.start
    return list(files.values()), used


def _begun(jobs: Iterable[Callable[[], None]]) -> list[threading.Thread]:
    """Threads that do these jobs, as many as may be had."""
    begun: list[threading.Thread] = []
    with suppress(RuntimeError):  # the system gives no more
        for job in jobs:
            thread = threading.Thread(target=job, name="early fetch", daemon=True)
            thread.start()
            begun.append(thread)
    return begun


@dataclass(frozen=True)
class _Lane:
    stream: int
    buffers: tuple[int, int]


@contextmanager
def _lanes(driver: Driver, count: int, buffers: int, nbytes: int) -> Iterator[list[_Lane]]:
    """Streams with two buffers each, as many as the driver has; all made before the first is used.

    Args:
        buffers: the address of the first; each has ``nbytes``.
    """
    lanes: list[_Lane] = []
    try:
        for start in range(buffers, buffers + 2 * count * nbytes, 2 * nbytes):
            if stream := driver.stream():
                lanes.append(_Lane(stream, (start, start + nbytes)))
        yield lanes
    finally:
        for lane in lanes:
            driver.end(lane.stream)


@contextmanager
def _in_short_turns() -> Iterator[None]:
    """Threads that wait for Python's lock get it soon."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(min(TURN, usual))
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


def _give_way() -> None:
    """Let whatever else this process does come first where both want a core: imports take a tenth less."""
    if sys.platform == "linux":  # where a thread has a priority of its own
        with suppress(OSError):
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICE)


def _fill(buffer: int, piece: _Piece) -> bool:
    """Bytes of a file to an address; whether all could be read: whoever needs them says why not."""
    view, start = memoryview((ctypes.c_ubyte * piece.count).from_address(buffer)).cast("B"), piece.start
    with suppress(OSError):
        while len(view) and (done := os.preadv(piece.file, [view], start)):
            view, start = view[done:], start + done
    return not len(view)


@cache
def early_fetch() -> EarlyFetch:
    """That of this process, as the GPU's context is: a start begins it, and the load that follows uses it up."""
    return EarlyFetch()


def can_fetch() -> bool:
    """Whether this system reads files in this way."""
    return hasattr(os, "preadv")


def buffered() -> int:
    """Bytes of the host that fetching takes."""
    return READERS * 2 * PIECE
