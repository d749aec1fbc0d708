"""Masks: L pictures, white where something is painted. Their blur, and the part of a picture that they ask for.

Boxes are left, top, right, bottom in pixels, the last two exclusive; sizes are (width, height).
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Size = tuple[int, int]
Box = tuple[int, int, int, int]

_ONE = 256  # the fixed point of OpenCV's blur


def blur(mask: Image.Image, x: float, y: float) -> Image.Image:
    """A mask blurred along its rows by ``x`` and then along its columns by ``y``; 0 is not at all.

    To the byte what OpenCV's ``GaussianBlur`` gives with these sigmas and kernels of five sigmas. Only what is white,
    and as far around it as the blur reaches, is worked on.
    """
    white = mask.getbbox()
    if white is None:
        return mask.copy()
    left, top, right, bottom = white
    wide, high = (_reach(sigma) + 1 if sigma > 0 else 0 for sigma in (x, y))
    box = max(left - wide, 0), max(top - high, 0), min(right + wide, mask.width), min(bottom + high, mask.height)
    levels = np.asarray(mask.crop(box))
    if x > 0:
        levels = _blurred_rows(levels, x)
    if y > 0:
        levels = _blurred_rows(levels.T, y).T
    blurred = Image.new("L", mask.size)
    blurred.paste(Image.fromarray(np.ascontiguousarray(levels)), box)
    return blurred


def _reach(sigma: float) -> int:
    """Pixels to either side that a blur takes into account."""
    return int(2.5 * sigma + 0.5)


def _blurred_rows(levels: NDArray[np.uint8], sigma: float) -> NDArray[np.uint8]:
    kernel = _kernel(sigma)
    reach = len(kernel) // 2
    # 16 bits hold it all: the weights sum to 256.
    wide = np.pad(levels.astype(np.uint16), ((0, 0), (reach, reach)), "reflect" if levels.shape[1] > 1 else "edge")
    width = levels.shape[1]
    total = wide[:, reach : reach + width] * kernel[reach] + _ONE // 2
    for i, weight in enumerate(kernel[:reach]):
        if weight:
            mirrored = len(kernel) - 1 - i
            total += (wide[:, i : i + width] + wide[:, mirrored : mirrored + width]) * weight
    return (total // _ONE).astype(np.uint8)


@lru_cache(maxsize=16)
def _kernel(sigma: float) -> tuple[int, ...]:
    """OpenCV's Gaussian in whole numbers (Apache-2.0): what rounding loses is carried on, the middle takes the rest."""
    reach = _reach(sigma)
    exact = [math.exp(-((i - reach) ** 2) / (2 * sigma**2)) for i in range(2 * reach + 1)]
    total, carried, half = sum(exact), 0.0, []
    for value in exact[:reach]:
        wanted = value / total * _ONE + carried
        half.append(round(wanted))
        carried = wanted - half[-1]
    return (*half, _ONE - 2 * sum(half), *reversed(half))


def crop_region(mask: Image.Image, padding: int = 0) -> Box | None:
    """The box around all that is not black, widened by ``padding`` within the mask; None for a blank one."""
    box = mask.getbbox()
    if box is None:
        return None
    left, top, right, bottom = box
    width, height = mask.size
    return max(left - padding, 0), max(top - padding, 0), min(right + padding, width), min(bottom + padding, height)


def expand_region(box: Box, size: Size, whole: Size) -> Box:
    """A box grown to the aspect of ``size``, as far as a picture of the size ``whole`` lets it."""
    left, top, right, bottom = box
    if (right - left) / (bottom - top) > size[0] / size[1]:
        top, bottom = _grown(top, bottom, (right - left) / (size[0] / size[1]), whole[1])
    else:
        left, right = _grown(left, right, (bottom - top) * (size[0] / size[1]), whole[0])
    return left, top, right, bottom


def _grown(first: int, last: int, length: float, limit: int) -> tuple[int, int]:
    """A span grown on both sides to ``length``, moved inside 0..``limit``, and cut where it is longer than that."""
    more = int(length - (last - first))
    first, last = first - more // 2, last + more - more // 2
    if last >= limit:
        first, last = first - (last - limit), limit
    if first < 0:
        first, last = 0, min(last - first, limit)
    return first, last
