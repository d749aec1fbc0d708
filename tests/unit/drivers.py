"""A driver whose GPU is memory of this process, for tests of what speaks to one."""

from __future__ import annotations

import ctypes
import threading

EVERYTHING = 1 << 40


class StandIn:
    """Does what it is asked for, and notes it.

    Args:
        most: pieces that it locks before it refuses.
        free: bytes of its GPU.
        may_go_on: waited for before each piece.
        refuses: what it does not do: ``reserve``, ``stream``, or ``fetch`` but for the first.

    Attributes:
        locked, reserved: address -> bytes.
        told: names of what was done, in order.
    """

    def __init__(
        self,
        most: int = 1 << 20,
        free: int = EVERYTHING,
        may_go_on: threading.Semaphore | None = None,
        refuses: str = "",
    ) -> None:
        self.most, self.bytes_free, self.may_go_on, self.refuses = most, free, may_go_on, refuses
        self.locked: dict[int, int] = {}
        self.reserved: dict[int, ctypes.Array] = {}
        self.told: list[str] = []
        self.count = 0

    def enter(self) -> bool:
        return True

    def lock(self, address: int, nbytes: int) -> bool:
        if self.may_go_on is not None:
            assert self.may_go_on.acquire(timeout=20)
        self.count += 1
        if self.count > self.most:
            return False
        self.locked[address] = nbytes
        return True

    def unlock(self, address: int) -> None:
        del self.locked[address]  # an error where it is not locked
        self.told.append("unlock")

    def free(self) -> int:
        return self.bytes_free - sum(map(len, self.reserved.values()))

    def reserve(self, nbytes: int) -> int:
        if self.refuses == "reserve":
            return 0
        memory = (ctypes.c_ubyte * nbytes)()
        self.reserved[ctypes.addressof(memory)] = memory
        return ctypes.addressof(memory)

    def release(self, address: int) -> None:
        del self.reserved[address]
        self.told.append("release")

    def stream(self) -> int:
        return 0 if self.refuses == "stream" else 7

    def fetch(self, target: int, source: int, nbytes: int, stream: int) -> bool:
        if self.refuses == "fetch" and "fetch" in self.told:
            return False
        assert stream == 7 and self.locked.get(source) == nbytes, "only what is locked, piece by piece"
        assert self.holds(target, nbytes)
        ctypes.memmove(target, source, nbytes)
        self.told.append("fetch")
        return True

    def settle(self) -> None:
        self.told.append("settle")

    def holds(self, address: int, nbytes: int) -> bool:
        """Whether bytes lie in what was reserved."""
        return any(start <= address and address + nbytes <= start + len(of) for start, of in self.reserved.items())
