"""Detectors by name: the files in the folder ``adetailer`` of models folders. Loads no torch, and reads no file, but
headers where it is asked what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..backend.kept_files import by_name, files_below
from ..backend.model_files import problem_of
from ..backend.model_folders import DETECTORS, folders_of, place_for
from ..errors import ModelNotFoundError, RequestError, closest

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

    @property
    def problem(self) -> str | None:
        """Why its file cannot be opened, by the header alone; whether it holds a detector, its reading tells."""
        from .detector_files import open_detector  # which listing names does not need

        return problem_of(self.path, open_detector)


class DetectorList:
    """The detectors of some folders.

    Args:
        roots: models folders; of two files of one name, that of the first counts.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self.roots = tuple(roots)

    def entries(self) -> list[Entry]:
        """The files that are there, sorted by name."""
        folders = (folder for root in self.roots for folder in folders_of(root, DETECTORS))
        return by_name(Entry(path.name, path) for folder in folders for path in files_below(folder, SUFFIXES))

    def names(self) -> list[str]:
        return [entry.name for entry in self.entries()]

    def problems(self) -> dict[str, str]:
        """Names of those whose files cannot be opened, with the reason."""
        return {entry.name: problem for entry in self.entries() if (problem := entry.problem)}

    def require(self, name: str) -> Entry:
        """The file of that name, with or without its suffix; nothing is read.

        Raises:
            ModelNotFoundError: there is none of that name; tells where it can be had, or close names.
            RequestError: it is one of MediaPipe's, which do not run here.
        """
        entries = self.entries()
        fitting = [entry for entry in entries if name in (entry.name, entry.path.stem)]
        if not fitting:
            raise self._unknown(name)
        return fitting[0]

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
            place = place_for(self.roots[0], DETECTORS) if self.roots else DETECTORS[0]
            return ModelNotFoundError(
                f"ad_model: {name} is not in {place}; download it from {PUBLISHED[name]} into that folder, or choose "
                f"one of: {names}",
                field="ad_model",
            )
        return ModelNotFoundError(
            f"ad_model: there is no detector {name!r:.80}{self._hint(name)}; there are: {names}", field="ad_model"
        )

    def _hint(self, name: str) -> str:
        """The name that is probably meant: of a file that is there, or of one that can be had."""
        there = [called for entry in self.entries() for called in (entry.name, entry.path.stem)]
        meant = closest(name, [*there, *PUBLISHED])
        if meant is None or meant in there:
            return f" (did you mean {meant!r}?)" if meant else ""
        return f" (is {meant!r} meant? It is not here, and can be downloaded)"
