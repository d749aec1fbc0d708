"""Detectors by name: those of the models folders, their networks read once and kept."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..backend.kept_files import KeptFiles
from ..errors import about
from .detector_list import DetectorList
from .detector_place import Free, Place, all_of_it

if TYPE_CHECKING:
    from .detection import Detector


class DetectorLibrary(DetectorList):
    """The detectors of some folders. Networks are read once and the last ones kept.

    Args:
        roots: models folders; of two files of one name, that of the first counts.
        keep: networks kept at most.
        device, free, pinned: see ``Place``; another device holds for networks that are read later.
    """

    def __init__(
        self,
        roots: Sequence[Path],
        device: torch.device | str = "cpu",
        *,
        keep: int = 4,
        free: Free = all_of_it,
        pinned: bool = True,
    ) -> None:
        super().__init__(roots)
        self.device = device
        self.free = free
        self.pinned = pinned
        self._loaded: KeptFiles[Detector] = KeptFiles(keep)

    def find(self, name: str) -> Detector:
        """The detector of that name, its network loaded.

        Raises:
            RequestError, ModelNotFoundError: see ``require``.
            ModelError, MissingDependencyError: the file cannot be used; says why.
        """
        from .detector_networks import open_network  # which a start, and jobs without a detailer, do not need

        entry = self.require(name)
        place = Place(torch.device(self.device), lambda: self.free(), self.pinned)
        with about("ad_model"):
            return self._loaded.get(entry.path, partial(open_network, entry, place))

    def release(self) -> None:
        """Drop all networks."""
        self._loaded.clear()

    @property
    def held(self) -> int:
        """Bytes of the networks that are kept."""
        return sum(detector.nbytes for detector in self._loaded.values())
