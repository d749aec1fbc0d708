"""A driver whose GPU is memory of this process, for tests of what speaks to one."""

from __future__ import annotations

import ctypes
import threading

EVERYTHING = 1 << 40


class StandIn:
    """Does what it is asked for, and notes it.

    Args:
        free: bytes of its GPU.
        may_go_on: waited for before each copy.
        refuses: what it does not do: ``enter``, ``reserve``, ``stream``, ``buffer``, ``settle``, or ``copy`` but for
            the first.

    Attributes:
        reserved, buffers: address -> memory.
        streams: that are open.
        copied: bytes of each copy.
        told: names of what the GPU's memory was asked for, in order.
    """

    def __init__(self, free: int = EVERYTHING, may_go_on: threading.Semaphore | None = None, refuses: str = "") -> None:
        self.bytes_free, self.may_go_on, self.refuses = free, may_go_on, refuses
        self.reserved: dict[int, ctypes.Array] = {}
        self.buffers: dict[int, ctypes.Array] = {}
        self.streams: set[int] = set()
        self.copied: list[int] = []
        self.told: list[str] = []
        self._lock = threading.Lock()

    def enter(self) -> bool:
        return self.refuses != "enter"

    def free(self) -> int:
        return self.bytes_free - sum(map(len, self.reserved.values()))

    def reserve(self, nbytes: int) -> int:
        return 0 if self.refuses == "reserve" else _take(self.reserved, nbytes)

    def release(self, address: int) -> None:
        del self.reserved[address]
        self.told.append("release")

    def buffer(self, nbytes: int) -> int:
        return 0 if self.refuses == "buffer" else _take(self.buffers, nbytes)

    def drop(self, address: int) -> None:
        del self.buffers[address]  # an error where it is none

    def stream(self) -> int:
        if self.refuses == "stream":
            return 0
        with self._lock:
            made = max(self.streams, default=0) + 1
            self.streams.add(made)
        return made

    def end(self, stream: int) -> None:
        self.streams.remove(stream)

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> bool:
        if self.may_go_on is not None:
            assert self.may_go_on.acquire(timeout=20)
        with self._lock:
            if self.refuses == "copy" and self.copied:
                return False
            assert stream in self.streams and _holds(self.buffers, source, nbytes), "only what is page-locked"
            assert _holds(self.reserved, target, nbytes)
            ctypes.memmove(target, source, nbytes)
            self.copied.append(nbytes)
        return True

    def settle(self, stream: int = 0) -> bool:
        if not stream:
            self.told.append("settle")
        return self.refuses != "settle"

    def holds(self, address: int, nbytes: int) -> bool:
        """Whether bytes lie in what was reserved."""
        return _holds(self.reserved, address, nbytes)


def _take(memory: dict[int, ctypes.Array], nbytes: int) -> int:
    made = (ctypes.c_ubyte * nbytes)()
    memory[ctypes.addressof(made)] = made
    return ctypes.addressof(made)


def _holds(memory: dict[int, ctypes.Array], address: int, nbytes: int) -> bool:
    return any(start <= address and address + nbytes <= start + len(of) for start, of in list(memory.items()))
