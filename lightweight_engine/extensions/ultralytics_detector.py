"""Detectors that are no YOLOv8, such as YOLO11 and YOLO-World, on the networks of ultralytics (AGPL-3.0, an extra).

Nothing of that library is used but the classes of its networks. A file is read by us, as records and tensors; the
list of layers in it is checked row by row before a network is built of it, since the library finds layers by name and
evaluates texts. What a network sees and what is made of its answers are ours as well, so that the settings, downloads,
installs and statistics of the library never come into play.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import MissingDependencyError, UnsupportedCheckpointError
from .detection import Network, YOLODetector
from .detector_files import DetectorFile

# Layers of the published files, and the class of the network that each head is of. A list may name no others.
BLOCKS = frozenset(("Conv", "C2f", "C3k2", "C2PSA", "C2fAttn", "SPPF", "Concat", "nn.Upsample", "ImagePoolingAttn"))
HEADS = {"Detect": "DetectionModel", "Segment": "SegmentationModel", "WorldDetect": "WorldModel"}
TEXTS = ("nc", "None", "nearest")  # that may stand among a layer's arguments
MAX_ROWS, MAX_ARGUMENTS, MAX_REPEATS, MAX_NUMBER = 100, 8, 100, 1 << 16

# Read by the library when it is imported: no look at the network, no statistics, no installs, no words.
QUIET = {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "YOLO_VERBOSE": "false"}
HEADROOM = 16 << 20  # bytes of parameters beyond those in a file


def open_foreign(name: str, file: DetectorFile) -> YOLODetector:
    """It looks on the CPU: what it takes of a GPU is not known beforehand.

    Raises:
        MissingDependencyError: ultralytics is not installed.
        UnsupportedCheckpointError: a layer that the published files do not have, or tensors that do not fit.
    """
    try:
        layers = checked_layers(file.layers)
        state = {key: file.checkpoint.tensor(key).float() for key in file.checkpoint.tensors}
        texts = state.pop("txt_feats", None)
        network = _build(_network_class(name, layers), layers, state)
    except ValueError as error:
        raise UnsupportedCheckpointError(f"{name}: {error}; use a detector in YOLOv8 or YOLO11 layout") from None
    is_world = texts is not None
    if is_world:
        network.txt_feats = texts
    network.eval().requires_grad_(False)
    count = texts.shape[-2] if is_world else layers["nc"]
    classes = file.names_of(count)
    nbytes = sum(tensor.nbytes for tensor in state.values())
    look = _looking(network, len(classes))
    return YOLODetector(name, look, classes, file.image_size, nbytes=nbytes, open_vocabulary=is_world)


def checked_layers(layers: Mapping[str, Any]) -> dict[str, Any]:
    """A list of layers, with nothing in it but rows of known layers and plain numbers.

    Raises:
        ValueError: something else; says what.
    """
    if "activation" in layers:
        raise ValueError("its list of layers names an activation, which the library would evaluate")
    rows = {part: [_row(row) for row in _list(layers.get(part), MAX_ROWS)] for part in ("backbone", "head")}
    if not rows["head"] or rows["head"][-1][2] not in HEADS:
        raise ValueError(f"its last layer is none of {', '.join(HEADS)}")
    if any(row[2] in HEADS for row in (*rows["backbone"], *rows["head"][:-1])):
        raise ValueError("it has more than one head")
    scales = layers.get("scales") or {}
    if not isinstance(scales, dict) or not all(isinstance(key, str) and len(key) == 1 for key in scales):
        raise ValueError("its scales are not named by letters")
    plain: dict[str, Any] = {key: [_number(n) for n in _list(scale, 3)] for key, scale in scales.items()}
    checked = {**rows, "nc": _number(layers.get("nc")), "scales": plain}
    if plain:
        if layers.get("scale") not in plain:
            raise ValueError("its scale is none that it lists")
        checked["scale"] = layers["scale"]
    multiples = ("depth_multiple", "width_multiple")
    return {**checked, **{key: _number(layers[key]) for key in multiples if key in layers}}


def _row(row: Any) -> list[Any]:
    """From which layers, how often, which layer, its arguments."""
    sources, repeats, layer, arguments = _list(row, 4)
    if layer not in BLOCKS and layer not in HEADS:
        raise ValueError(f"it has a layer {str(layer)[:60]!r}")
    if type(repeats) is not int or not 1 <= repeats <= MAX_REPEATS:
        raise ValueError(f"it repeats {layer} {str(repeats)[:20]} times")
    places = [_number(n) for n in _list(sources, MAX_ARGUMENTS)] if isinstance(sources, list) else _number(sources)
    return [places, repeats, layer, [_argument(value) for value in _list(arguments, MAX_ARGUMENTS)]]


def _argument(value: Any) -> Any:
    if value is None or isinstance(value, bool) or value in TEXTS:
        return value
    return [_number(n) for n in _list(value, MAX_ARGUMENTS)] if isinstance(value, list) else _number(value)


def _list(value: Any, most: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > most:
        raise ValueError(f"its list of layers has {str(value)[:60]!r} where at most {most} values belong")
    return value


def _number(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -MAX_NUMBER < value < MAX_NUMBER:
        raise ValueError(f"its list of layers has {str(value)[:60]!r} where a number belongs")
    return value


def _network_class(name: str, layers: Mapping[str, Any]) -> Any:
    try:
        with quietly():
            from ultralytics.nn import tasks  # type: ignore[import-not-found]
    except ImportError:
        raise MissingDependencyError(
            f"{name} is no YOLOv8 network, so it needs ultralytics (AGPL-3.0): "
            "pip install 'lightweight-engine[adetailer]', or choose a YOLOv8 detector"
        ) from None
    return getattr(tasks, HEADS[layers["head"][-1][2]])


@contextmanager
def quietly() -> Iterator[None]:
    """Import without a trace: what the library sets for a whole process is set back, and its settings go nowhere."""
    environment, save, printing = dict(os.environ), torch.save, np.get_printoptions()
    width = torch._tensor_str.PRINT_OPTS.linewidth  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(QUIET, YOLO_CONFIG_DIR=folder)
        try:
            yield
        finally:
            for added in os.environ.keys() - environment.keys():
                del os.environ[added]
            os.environ.update(environment)
            torch.save = save
            np.set_printoptions(**printing)
            torch.set_printoptions(linewidth=width)


class _Limit(TorchDispatchMode):
    """Lets no more memory be taken for parameters than a file can fill."""

    def __init__(self, nbytes: int) -> None:
        super().__init__()
        self.left = nbytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.empty.memory_format:
            self.left -= 4 * int(np.prod([int(n) for n in args[0]], dtype=object))
            if self.left < 0:
                raise ValueError("its list of layers asks for more than the file holds")
        return func(*args, **(kwargs or {}))


def _build(network_class: Any, layers: dict[str, Any], state: Mapping[str, Tensor]) -> Any:
    # Weights are drawn, and then replaced: the generator that others use stays where it is.
    with torch.random.fork_rng(devices=[]), _Limit(2 * sum(tensor.nbytes for tensor in state.values()) + HEADROOM):
        network = network_class(layers, verbose=False)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"its tensors are not those of its layers ({str(error)[:200]})") from None
    return network


def _looking(network: nn.Module, classes: int) -> Network:
    """What the versions of the library wrap differently: the joined output, and the prototypes of segmentation."""

    def look(pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        parts = list(_tensors(network(pixels)))
        decoded = next(part for part in parts if part.dim() == 3)
        masks = decoded.shape[1] - 4 - classes
        size = (masks, pixels.shape[2] // 4, pixels.shape[3] // 4)
        prototypes = next((part[0] for part in parts if tuple(part.shape[1:]) == size), None) if masks else None
        return decoded[0], prototypes

    return look


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
