"""Detectors on a GPU find what they find on the CPU, within the room that was foreseen, and leave nothing there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from test_upscalers import noise

from lightweight_engine.extensions.boxes import Letterbox
from lightweight_engine.extensions.detection import YOLODetector
from lightweight_engine.extensions.detector_networks import visiting
from lightweight_engine.extensions.detector_place import Place
from lightweight_engine.extensions.yolov8 import YOLOv8, build
from lightweight_engine.extensions.yolov8_sizes import SCALES, YOLOv8Sizes
from lightweight_engine.upscalers.picture import Picture

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
SIZE = (384, 640)


def network(scale: str, *, segmentation: bool) -> YOLOv8:
    depth, width, widest = SCALES[scale]
    torch.manual_seed(1)
    made = YOLOv8(YOLOv8Sizes.scaled(2, depth=depth, width=width, widest=widest, segmentation=segmentation))
    for each in made.modules():
        if isinstance(each, torch.nn.BatchNorm2d):  # numbers that keep their size through all layers
            each.reset_parameters()
    return build(made.state_dict())


def detector(scale: str, device: torch.device, *, segmentation: bool = False, **options: Any) -> YOLODetector:
    return visiting("x", network(scale, segmentation=segmentation), ("face", "hand"), 640, Place(device, **options))


def seen(each: YOLODetector, picture: Picture) -> tuple[torch.Tensor, torch.Tensor | None]:
    with torch.inference_mode():
        return each._seen(picture, Letterbox.of(*picture.size, each.image_size))


@pytest.mark.parametrize("segmentation", [False, True])
@pytest.mark.parametrize("scale", ["n", "x"])
def test_boxes_are_those_of_the_cpu(scale: str, segmentation: bool) -> None:
    picture = Picture(noise(1344, 768).cuda())
    there, here = (
        seen(detector(scale, device, segmentation=segmentation), picture) for device in (CUDA, torch.device("cpu"))
    )
    boxes = slice(0, 4)
    assert (there[0][boxes] - here[0][boxes]).abs().max() < 0.01, "pixels"
    assert (there[0][4:6] - here[0][4:6]).abs().max() < 1e-4, "scores"
    if segmentation:
        assert there[1] is not None and here[1] is not None
        torch.testing.assert_close(there[1], here[1], atol=1e-3, rtol=1e-3)
    assert torch.backends.cudnn.allow_tf32, "others convolve as before"


@pytest.mark.parametrize("segmentation", [False, True])
@pytest.mark.parametrize("scale", sorted(SCALES))
def test_it_takes_what_was_foreseen_and_gives_it_back(scale: str, segmentation: bool) -> None:
    picture = Picture(noise(1344, 768).cuda())
    each = detector(scale, CUDA, segmentation=segmentation)
    foreseen = each.nbytes + network(scale, segmentation=segmentation).sizes.room(SIZE)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    seen(each, picture)
    taken = torch.cuda.max_memory_allocated() - before
    print(f"{scale} {segmentation}: {taken >> 20} of {foreseen >> 20} MiB")
    assert taken <= foreseen
    assert torch.cuda.memory_allocated() == before


def test_without_room_it_looks_on_the_cpu() -> None:
    picture = Picture(Image.new("RGB", (768, 1344)))
    each = detector("n", CUDA, free=lambda: 1 << 20)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    made, _ = seen(each, picture)
    assert made.device.type == "cpu" and torch.cuda.max_memory_allocated() == before
