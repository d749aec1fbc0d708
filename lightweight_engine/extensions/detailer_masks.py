"""From detections to the masks that are painted: which detections, in which order, and how their masks are changed.

Masks are L pictures, boxes x1, y1, x2, y2 in pixels, sizes (width, height). Each function does one step of the
reference, whose order is in ``adetailer``. Source: pipelines.md §d.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw

from ..labels import Compat

Size = tuple[int, int]
BoxF = tuple[float, float, float, float]
Order = Literal["None", "Position (left to right)", "Position (center to edge)", "Area (large to small)"]
Method = Literal["Area", "Confidence"]
Merge = Literal["None", "Merge", "Merge and Invert"]


def area(box: BoxF) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def within_ratio(boxes: Sequence[BoxF], size: Size, low: float, high: float) -> list[int]:
    """Which boxes take a share of the picture from ``low`` to ``high``."""
    whole = size[0] * size[1]
    return [number for number, box in enumerate(boxes) if low <= area(box) / whole <= high]


def top(values: Sequence[float], count: int) -> list[int]:
    """The places of the ``count`` largest values, largest first; all, in their order, if it is 0.

    Of equal values those come first that numpy's ``argsort`` puts last, as in the reference.
    """
    if not count or not values:
        return list(range(len(values)))
    return np.argsort(values)[-count:][::-1].tolist()


def _from_centre(box: BoxF, size: Size) -> float:
    return math.dist((size[0] / 2, size[1] / 2), ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2))


SORT_KEYS: Mapping[Order, Callable[[BoxF, Size], float]] = {
    "None": lambda box, size: 0,
    "Position (left to right)": lambda box, size: box[0],
    "Position (center to edge)": _from_centre,
    "Area (large to small)": lambda box, size: -area(box),
}


def in_order(boxes: Sequence[BoxF], size: Size, order: Order) -> list[int]:
    """The places of the boxes in an order; equal ones stay as they are."""
    return sorted(range(len(boxes)), key=lambda number: SORT_KEYS[order](boxes[number], size))


def box_mask(box: BoxF, size: Size) -> Image.Image:
    """The mask of a box: corners cut to whole pixels, both of them inside."""
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle(box, fill=255)
    return mask


def offset(mask: Image.Image, x: int, y: int, compat: Compat = "fixed") -> Image.Image:
    """A mask moved right by ``x`` and up by ``y``. What leaves the picture is gone; with "forge" it comes back in."""
    moved = ImageChops.offset(mask, x, -y)
    if compat == "forge":
        return moved
    left, upper = max(x, 0), max(-y, 0)
    right, lower = mask.width + min(x, 0), mask.height + min(-y, 0)
    cut = Image.new("L", mask.size)
    if left < right and upper < lower:
        cut.paste(moved.crop((left, upper, right, lower)), (left, upper))
    return cut


def dilate_erode(mask: Image.Image, reach: int) -> Image.Image:
    """A mask grown by a square of ``reach`` pixels, or shrunk where it is negative; 0 is as it was.

    To the byte OpenCV's ``dilate`` and ``erode``: a square of even size reaches one pixel further back than ahead,
    and what lies outside the picture has no say. Only what is white, and as far around it, is worked on.
    """
    from scipy.ndimage import maximum_filter, minimum_filter

    white = mask.getbbox()
    if not reach or white is None:
        return mask
    left, top, right, bottom = white
    far = abs(reach)
    box = max(left - far, 0), max(top - far, 0), min(right + far, mask.width), min(bottom + far, mask.height)
    grown = maximum_filter if reach > 0 else minimum_filter
    outside = 0 if reach > 0 else 255
    levels = grown(np.asarray(mask.crop(box)), size=far, mode="constant", cval=outside)
    changed = Image.new("L", mask.size)
    changed.paste(Image.fromarray(levels), box)
    return changed


def merge(masks: Sequence[Image.Image], how: Merge) -> list[Image.Image]:
    """The masks as they are, or one that is all of them, or all that they are not. No masks stay none."""
    if how == "None" or not masks:
        return list(masks)
    joined: NDArray[np.uint8] = np.bitwise_or.reduce([np.asarray(mask) for mask in masks])
    return [Image.fromarray(joined if how == "Merge" else 255 - joined)]


def meet(mask: Image.Image, other: Image.Image) -> bool:
    """Whether two masks of one size have a pixel in common."""
    return bool(np.any(np.asarray(mask) & np.asarray(other)))


def dynamic_strength(power: float, strength: float, box: BoxF, size: Size) -> float:
    """A denoising strength that falls with the share of the picture that a box takes; power 0 leaves it."""
    if not power:
        return strength
    return strength * (1 - area(box) / (size[0] * size[1])) ** power


# Sizes that SDXL was trained on.
SDXL_SIZES = (
    (1024, 1024),
    (1152, 896),
    (896, 1152),
    (1216, 832),
    (832, 1216),
    (1344, 768),
    (768, 1344),
    (1536, 640),
    (640, 1536),
)


def matching_size(size: Size, box: BoxF) -> Size:
    """The size to draw a box at: the longer side of ``size``, the other by the box's aspect, up to whole eights."""
    longest, aspect = max(size), (box[2] - box[0]) / (box[3] - box[1])
    width, height = (longest, longest / aspect) if aspect > 1 else (longest * aspect, longest)
    return math.ceil(int(width) / 8) * 8, math.ceil(int(height) / 8) * 8


def matching_sdxl_size(box: BoxF) -> Size:
    """Of the sizes of SDXL that with the aspect nearest to the box's."""
    aspect = (box[2] - box[0]) / (box[3] - box[1])
    return min(SDXL_SIZES, key=lambda size: abs(size[0] / size[1] - aspect))
