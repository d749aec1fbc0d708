"""A driver whose GPU is memory of this process, for tests of what speaks to one."""

from __future__ import annotations

import ctypes
import threading

EVERYTHING = 1 << 40
CONTEXT = 0x1234


class StandIn:
    """Does what it is asked for, and notes it. Copies are done when somebody waits for them, as late as can be.

    Args:
        free: bytes of its GPU.
        may_go_on: waited for before each copy is taken.
        refuses: what it does not do: ``enter``, ``reserve``, ``stream``, ``buffer``, ``settle``, or ``copy`` but for
            the first.

    Attributes:
        reserved, buffers: address -> memory.
        streams: open ones -> copies that they still have to do.
        copied: bytes of each copy that was taken.
        told: names of what was given back or waited for, in order.
    """

    index = 0

    def __init__(self, free: int = EVERYTHING, may_go_on: threading.Semaphore | None = None, refuses: str = "") -> None:
        self.bytes_free, self.may_go_on, self.refuses = free, may_go_on, refuses
        self.reserved: dict[int, ctypes.Array] = {}
        self.buffers: dict[int, ctypes.Array] = {}
        self.streams: dict[int, list[tuple[int, int, int]]] = {}
        self.copied: list[int] = []
        self.told: list[str] = []
        self._lock = threading.Lock()
        self._in_c = (
            ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(lambda context: context != CONTEXT or not self.enter()),
            ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)(
                lambda target, source, nbytes, stream: not self.copy(target, source, nbytes, stream)
            ),
            ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(lambda stream: not self.settle(stream)),
        )

    @property
    def functions(self) -> tuple[int, int, int, int]:
        enter, copy, settle = (ctypes.cast(each, ctypes.c_void_p).value or 0 for each in self._in_c)
        return enter, CONTEXT, copy, settle

    def enter(self) -> bool:
        return self.refuses != "enter"

    def free(self) -> int:
        return self.bytes_free - sum(map(len, self.reserved.values()))

    def reserve(self, nbytes: int) -> int:
        return 0 if self.refuses == "reserve" else _take(self.reserved, nbytes)

    def release(self, address: int) -> None:
        assert not any(self.streams.values()), "copies are on their way there"
        del self.reserved[address]
        self.told.append("release")

    def buffer(self, nbytes: int) -> int:
        return 0 if self.refuses == "buffer" else _take(self.buffers, nbytes)

    def drop(self, address: int) -> None:
        for copies in self.streams.values():
            assert not any(_lies_in(self.buffers[address], source) for _, source, _ in copies), (
                "it is still fetched from"
            )
        del self.buffers[address]
        self.told.append("drop")

    def stream(self) -> int:
        if self.refuses == "stream":
            return 0
        with self._lock:
            made = max(self.streams, default=0) + 1
            self.streams[made] = []
        return made

    def end(self, stream: int) -> None:
        assert not self.streams.pop(stream), "it has something left to do"

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> bool:
        if self.may_go_on is not None:
            assert self.may_go_on.acquire(timeout=20)
        with self._lock:
            if self.refuses == "copy" and self.copied:
                return False
            assert _holds(self.buffers, source, nbytes), "only what is page-locked"
            assert _holds(self.reserved, target, nbytes)
            self.streams[stream].append((target, source, nbytes))
            self.copied.append(nbytes)
        return True

    def settle(self, stream: int = 0) -> bool:
        if not stream:
            self.told.append("settle")
        for copies in [self.streams[stream]] if stream else list(self.streams.values()):
            for copy in copies if self.refuses != "settle" else ():
                ctypes.memmove(*copy)
            copies.clear()
        return self.refuses != "settle"


def _take(memory: dict[int, ctypes.Array], nbytes: int) -> int:
    made = (ctypes.c_ubyte * nbytes)()
    memory[ctypes.addressof(made)] = made
    return ctypes.addressof(made)


def _holds(memory: dict[int, ctypes.Array], address: int, nbytes: int) -> bool:
    return any(start <= address and address + nbytes <= start + len(of) for start, of in list(memory.items()))


def _lies_in(memory: ctypes.Array, address: int) -> bool:
    return 0 <= address - ctypes.addressof(memory) < len(memory)
