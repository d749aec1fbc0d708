"""The networks of detectors: a YOLOv8 is run here, every other needs the extra ``adetailer``. A file is told by its
tensors, never by its name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import Tensor

from ..errors import UnsupportedCheckpointError
from ..upscalers.resampling import HOST
from ..upscalers.visits import Visitor
from .detection import Detector, YOLODetector
from .detector_files import DetectorFile, open_detector
from .detector_list import Entry
from .detector_place import ON_CPU, Place
from .yolov8 import YOLOv8, build, skeleton


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
