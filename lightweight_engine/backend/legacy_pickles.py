"""Files of ``torch.save`` before torch 1.6, as many upscalers still are: five pickles, then the numbers.

    magic number · version · sizes of C types · the object · keys of the storages, in order
    for each storage: its count (8 bytes), its numbers

Source: the layout that ``torch.save`` writes with ``_use_new_zipfile_serialization=False``. Loads no torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkpoint import DTYPES, MAX_TENSORS, Checkpoint
from .pickles import MAX_PROGRAM, Machine, Refused, Storage, refusals, state_dict, tensor_info
from .zip_entries import Entry

MAGIC = 0x1950A86A20F9469CFC6C
VERSION = 1001
COUNT = 8  # bytes


def open_legacy_pickle(path: Path) -> Checkpoint:
    """The tensors of such a file, as places in it.

    Raises:
        UnsupportedCheckpointError: it is a pickle of something else, or asks for what is not plain data.
        CorruptCheckpointError: it is truncated, or does not add up.
    """
    with refusals(path):
        with path.open("rb") as file:
            reader = _Reader(file.read(MAX_PROGRAM))
        if (reader.next(), reader.next()) != (MAGIC, VERSION):
            raise Refused("it is no file of torch.save")
        if not reader.next()["little_endian"]:
            raise Refused("its numbers are big-endian")
        tensors, values = state_dict(reader.next())
        storages = reader.machine.storages
        entries = _places(path, reader.next(), storages, reader.machine.at)
        infos = {name: tensor_info(name, tensor, entries) for name, tensor in tensors.items()}
    return Checkpoint(path, infos, values, container="pickle")


class _Reader:
    """Reads one pickle after another, each by a machine of its own."""

    def __init__(self, program: bytes) -> None:
        self.machine = Machine(program)

    def next(self) -> Any:
        self.machine = Machine(self.machine.program, self.machine.at)
        return self.machine.run()


def _places(path: Path, keys: Any, storages: Mapping[Any, Storage], at: int) -> dict[str, Entry]:
    """Where the numbers of each storage lie: one after another from ``at`` on, each after its count."""
    if not isinstance(keys, list) or len(keys) > MAX_TENSORS:
        raise Refused("its storages have no names")
    entries: dict[str, Entry] = {}
    size = os.path.getsize(path)
    with path.open("rb") as file:
        for key in keys:
            storage = storages[key]
            file.seek(at)
            count = int.from_bytes(file.read(COUNT), "little")
            start = at + COUNT
            at = start + count * DTYPES[storage.dtype][0]
            if count != storage.count:
                raise ValueError(f"a storage of {storage.count} numbers has {count}")
            if at > size:
                raise ValueError(f"it ends {at - size:,} bytes before its numbers do")
            entries[storage.entry] = Entry(start, at)
    return entries
