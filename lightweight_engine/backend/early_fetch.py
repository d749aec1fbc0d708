"""Bytes of files that a GPU fetches before torch is there, to be copied from there by it. Loads no torch.

A few threads read files into page-locked buffers and pass them on: waits for the system, during which Python's lock is
free. They do so in C where that has been built (``reader``), as imports hold the lock for long. Page-locking the files
where they lie would copy once less, and makes imports wait for as long as it takes.

They lie in memory of the driver's, as torch's own cannot be had without torch, and are given back once all is loaded.
Until then they count as free (``held``): nothing that is planned meanwhile has less room because of them.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from .gpu_driver import Driver
from .kept_files import FileVersion
from .read_ahead import Span
from .reader import Job, flags, table


class Pace(NamedTuple):
    """How files are read: by so many threads, so many bytes at a time. Each has two buffers of that size."""

    readers: int
    piece: int


IN_PYTHON = Pace(min(2, os.cpu_count() or 1), 8 << 20)
"""After each piece a thread waits for Python's lock, so that there are to be few; to page-lock more takes so long that
imports wait for it. More threads are quicker, and slow down what is imported meanwhile for longer than they gain."""

IN_C = Pace(min(3, os.cpu_count() or 1), 2 << 20)
"""Buffers stay in the caches of the cores, which leaves imports more of the memory's pace."""

TURN = 0.0005
"""Seconds after which whoever has Python's lock gives it to a thread that waits, which then tells the GPU what to fetch
and reads on. It is ten times as long by default: the time that it takes to read several pieces."""

NICE = 5
"""How far the threads that read stand back behind those that import."""

ALIGNED = 512
"""Bytes, by a multiple of which a place on the GPU differs from that in the file: words stay whole."""


COMING, THERE, MISSING = 0, 1, 2
"""What a piece is; ``reader.c`` makes the first the second."""

LOOK = 0.0005
"""Seconds after which whoever waits for a piece looks again: in C nobody can be told that it has come."""


@dataclass(frozen=True, eq=False)
class Stretch:
    """Bytes of a file that have a place on the GPU.

    Attributes:
        place: how far into the GPU's memory the first lies.
        first: the number of its first piece, which those of the others follow.
        piece: bytes of each, but for the last.
    """

    start: int
    end: int
    place: int
    first: int
    piece: int

    @property
    def count(self) -> int:
        """Of its pieces."""
        return -(-(self.end - self.start) // self.piece)

    def wanted(self, start: int, end: int) -> tuple[int, int]:
        """The pieces that have bytes ``start`` to ``end``: the number of the first, and that after the last."""
        return self.first + (start - self.start) // self.piece, self.first - (self.start - end) // self.piece


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


class _Piece(NamedTuple):
    """As ``reader.c`` has it."""

    file: int
    start: int
    nbytes: int
    target: int


def _pieces(files: Iterable[FetchedFile], address: int) -> list[_Piece]:
    """All, by their numbers.

    Args:
        address: of the GPU's memory.
    """
    stretches = [(each, file.descriptor) for file in files for each in file.stretches]
    stretches.sort(key=lambda found: found[0].first)
    return [
        _Piece(descriptor, start, min(each.piece, each.end - start), address + each.place + start - each.start)
        for each, descriptor in stretches
        for start in range(each.start, each.end, each.piece)
    ]


class EarlyFetch:
    """What this process has on a GPU before torch is there; its threads may use it at once.

    Attributes:
        address, nbytes: of the GPU's memory that is held; 0 without any.
    """

    def __init__(self) -> None:
        self.address = self.nbytes = 0
        self._buffers = 0  # page-locked, kept to the end: while these are given back the driver does nothing else
        self._driver: Driver | None = None
        self._files: dict[FileVersion, FetchedFile] = {}
        self._pieces: list[_Piece] = []
        self._there = bytearray()  # of each piece what it is; changed by threads, each a byte of its own
        self._job: Job | None = None  # while it is read in C
        self._changing = threading.Lock()
        self._fetching = threading.Lock()  # held for as long as anything may still arrive
        self._started = self._closed = False

    @property
    def fetched(self) -> int:
        """Bytes that have arrived, whether they still are there or not."""
        return sum(piece.nbytes for piece, state in zip(self._pieces, self._there, strict=True) if state == THERE)

    def fetch(self, driver: Driver, spans: Sequence[Span], room: int, loop: Any = None) -> None:
        """Fetch files in order, as far as ``room`` bytes of the GPU go; whatever comes is there in the end.

        Once in the life of a process, and not once anything is loaded.

        Args:
            loop: see ``reader.read_pieces``.
        """
        pace = IN_PYTHON if loop is None else IN_C
        with self._fetching, ExitStack() as opened:
            files, nbytes = _placed(spans, room, pace.piece, opened)
            if self._hold(driver, files, nbytes):
                try:
                    read = self._in_python(driver) if loop is None else self._in_c(driver, loop)
                    self._fetch(driver, read, pace.readers)
                finally:  # whoever waits is told, whatever happened
                    self._job = None
                    self._drop_missing()
        if self._closed:
            self.close(wait=True)

    def _hold(self, driver: Driver, files: Sequence[FetchedFile], nbytes: int) -> bool:
        """Hold memory for all of this: from now on whoever asks for any of it waits."""
        with self._changing:
            if self._started or not nbytes or not driver.enter():
                return False
            self._started = True
            self.address = driver.reserve(nbytes)
            if self.address:
                atexit.register(self.close, wait=True)  # what reads in C would go on while the driver ends
                self._driver, self.nbytes = driver, nbytes
                self._pieces = _pieces(files, self.address)
                self._there = bytearray(len(self._pieces))
                self._files = {file.version: file for file in files}
            return bool(self.address)

    def _fetch(self, driver: Driver, read: Callable[[_Lane], None], readers: int) -> None:
        nbytes, readers = max(piece.nbytes for piece in self._pieces), min(readers, len(self._pieces))
        self._buffers = driver.buffer(2 * readers * nbytes)
        with _lanes(driver, readers if self._buffers else 0, self._buffers, nbytes) as lanes, _in_short_turns():
            for reader in _begun(partial(read, lane) for lane in lanes):
                reader.join()

    def _in_python(self, driver: Driver) -> Callable[[_Lane], None]:
        return partial(self._read, driver, iter(enumerate(self._pieces)))

    def _in_c(self, driver: Driver, loop: Any) -> Callable[[_Lane], None]:
        """The same in C."""
        job = Job(table(self._pieces), len(self._pieces), 0, 0, flags(self._there), *driver.functions)
        self._job = job
        if self._closed:
            job.stop = 1

        def read(lane: _Lane) -> None:
            _give_way()
            loop(job, lane.stream, *lane.buffers)

        return read

    def _read(self, driver: Driver, pieces: Iterator[tuple[int, _Piece]], lane: _Lane) -> None:
        """Bring pieces to the GPU, until none is left, one cannot be read, or nobody wants them any more.

        While one is read, the GPU fetches the one before.
        """
        fetching: int | None = None
        buffers = list(lane.buffers)
        _give_way()
        if not driver.enter():
            return
        while not self._closed and (following := next(pieces, None)) is not None:
            number, piece = following
            if not _fill(buffers[0], piece):
                break
            self._arrived(driver, lane.stream, fetching)
            told = driver.copy(piece.target, buffers[0], piece.nbytes, lane.stream)
            fetching = number if told else None
            buffers.reverse()
        self._arrived(driver, lane.stream, fetching)

    def _arrived(self, driver: Driver, stream: int, number: int | None) -> None:
        """Wait for a piece, and say so."""
        if number is not None and driver.settle(stream):
            self._there[number] = THERE

    def _drop_missing(self) -> None:
        """Nothing comes any more."""
        self._there[:] = self._there.replace(bytes([COMING]), bytes([MISSING]))
        for file in self._files.values():
            file.whole &= all(
                self._there.count(THERE, each.first, each.first + each.count) == each.count for each in file.stretches
            )

    def stand(self) -> None:
        """Something is going to be loaded: what has not begun by now is not begun any more."""
        with self._changing:
            self._started = True

    def file(self, version: FileVersion) -> FetchedFile | None:
        """What is fetched of a file, where it is the one that was there."""
        with self._changing:
            return self._files.get(version)

    def place(self, file: FetchedFile, start: int, end: int) -> int | None:
        """How far into the GPU's memory bytes of a file lie, all there by now; None for those that are not.

        Waits for those on their way, as that is the faster way.
        """
        stretch = file.stretch_of(start, end)
        if stretch is None:
            return None
        wanted = stretch.wanted(start, end)
        while self._there.find(COMING, *wanted) >= 0 and not self._closed:
            time.sleep(LOOK)
        there = not self._closed and self._there.count(THERE, *wanted) == wanted[1] - wanted[0]
        return stretch.place + start - stretch.start if there else None

    @contextmanager
    def held(self, index: int) -> Iterator[int]:
        """Bytes of a GPU that are held, and stay so inside the block, where what is free can be asked for."""
        with self._changing:
            yield self.nbytes if self._driver is not None and self._driver.index == index else 0

    def close(self, *, wait: bool = False) -> None:
        """Give the GPU's memory back, once it has done all that it was told; nothing is fetched after that.

        Args:
            wait: it is free in the end; else, where a file is being read, whoever reads it does so: from a slow disk it
                may take long.
        """
        with self._changing:
            self._closed = self._started = True
        if (job := self._job) is not None:
            job.stop = 1
        if self._fetching.acquire(blocking=wait):
            try:
                if self.address:
                    giving = threading.Thread(target=self._give_back, name="early fetch")  # it enters the GPU's context
                    giving.start()
                    giving.join()
            finally:
                self._fetching.release()
                atexit.unregister(self.close)

    def _give_back(self) -> None:
        if self._driver is not None and self._driver.enter():
            self._driver.settle()
            with self._changing:
                self._driver.release(self.address)
                self.address = self.nbytes = 0
                self._files = {}
            if self._buffers:
                self._driver.drop(self._buffers)
                self._buffers = 0


def _placed(spans: Sequence[Span], room: int, piece: int, opened: ExitStack) -> tuple[list[FetchedFile], int]:
    """Files, each opened once, with places for as much of them as there is room for; and the bytes that they take."""
    files: dict[Path, FetchedFile] = {}
    used = number = 0
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
                file.stretches.append(Stretch(span.start, end, place, number, piece))
                used, number = place + end - span.start, number + file.stretches[-1].count
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
    view, start = memoryview((ctypes.c_ubyte * piece.nbytes).from_address(buffer)).cast("B"), piece.start
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
    return max(2 * pace.readers * pace.piece for pace in (IN_PYTHON, IN_C))
