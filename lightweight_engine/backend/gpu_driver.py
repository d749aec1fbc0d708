"""What a GPU's driver does while torch is not there yet: a context, page-locked memory, copies. Loads no torch."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Protocol

READ_ONLY = 8
NON_BLOCKING = 1


class Driver(Protocol):
    """What page-locks memory for a GPU, and has it fetched from there. What is refused is told by False or 0."""

    def enter(self) -> bool:
        """Let this thread speak for the GPU."""
        ...

    def lock(self, address: int, nbytes: int) -> bool: ...

    def unlock(self, address: int) -> None: ...

    def free(self) -> int:
        """Bytes of the GPU that nobody has."""
        ...

    def reserve(self, nbytes: int) -> int:
        """The address of so much of the GPU's memory."""
        ...

    def release(self, address: int) -> None:
        """Give back what was reserved, which nothing may read any more."""
        ...

    def stream(self) -> int:
        """A new stream of copies, which waits for no other."""
        ...

    def fetch(self, target: int, source: int, nbytes: int, stream: int) -> bool:
        """Tell the GPU to copy page-locked memory to its own, and do not wait for it."""
        ...

    def settle(self) -> None:
        """Wait for all that the GPU has been told."""
        ...


class CudaDriver:
    """The GPU's own.

    Args:
        name: of the driver's library.
        index: of the GPU, whose context all of this process shares, as torch does at its first use.

    Raises:
        OSError: there is no driver, or it has no such GPU.
    """

    def __init__(self, name: str, index: int) -> None:
        self._library = ctypes.CDLL(name)
        # Keeps Python's lock: whoever lets go of it while others import waits 5 ms for it, for a call of microseconds.
        self._quick = ctypes.PyDLL(name)
        self._context = ctypes.c_void_p()
        device = ctypes.c_int()
        made = (
            self._library.cuInit(0) == 0
            and self._library.cuDeviceGet(ctypes.byref(device), index) == 0
            and self._library.cuDevicePrimaryCtxRetain(ctypes.byref(self._context), device) == 0
        )
        if not made:
            raise OSError("the driver has no such GPU")

    def enter(self) -> bool:
        return self._quick.cuCtxSetCurrent(self._context) == 0

    def lock(self, address: int, nbytes: int) -> bool:
        return self._library.cuMemHostRegister_v2(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), READ_ONLY) == 0

    def unlock(self, address: int) -> None:
        self._library.cuMemHostUnregister(ctypes.c_void_p(address))

    def free(self) -> int:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        done = self._library.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
        return free.value if done == 0 else 0

    def reserve(self, nbytes: int) -> int:
        address = ctypes.c_uint64()
        done = self._library.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(nbytes))
        return address.value if done == 0 else 0

    def release(self, address: int) -> None:
        self._library.cuMemFree_v2(ctypes.c_uint64(address))

    def stream(self) -> int:
        made = ctypes.c_void_p()
        done = self._library.cuStreamCreate(ctypes.byref(made), NON_BLOCKING)
        return (made.value or 0) if done == 0 else 0

    def fetch(self, target: int, source: int, nbytes: int, stream: int) -> bool:
        told = self._quick.cuMemcpyHtoDAsync_v2(
            ctypes.c_uint64(target), ctypes.c_void_p(source), ctypes.c_size_t(nbytes), ctypes.c_void_p(stream)
        )
        return told == 0

    def settle(self) -> None:
        self._library.cuCtxSynchronize()


def hold_context(index: int) -> CudaDriver | None:
    """The driver of a GPU, with its context made; None where there is none.

    Kernels are loaded as they are used, which torch asks for too, and which has to be said before.
    """
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    try:
        return CudaDriver("libcuda.so.1" if sys.platform != "win32" else "nvcuda.dll", index)
    except (OSError, AttributeError):
        return None
