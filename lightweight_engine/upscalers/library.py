"""Upscalers ready to work: names as of ``files``, networks read once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..backend.kept_files import KeptFiles
from .files import Entry, UpscalerFiles
from .networks import AfterTile, NetworkUpscaler, open_network
from .upscaler import PLAIN, Upscaler

ROOM = 4 << 30  # bytes for tiles at once on a GPU; beyond about ten of them it gets no faster


class UpscalerLibrary(UpscalerFiles):
    """The upscalers of some folders. Networks are read once and the last ones kept.

    Args:
        roots: models folders; of two files of one name, that of the first counts.
        keep: networks kept at most.
    """

    def __init__(self, roots: Sequence[Path], device: torch.device | str = "cpu", *, keep: int = 2) -> None:
        super().__init__(roots)
        self.device = device
        self._loaded: KeptFiles[NetworkUpscaler] = KeptFiles(keep)

    def find(
        self, name: str, *, field: str = "upscaler", room: int = ROOM, after_tile: AfterTile | None = None
    ) -> Upscaler:
        """The upscaler of that name, its network read.

        Args:
            room: bytes for tiles at once, on a GPU.
            after_tile: told of every batch of tiles, until the network is asked for again.

        Raises:
            EngineError: as of ``entry`` and ``open_network``.
        """
        entry = self.entry(name, field=field)
        if entry is None:
            return next(plain for plain in PLAIN if plain.name.lower() == name.lower())
        network = self._load(entry)
        network.room = room
        network.after_tile = after_tile or (lambda done, total: None)
        return network

    def release(self) -> None:
        """Drop all networks."""
        self._loaded.clear()

    @property
    def held(self) -> int:
        """Bytes of the networks that are kept."""
        return sum(network.nbytes for network in self._loaded.values())

    def _load(self, entry: Entry) -> NetworkUpscaler:
        def read() -> NetworkUpscaler:
            return NetworkUpscaler(entry.name, open_network(entry.path), entry.family.tiling, self.device)

        return self._loaded.get(entry.path, read)
