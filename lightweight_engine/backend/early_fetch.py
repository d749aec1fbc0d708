"""Bytes of files that a GPU has fetched before torch is there, to be copied from there by it. Loads no torch.

They lie in memory of the driver's, as torch's own cannot be had without torch, and are given back once all is loaded.
Until then they count as free (``held``): nothing that is planned meanwhile has less room because of them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from .gpu_driver import Driver


class EarlyFetch:
    """Pieces of page-locked memory on a GPU, known by where they lie on the host; threads may use it at once.

    Attributes:
        address, nbytes: of the GPU's memory that is held for them; 0 without any.
        stream: of the copies: who reads a piece waits for what it has been told.
        fetched: bytes that the GPU was told to fetch, whether they still are there or not.
    """

    def __init__(self) -> None:
        self.address = self.nbytes = self.stream = self.fetched = 0
        self._driver: Driver | None = None
        self._places: dict[int, int] = {}
        self._changing = threading.Lock()
        self._closed = False

    def open(self, driver: Driver, nbytes: int) -> None:
        """Hold so much of the GPU's memory, where the driver gives it, by a thread that speaks for the GPU."""
        with self._changing:
            if self._closed or self.address:
                return
            self._driver, self.stream = driver, driver.stream()
            self.address = driver.reserve(nbytes) if self.stream else 0
            self.nbytes = nbytes if self.address else 0

    def fetch(self, source: int, nbytes: int) -> None:
        """Tell the GPU to fetch a piece; one that it cannot be told of stays where it is."""
        with self._changing:
            used = self.fetched
            if self._driver is None or used + nbytes > self.nbytes:
                return
            if self._driver.fetch(self.address + used, source, nbytes, self.stream):
                self._places[source] = used
                self.fetched += nbytes

    def place(self, source: int) -> int | None:
        """How far into the GPU's memory a piece lies; None for one that is not there."""
        return self._places.get(source)

    @contextmanager
    def held(self) -> Iterator[int]:
        """Bytes of the GPU that are held, and stay so inside the block, where what is free can be asked for."""
        with self._changing:
            yield self.nbytes

    def close(self) -> None:
        """Give the GPU's memory back, once it has done all that it was told; nothing is fetched after that."""
        with self._changing:
            self._closed = True
            self._places = {}
            if self.address:
                giving = threading.Thread(target=self._give_back, name="early fetch")  # as it enters the GPU's context
                giving.start()
                giving.join()
            self.address = self.nbytes = 0

    def _give_back(self) -> None:
        if self._driver is not None and self._driver.enter():
            self._driver.settle()
            self._driver.release(self.address)


@cache
def early_fetch() -> EarlyFetch:
    """That of this process, as the files that it has page-locked are."""
    return EarlyFetch()
