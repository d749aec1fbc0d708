"""Files of detectors: their tensors, the names of their classes, and the size that they look at. Runs nothing of them.

Read are safetensors (metadata ``names``, ``imgsz``) and ``.pt`` files as ultralytics saves them, which hold the network
object itself: it is read as records of its layers, and a file that names anything but layers is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..backend.checkpoint import Checkpoint, corrupt
from ..backend.model_files import open_model
from ..backend.pickled_modules import Record, SavedObject, open_object

IMAGE_SIZE = 640  # what ultralytics trains with unless told otherwise
IMAGE_SIZES = range(32, 4097)
ATTRIBUTES = ("txt_feats",)  # tensors beside the state dict: the texts that a YOLO-World network looks for
MAX_CLASSES = 100_000
MAX_CLASS_NAME = 256

# Classes that a file may name. They are not imported: this only tells a saved network from something else.
LAYERS = re.compile(
    r"torch\.nn\.modules\.\w+\.[A-Z]\w*"
    r"|ultralytics\.nn\.(?:\w+\.)*[A-Z]\w*"
    r"|ultralytics\.(?:yolo\.)?utils\.(?:IterableSimpleNamespace|(?:loss|tal)\.[A-Za-z]\w*)"
)


@dataclass(frozen=True, eq=False)
class DetectorFile:
    """
    Attributes:
        checkpoint: the tensors, under the names that published files have.
        classes: names of the classes, in order.
        image_size: the longer side of what the network sees, in pixels.
        layers: the list of layers that stands in files of ultralytics; empty where there is none.
    """

    checkpoint: Checkpoint
    classes: tuple[str, ...]
    image_size: int = IMAGE_SIZE
    layers: Mapping[str, Any] = field(default_factory=dict)

    def names_of(self, count: int) -> tuple[str, ...]:
        """Names of ``count`` classes: their numbers, where the file does not name them.

        Raises:
            CorruptCheckpointError: it names more or fewer.
        """
        if self.classes and len(self.classes) != count:
            path = self.checkpoint.path
            raise corrupt(path, f"it names {len(self.classes)} classes and tells {count} apart")
        return self.classes or tuple(str(number) for number in range(count))


def open_detector(path: Path) -> DetectorFile:
    """
    Raises:
        ModelNotFoundError: there is no such file.
        UnsupportedCheckpointError: it asks for what is not part of a network; says for what.
        CorruptCheckpointError: truncated, or what it says of itself makes no sense.
    """
    if path.is_file() and _is_archive(path):
        saved = open_object(path, LAYERS)
        network = _network_of(saved)
        if network is not None:
            return _from_object(saved, network)
    checkpoint = open_model(path)
    classes = _class_names(path, _json(path, checkpoint.metadata, "names"))
    size = _image_size(path, _json(path, checkpoint.metadata, "imgsz"))
    return DetectorFile(checkpoint, classes, size)


def _is_archive(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"PK\x03\x04"
    except OSError:  # which ``open_model`` tells
        return False


def _network_of(saved: SavedObject) -> Record | None:
    """The network that a training program saved: the averaged one, if there is one. None for a mere state dict."""
    if isinstance(saved.value, Record):
        return saved.value
    entries = saved.value if isinstance(saved.value, dict) else {}
    return next((entries[key] for key in ("ema", "model") if isinstance(entries.get(key), Record)), None)


def _from_object(saved: SavedObject, network: Record) -> DetectorFile:
    entries = saved.value if isinstance(saved.value, dict) else {}
    arguments = entries.get("train_args") or network.state.get("args")
    arguments = arguments.state if isinstance(arguments, Record) else arguments
    size = arguments.get("imgsz") if isinstance(arguments, dict) else None
    layers = network.state.get("yaml")
    return DetectorFile(
        checkpoint=saved.checkpoint(network, ATTRIBUTES),
        classes=_class_names(saved.path, network.state.get("names")),
        image_size=_image_size(saved.path, size),
        layers=layers if isinstance(layers, dict) else {},
    )


def _json(path: Path, metadata: Mapping[str, str], key: str) -> Any:
    if key not in metadata:
        return None
    try:
        return json.loads(metadata[key])
    except (ValueError, RecursionError):
        raise corrupt(path, f"its metadata {key!r} is no JSON") from None


def _class_names(path: Path, names: Any) -> tuple[str, ...]:
    """Names in order, of a list or of number and name; nothing where a file does not name its classes."""
    if names is None:
        return ()
    if isinstance(names, dict):
        numbered = {str(number): name for number, name in names.items()}
        names = [numbered.get(str(number)) for number in range(len(names))] if len(names) <= MAX_CLASSES else None
    if not isinstance(names, list | tuple) or len(names) > MAX_CLASSES:
        raise corrupt(path, "the names of its classes are no list")
    if not all(isinstance(name, str) and len(name) <= MAX_CLASS_NAME for name in names):
        raise corrupt(path, "its classes are not named by number")
    return tuple(names)


def _image_size(path: Path, size: Any) -> int:
    if size is None:
        return IMAGE_SIZE
    if isinstance(size, list | tuple) and len(size) == 2:
        size = max(size, key=lambda side: side if type(side) is int else 0)
    if type(size) is not int or size not in IMAGE_SIZES:
        raise corrupt(path, f"it looks at pictures of {str(size)[:40]} pixels, which cannot be")
    return size
