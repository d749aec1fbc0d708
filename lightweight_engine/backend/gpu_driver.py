"""What a GPU's driver does while torch is not there yet: a context, memory, copies. Loads no torch.

Source: the manual of the CUDA driver.
"""

from __future__ import annotations

import ctypes
import os
import sys
from ctypes import byref, c_int, c_size_t, c_uint64, c_void_p
from typing import Any, Protocol

NAME = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
"""Of the driver's library, which comes with the driver."""

_PORTABLE = 1  # page-locked for every thread
_NON_BLOCKING = 1


class Driver(Protocol):
    """What fetches for a GPU. What it refuses is told by False or 0."""

    @property
    def index(self) -> int:
        """The GPU's number."""
        ...

    def enter(self) -> bool:
        """Let this thread speak for the GPU."""
        ...

    def free(self) -> int:
        """Bytes of the GPU that nobody has."""
        ...

    def reserve(self, nbytes: int) -> int:
        """The address of so much of the GPU's memory."""
        ...

    def release(self, address: int) -> None:
        """Give back what was reserved, which nothing may read any more."""
        ...

    def buffer(self, nbytes: int) -> int:
        """The address of so much memory of the host, page-locked."""
        ...

    def drop(self, address: int) -> None:
        """Give a buffer back."""
        ...

    def stream(self) -> int:
        """A new stream of copies, which waits for no other."""
        ...

    def end(self, stream: int) -> None:
        """Give a stream back, which has nothing left to do."""
        ...

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> bool:
        """Tell the GPU to fetch bytes of a buffer, and do not wait for it."""
        ...

    def settle(self, stream: int = 0) -> bool:
        """Wait for all that a stream, or the GPU, has been told."""
        ...

    @property
    def functions(self) -> tuple[int, int, int, int]:
        """For programs in C: addresses of what lets a thread speak for the GPU, of the context that it is given, of
        what copies, and of what waits for a stream (``reader.c``)."""
        ...


class CudaDriver:
    """The GPU's own.

    Of what a reader tells it again and again Python's lock is kept, as it takes microseconds: a thread that lets go of
    the lock has to wait for it, and whoever imports meanwhile waits for the thread.

    Args:
        index: the GPU's number.
        library: of the driver.
        context: the GPU's, which all of this process shares.
    """

    def __init__(self, index: int, library: Any, context: c_void_p) -> None:
        self.index, self._library, self._context = index, library, context
        self._quick = ctypes.PyDLL(NAME)

    def enter(self) -> bool:
        return self._library.cuCtxSetCurrent(self._context) == 0

    def free(self) -> int:
        free, total = c_size_t(), c_size_t()
        done = self._library.cuMemGetInfo_v2(byref(free), byref(total))
        return free.value if done == 0 else 0

    def reserve(self, nbytes: int) -> int:
        address = c_uint64()
        return address.value if self._library.cuMemAlloc_v2(byref(address), c_size_t(nbytes)) == 0 else 0

    def release(self, address: int) -> None:
        self._library.cuMemFree_v2(c_uint64(address))

    def buffer(self, nbytes: int) -> int:
        address = c_void_p()
        done = self._library.cuMemHostAlloc(byref(address), c_size_t(nbytes), _PORTABLE)
        return (address.value or 0) if done == 0 else 0

    def drop(self, address: int) -> None:
        self._library.cuMemFreeHost(c_void_p(address))

    def stream(self) -> int:
        made = c_void_p()
        return (made.value or 0) if self._library.cuStreamCreate(byref(made), _NON_BLOCKING) == 0 else 0

    def end(self, stream: int) -> None:
        self._library.cuStreamDestroy_v2(c_void_p(stream))

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> bool:
        told = self._quick.cuMemcpyHtoDAsync_v2(c_uint64(target), c_void_p(source), c_size_t(nbytes), c_void_p(stream))
        return told == 0

    def settle(self, stream: int = 0) -> bool:
        if not stream:
            return self._library.cuCtxSynchronize() == 0
        if self._quick.cuStreamQuery(c_void_p(stream)) == 0:
            return True
        return self._library.cuStreamSynchronize(c_void_p(stream)) == 0

    @property
    def functions(self) -> tuple[int, int, int, int]:
        names = ("cuCtxSetCurrent", "cuMemcpyHtoDAsync_v2", "cuStreamSynchronize")
        enter, copy, settle = (ctypes.cast(getattr(self._library, name), c_void_p).value or 0 for name in names)
        return enter, self._context.value or 0, copy, settle


def hold_context(index: int) -> CudaDriver | None:
    """Make the context of a GPU that all of this process shares, as torch does at its first use; the driver with it.

    Kernels are loaded as they are used, which torch asks for too, and which has to be said before.
    """
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    try:
        library = ctypes.CDLL(NAME)
        device, context = c_int(), c_void_p()
        made = (
            library.cuInit(0) == 0
            and library.cuDeviceGet(byref(device), index) == 0
            and library.cuDevicePrimaryCtxRetain(byref(context), device) == 0
        )
        return CudaDriver(index, library, context) if made else None
    except (OSError, AttributeError):
        return None
