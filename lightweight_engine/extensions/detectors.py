"""Detectors ready to work: what is found on a picture, by a network of our own or by ultralytics.

A YOLOv8 network is run here; every other needs the extra ``adetailer``. A file is told by its tensors, never by its
name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..backend.kept_files import KeptFiles
from ..errors import UnsupportedCheckpointError
from ..upscalers.resampling import HOST
from ..upscalers.visits import Visitor
from .detection import Detector, YOLODetector
from .detector_files import DetectorFile, open_detector
from .detector_list import DetectorList, Entry
from .yolov8 import YOLOv8, build, skeleton

Free = Callable[[], int]
"""Bytes of the device that may be taken now."""


def _all_of_it() -> int:
    return 1 << 62


class Place(NamedTuple):
    """Where networks of our own look at pictures.

    Attributes:
        device: that they visit.
        free: what may be taken of it; networks that need more look on the CPU.
        pinned: page-locked memory may hold them.
    """

    device: torch.device = HOST
    free: Free = _all_of_it
    pinned: bool = True


ON_CPU = Place()


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
        free: Free = _all_of_it,
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
        entry = self.require(name)
        place = Place(torch.device(self.device), lambda: self.free(), self.pinned)
        return self._loaded.get(entry.path, partial(open_network, entry, place))

    def release(self) -> None:
        """Drop all networks."""
        self._loaded.clear()

    @property
    def held(self) -> int:
        """Bytes of the networks that are kept."""
        return sum(detector.nbytes for detector in self._loaded.values())


def open_network(entry: Entry, place: Place = ON_CPU) -> Detector:
    """The network of a file: a YOLOv8, run by us, looks at that place, any other on the CPU.

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

        return open_foreign(entry.name, file)
    return open_yolov8(entry.name, file, place)


def open_yolov8(name: str, file: DetectorFile, place: Place = ON_CPU) -> YOLODetector:
    """A YOLOv8 network of our own, in float32.

    Raises:
        UnsupportedCheckpointError: it is another network.
        CorruptCheckpointError: it names other classes than it tells apart.
    """
    checkpoint = file.checkpoint
    network = build({key: checkpoint.tensor(key) for key in checkpoint.tensors})
    classes = file.names_of(network.sizes.classes)
    return visiting(name, network, classes, file.image_size, place)


def visiting(name: str, network: YOLOv8, classes: tuple[str, ...], image_size: int, place: Place) -> YOLODetector:
    """A detector whose network waits on the host and visits a device while it looks, where there is room for it.

    What other stages of a job take of the device is planned without it. It makes no difference where it looks: on a GPU
    float32 is not cut to TF32 for it.
    """
    device, free, pinned = place
    visitor = cache(partial(Visitor, network, device, pinned=pinned))  # made by the first visit: some are only planned
    nbytes = sum(tensor.nbytes for tensor in network.state_dict().values())

    @contextmanager
    def visit(size: tuple[int, int]) -> Iterator[torch.device]:
        if device.type == "cpu" or nbytes + network.sizes.room(size) > free():
            yield HOST
            return
        with visitor().there(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield device

    def look(pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        raw = network(pixels)
        return network.decode(raw)[0], None if raw.prototypes is None else raw.prototypes[0]

    return YOLODetector(name, look, classes, image_size, visit, nbytes=nbytes)
