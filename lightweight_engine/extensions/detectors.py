"""Detectors ready to work: what is found on a picture, by a network of our own or by ultralytics.

A YOLOv8 network is run here; every other needs the extra ``adetailer``. A file is told by its tensors, never by its
name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..backend.kept_files import KeptFiles
from ..errors import UnsupportedCheckpointError
from .detection import Detector, YOLODetector
from .detector_files import DetectorFile, open_detector
from .detector_list import DetectorList, Entry
from .yolov8 import build, skeleton


class DetectorLibrary(DetectorList):
    """The detectors of some folders. Networks are read once and the last ones kept.

    Args:
        roots: models folders; of two files of one name, that of the first counts.
        keep: networks kept at most.
    """

    def __init__(self, roots: Sequence[Path], device: torch.device | str = "cpu", *, keep: int = 4) -> None:
        super().__init__(roots)
        self.device = device
        self._loaded: KeptFiles[Detector] = KeptFiles(keep)

    def find(self, name: str) -> Detector:
        """The detector of that name, its network loaded.

        Raises:
            RequestError, ModelNotFoundError: see ``require``.
            ModelError, MissingDependencyError: the file cannot be used; says why.
        """
        entry = self.require(name)
        return self._loaded.get(entry.path, lambda: open_network(entry, self.device))

    def release(self) -> None:
        """Drop all networks."""
        self._loaded.clear()

    @property
    def held(self) -> int:
        """Bytes of the networks that are kept."""
        return sum(detector.nbytes for detector in self._loaded.values())


def open_network(entry: Entry, device: torch.device | str) -> Detector:
    """The network of a file, run by us if it is a YOLOv8.

    Raises:
        ModelError, MissingDependencyError: see ``open_detector`` and ``ultralytics_detector.open_foreign``.
    """
    file = open_detector(entry.path)
    try:
        skeleton(file.checkpoint.shapes)
    except UnsupportedCheckpointError as error:
        if not file.layers:
            raise UnsupportedCheckpointError(f"{entry.name}: {error}; use a detector in YOLOv8 layout") from None
        from .ultralytics_detector import open_foreign

        return open_foreign(entry.name, file, device)
    return open_yolov8(entry.name, file, device)


def open_yolov8(name: str, file: DetectorFile, device: torch.device | str = "cpu") -> YOLODetector:
    """A YOLOv8 network of our own, in float32.

    Raises:
        UnsupportedCheckpointError: it is another network.
        CorruptCheckpointError: it names other classes than it tells apart.
    """
    checkpoint = file.checkpoint
    network = build({key: checkpoint.tensor(key) for key in checkpoint.tensors}).to(device)

    def look(pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        raw = network(pixels)
        return network.decode(raw)[0], None if raw.prototypes is None else raw.prototypes[0]

    nbytes = sum(tensor.nbytes for tensor in network.state_dict().values())
    classes = file.names_of(network.sizes.classes)
    return YOLODetector(name, look, classes, file.image_size, device, nbytes=nbytes)
