"""Pages of mapped files: given back as soon as they were used, so that reading a file leaves nothing resident."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence

from torch import Tensor

from .checkpoint import Checkpoint
from .devices import c_library
from .streaming import Unit


def release_pages(checkpoint: Checkpoint, tensor: Tensor) -> None:
    """Give the pages of a view of a mapped file back to the system; other tensors are left alone.

    The next use reads them from the page cache again. Pages that the view shares with its neighbours stay.
    """
    if not checkpoint.holds(tensor) or not hasattr(mmap, "MADV_DONTNEED"):
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        c_library().madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def release_files(checkpoint: Checkpoint) -> None:
    """Give all pages of the mapped files back; views can be read on."""
    if hasattr(mmap, "MADV_DONTNEED"):
        for _, address, size in checkpoint.mapped:
            c_library().madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


class PageStream:
    """Units that are used straight from a mapped file on the host; their pages are given back as soon as each has run.

    Args:
        units: whose tensors are views of the files of ``checkpoint``.
    """

    def __init__(self, units: Sequence[Unit], checkpoint: Checkpoint) -> None:
        self.units = list(units)
        self._checkpoint = checkpoint
        self._hooks = [
            unit.module.register_forward_hook(lambda *_, unit=unit: self._leave(unit)) for unit in self.units
        ]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for unit in self.units:
            self._leave(unit)
        self._hooks.clear()

    def _leave(self, unit: Unit) -> None:
        for place in unit.places:
            release_pages(self._checkpoint, place.tensor)
