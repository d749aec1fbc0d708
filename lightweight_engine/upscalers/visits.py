"""A network that waits on the host and visits a device: one copy brings all of it there, and nothing is copied back."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..backend.streaming import HostArena, aligned


class Visitor:
    """A network's tensors side by side in memory of the host, which is page-locked for a GPU.

    Hundreds of small copies from other memory took as long as half a tile. On a CPU nothing is moved.

    Args:
        network: its tensors are moved into that memory, once and for all.
        pinned: whether pages may be locked.
    """

    def __init__(self, network: nn.Module, device: torch.device, *, pinned: bool = True) -> None:
        self._device = device
        modules = network.modules() if device.type != "cpu" else ()
        holders: list[dict[str, Any]] = [held for each in modules for held in (each._parameters, each._buffers)]
        found = [(holder, leaf, tensor) for holder in holders for leaf, tensor in holder.items() if tensor is not None]
        room = sum(aligned(tensor.nbytes) for _, _, tensor in found)
        self._arena = HostArena(room, pinned=pinned and device.type == "cuda")
        weakref.finalize(self, self._arena.close).atexit = False  # a process that ends unlocks its pages itself
        self._home: list[tuple[dict[str, Any], str, Tensor]] = []
        start = 0
        for holder, leaf, tensor in found:
            laid = _laid(self._arena.buffer, tensor, start)
            holder[leaf] = nn.Parameter(laid, requires_grad=False) if isinstance(tensor, nn.Parameter) else laid
            self._home.append((holder, leaf, holder[leaf]))
            start += aligned(tensor.nbytes)

    @contextmanager
    def there(self) -> Iterator[None]:
        """The network with its tensors on the device, and afterwards with those that it has on the host."""
        if not self._home:
            yield
            return
        moved = self._arena.buffer.to(self._device, non_blocking=True)
        as_types = {dtype: moved.view(dtype) for dtype in {tensor.dtype for _, _, tensor in self._home}}
        try:
            for holder, leaf, tensor in self._home:
                place = tensor.size(), tensor.stride(), tensor.storage_offset()
                holder[leaf] = as_types[tensor.dtype].as_strided(*place)
            yield
        finally:
            for holder, leaf, tensor in self._home:
                holder[leaf] = tensor


def _laid(buffer: Tensor, tensor: Tensor, start: int) -> Tensor:
    """A copy of a tensor, in the order that its numbers have, ``start`` bytes into a buffer."""
    order = torch.empty_like(tensor, device="meta").stride()
    place = buffer.view(tensor.dtype).as_strided(tensor.size(), order, start // tensor.element_size())
    return place.copy_(tensor.detach())
