"""Upscalers ready to work: names as of ``files``, networks read once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..backend.kept_files import KeptFiles
from ..errors import about
from .files import Entry, UpscalerFiles
from .upscaler import PLAIN, Upscaler

if TYPE_CHECKING:  # programs for networks, which a start without any does not need
    from .networks import AfterTile, NetworkUpscaler

ROOM = 4 << 30  # bytes for tiles at once on a GPU; beyond about ten of them it gets no faster


@dataclass(frozen=True, eq=False)
class Coming:
    """An upscaler whose network is being read in a thread; whoever needs it waits.

    Args:
        work: the reading.
        find: what is there after it.
    """

    name: str
    work: Future[object]
    find: Callable[[], Upscaler]

    def check(self) -> None:
        """Raise now what was wrong with the network; nothing while it is being read."""
        if self.work.done():
            self.work.result()

    def wait(self) -> Upscaler:
        """The upscaler itself. Raises EngineError, as ``UpscalerLibrary.find``."""
        self.work.result()
        return self.find()

    @property
    def scale(self) -> int:
        return self.wait().scale

    def upscale(self, levels: Tensor, by: float) -> Tensor:
        return self.wait().upscale(levels, by)


class UpscalerLibrary(UpscalerFiles):
    """The upscalers of some folders. Networks are read once and the last ones kept.

    Args:
        roots: models folders; of two files of one name, that of the first counts.
        keep: networks kept at most.
        pinned: page-locked memory may hold them.
    """

    def __init__(
        self, roots: Sequence[Path], device: torch.device | str = "cpu", *, keep: int = 2, pinned: bool = True
    ) -> None:
        super().__init__(roots)
        self.device = device
        self.pinned = pinned
        self._loaded: KeptFiles[NetworkUpscaler] = KeptFiles(keep)
        self._turn = threading.Lock()  # of those who read networks
        self._works: list[Future[object]] = []

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
        network = self._load(entry, field)
        network.room = room
        network.after_tile = after_tile or (lambda done, total: None)
        return network

    def begin(
        self, name: str, *, field: str = "upscaler", room: int = ROOM, after_tile: AfterTile | None = None
    ) -> Upscaler | Coming:
        """As ``find``, for a network that is needed later: where importing spandrel, which takes long, is still to be
        done, that and the reading go on beside other work.

        Raises:
            EngineError: as of ``entry``; then what is wrong with the network is told by ``Coming``.
        """

        from .networks import is_imported

        def find() -> Upscaler:
            return self.find(name, field=field, room=room, after_tile=after_tile)

        entry = None if is_imported() else self.entry(name, field=field)
        if entry is None:
            return find()
        beside = ThreadPoolExecutor(1, "upscaler")  # a process that ends waits for it, and cuts no import off
        work: Future[object] = beside.submit(self._load, entry, field)
        beside.shutdown(wait=False)
        self._works = [*(each for each in self._works if not each.done()), work]
        return Coming(name, work, find)

    def release(self) -> None:
        """Drop all networks, those that are being read as well."""
        wait(self._works)
        self._works.clear()
        with self._turn:
            self._loaded.clear()

    @property
    def held(self) -> int:
        """Bytes of the networks that are kept."""
        return sum(network.nbytes for network in self._loaded.values())

    def _load(self, entry: Entry, field: str) -> NetworkUpscaler:
        from .networks import NetworkUpscaler, open_network

        def read() -> NetworkUpscaler:
            network = open_network(entry.path)
            return NetworkUpscaler(entry.name, network, entry.family.tiling, self.device, pinned=self.pinned)

        with self._turn, about(field):
            return self._loaded.get(entry.path, read)
