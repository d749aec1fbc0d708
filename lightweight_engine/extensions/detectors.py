"""Detectors by name: what is found on a picture, by a network of our own or by ultralytics.

Files lie in the folder ``adetailer`` of a models folder. A YOLOv8 network is run here; every other needs the extra
``adetailer``. A file is told by its tensors, never by its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..backend.kept_files import KeptFiles, files_below
from ..errors import ModelNotFoundError, RequestError, UnsupportedCheckpointError, closest
from .detection import Detector, YOLODetector
from .detector_files import DetectorFile, open_detector
from .yolov8 import build, skeleton

FOLDER = "adetailer"
SUFFIXES = (".pt", ".safetensors")

# Files that people ask for by name, and where they come from.
BINGSU = "https://huggingface.co/Bingsu/adetailer"
PUBLISHED = {
    **{f"{part}_yolov8{size}.pt": BINGSU for part in ("face", "hand") for size in "nsm"},
    **{f"person_yolov8{size}-seg.pt": BINGSU for size in "nsm"},
    **{f"yolov8{size}.pt": "the assets of ultralytics" for size in "nsm"},
    **{f"yolo11{size}.pt": "the assets of ultralytics" for size in "nsm"},
    **{f"yolov8{size}-worldv2.pt": "https://huggingface.co/Bingsu/yolo-world-mirror" for size in "sx"},
}


@dataclass(frozen=True)
class Entry:
    """A file that a detector is read from."""

    name: str
    path: Path


class DetectorLibrary:
    """The detectors of some folders. Networks are read once and the last ones kept.

    Args:
        roots: models folders; of two files of one name, that of the first counts.
        keep: networks kept at most.
    """

    def __init__(self, roots: Sequence[Path], device: torch.device | str = "cpu", *, keep: int = 4) -> None:
        self.roots = tuple(roots)
        self.device = device
        self._loaded: KeptFiles[Detector] = KeptFiles(keep)

    def entries(self) -> list[Entry]:
        """The files that are there, sorted by name."""
        found: dict[str, Entry] = {}
        for path in (path for root in self.roots for path in files_below(root / FOLDER, SUFFIXES)):
            found.setdefault(path.name, Entry(path.name, path))
        return sorted(found.values(), key=lambda entry: entry.name.lower())

    def names(self) -> list[str]:
        return [entry.name for entry in self.entries()]

    def require(self, name: str) -> Entry:
        """The file of that name, with or without its suffix; nothing is read.

        Raises:
            RequestError: there is none of that name, and none that is published.
            ModelNotFoundError: it is one that is published, and not there.
        """
        entries = self.entries()
        fitting = [entry for entry in entries if name in (entry.name, entry.path.stem)]
        if not fitting:
            raise self._unknown(name)
        return fitting[0]

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

    def _unknown(self, name: str) -> RequestError | ModelNotFoundError:
        names = ", ".join(self.names()) or "none"
        if name.lower().startswith("mediapipe"):
            meant = closest("face", self.names()) or "face_yolov8n.pt"
            return RequestError(
                f"ad_model: {name} needs MediaPipe, which this engine does not run; a YOLOv8 detector of faces such as "
                f"{meant} does its work; there are: {names}",
                field="ad_model",
            )
        if name in PUBLISHED:
            place = self.roots[0] / FOLDER if self.roots else FOLDER
            return ModelNotFoundError(
                f"ad_model: {name} is not in {place}; download it from {PUBLISHED[name]} into that folder, or choose "
                f"one of: {names}"
            )
        meant = closest(name, [*self.names(), *(entry.path.stem for entry in self.entries()), *PUBLISHED])
        hint = f" (did you mean {meant!r}?)" if meant else ""
        return RequestError(f"ad_model: there is no detector {name!r:.80}{hint}; there are: {names}", field="ad_model")


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
