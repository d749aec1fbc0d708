"""The masked part of a picture, filled with what is around it, byte for byte."""

from __future__ import annotations

import numpy as np
from goldens import Case
from PIL import Image

from lightweight_engine.extensions.inpainting import spread


def check(case: Case) -> None:
    mask = mask_of((case["w"], case["h"]), case["rects"])
    made = spread(Image.fromarray(case.array(f"in_{case.id}")), mask)
    np.testing.assert_array_equal(np.array(made), case.array(f"out_{case.id}"))


def mask_of(size: tuple[int, int], rects: list[list[int]]) -> Image.Image:
    levels = np.zeros((size[1], size[0]), np.uint8)
    for x1, y1, x2, y2, value in rects:
        levels[y1:y2, x1:x2] = value
    return Image.fromarray(levels)
