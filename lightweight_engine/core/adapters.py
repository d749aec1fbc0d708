"""The LoRAs of one loaded network: attached beside its layers, or merged into its weights, and taken away again."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from ..backend.linear import PackedLinear, store
from ..backend.lora import merged
from ..backend.lora_layers import Attached, Changes, Cost, attach, cost
from ..backend.pages import release_pages
from ..backend.quantize import ROWS
from ..flux.keymaps import Part
from ..flux.load import Storage, read_as
from ..flux.lora_set import LoraSet
from ..flux.units import unit_of

FLOAT = 4


@dataclass(eq=False)
class Adapter:
    """What acts on a network now.

    Args:
        device: where the network computes.
        dtype: that it computes in.
        merge: change plain weights themselves; packed ones get branches all the same, as rounding them again would lose
            most of a change.
    """

    part: Part
    module: nn.Module
    device: torch.device
    dtype: torch.dtype
    merge: bool
    key: Hashable = ((), frozenset())
    _attached: Attached = field(default_factory=Attached)
    _merged: tuple[str, ...] = ()

    def follow(self, loras: LoraSet, at_hand: Collection[str] = ()) -> None:
        """Let these LoRAs act, and no others. The weights are those of the file again, bit for bit, where none does.

        Args:
            at_hand: weights that are kept as numbers.
        """
        self.leave()
        changes = loras.changes(self.part.role)
        beside = dict(changes)
        if self.merge:
            plain = [
                name
                for name in changes
                if name not in at_hand and not isinstance(_owner(self.module, name), PackedLinear)
            ]
            for name in plain:
                self._write(name, beside.pop(name))
                self._merged += (name,)
        self._attached = attach(self.module, beside, device=self.device, dtype=self.dtype, at_hand=at_hand)
        for use in loras.uses:
            use.file.give_back()
        self.key = (loras.key(self.part.role), frozenset(at_hand))

    def leave(self) -> None:
        """Take everything away; what was merged is read from the file again."""
        self.key = None  # equal to no set's, until all is done
        self._attached.close()
        for name in self._merged:
            self._write(name, ())
        self._merged = ()

    def _write(self, name: str, changes: Changes) -> None:
        """Give a plain parameter the file's values, changed."""
        held = self.module.get_parameter(name)
        value = read_as(self.part, name, held.dtype, self.device)
        assert isinstance(value, torch.Tensor)
        if changes:
            value = merged(value.to(self.device), changes).to(held.dtype)
        store(self.module, name, value.to(held.device))
        release_pages(self.part.checkpoint, held)


def at_hand(loras: LoraSet, part: Part, storage: Storage) -> dict[str, int]:
    """Bytes of the weights of blocks that are worth keeping as products read them: those that LoRAs change, and those
    that are stored otherwise."""
    changes = loras.changes(part.role)
    held: dict[str, int] = {}
    for name, source in part.sources.items():
        if len(part.shapes[name]) != 2 or unit_of(part.role, name).kind != "block":
            continue
        kept = storage.kept_as(source, True)
        if name in changes or kept not in (storage.compute, ROWS):
            held[name] = storage.nbytes(source, True) if kept == ROWS else source.elements * storage.compute.itemsize
    return held


def adapter_cost(
    loras: LoraSet, part: Part, storage: Storage, *, merge: bool, on_host: bool, without: Collection[str] = ()
) -> Cost:
    """What LoRAs take of the device beside a network.

    Args:
        on_host: the network is on the host, where what is merged does not take the place of the file's pages.
        without: weights that are kept at hand, changes included.
    """
    changes = {name: rows for name, rows in loras.changes(part.role).items() if name not in without}
    plain: list[str] = []
    if merge:
        kept = {
            name: storage.of(part.role, name).kept_as(part.sources[name], len(part.shapes[name]) == 2)
            for name in changes
        }
        plain = [name for name, format in kept.items() if isinstance(format, torch.dtype)]
    sizes = [part.sources[name].elements for name in plain]
    beside: Mapping[str, Changes] = {name: rows for name, rows in changes.items() if name not in plain}
    itemsize = storage.compute.itemsize
    whole = Cost(sum(sizes) * itemsize if on_host else 0, 3 * FLOAT * max(sizes, default=0))
    return whole.beside(cost(beside, part.shapes, itemsize))


def _owner(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])
