"""Files of detectors for tests: networks saved whole, as ultralytics saves them, without that library."""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightweight_engine.extensions.yolov8 import YOLOv8
from lightweight_engine.extensions.yolov8_sizes import YOLOv8Sizes

TINY = YOLOv8Sizes.scaled(2, depth=1 / 3, width=0.125, widest=256)
TINY_SEGMENTATION = YOLOv8Sizes.scaled(1, depth=1 / 3, width=0.0625, widest=256, segmentation=True)
NAMES = {0: "face", 1: "hand"}


def random_network(sizes: YOLOv8Sizes = TINY, seed: int = 0, *, eager: bool = False) -> YOLOv8:
    """A network whose norms have seen something; an eager one sees things everywhere, unlike in every place."""
    torch.manual_seed(seed)
    network = YOLOv8(sizes)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
            nn.init.uniform_(module.weight, 0.5, 1.5)
    if eager:
        for branch in network.model[22].cv3:  # type: ignore[union-attr]
            nn.init.zeros_(branch[-1].bias)  # type: ignore[index]
            branch[-1].weight.data.mul_(4)  # type: ignore[index, union-attr]
    return network.eval()


class Layer(nn.Module):
    """A module with the parameters of a state dict, nested by their names."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        inner: dict[str, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            first, _, rest = name.partition(".")
            if rest:
                inner.setdefault(first, {})[rest] = tensor
            elif tensor.is_floating_point() and not name.startswith("running"):
                self.register_parameter(first, nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(first, tensor)
        for name, tensors in inner.items():
            self.add_module(name, Layer(tensors))


def save_whole(path: Path, state: Mapping[str, Tensor], kind: str = "DetectionModel", **attributes: Any) -> Path:
    """A file with the network itself. Its classes have the names that ultralytics gives them.

    ``attributes`` are the network's, but for ``train_args``, ``ema`` and ``optimizer``, which stand beside it.
    """
    names = {Layer: "ultralytics.nn.modules.block"}
    network_class = type(kind, (Layer,), {})
    names[network_class] = "ultralytics.nn.tasks"
    beside = {key: attributes.pop(key, None) for key in ("train_args", "ema", "optimizer")}
    with pytest.MonkeyPatch.context() as patch:
        for package in ("ultralytics", "ultralytics.nn", "ultralytics.nn.modules"):
            patch.setitem(sys.modules, package, types.ModuleType(package))
        for each, module in names.items():
            fake = types.ModuleType(module)
            setattr(fake, each.__name__, each)
            patch.setitem(sys.modules, module, fake)
            patch.setattr(each, "__module__", module)
        network = network_class(state)
        for name, value in attributes.items():
            setattr(network, name, value)
        torch.save({"epoch": -1, "model": network, **beside, "date": "today", "version": "8.0"}, path)
    return path
