"""Resampling as Pillow 9.5 did it: along the rows first, then along the columns, with 8 bits in between.

Newer versions take the columns first where that is less work, which moves levels by up to 45 on noise. On a GPU the
same fixed-point sums are done as one product of matrices for each direction, so that a picture need not leave it.

Pictures are PIL images, or *levels*: uint8 tensors ``[C, H, W]``. Sizes are (width, height), as Pillow has them.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Size = tuple[int, int]
Filter = Image.Resampling
LANCZOS = Filter.LANCZOS

_PREMULTIPLIED = {"LA": "La", "RGBA": "RGBa"}
_FRACTION = 22  # bits of Pillow's weights below the point, for 8-bit pictures
_LOBES = 3  # of Lanczos


def resample(
    image: Image.Image, size: Size, filter: Filter = LANCZOS, box: tuple[int, int, int, int] | None = None
) -> Image.Image:
    """``image`` at ``size``, or the part of it inside ``box`` (left, top, right, bottom)."""
    if image.mode in _PREMULTIPLIED and filter != Filter.NEAREST:
        whole = resample(image.convert(_PREMULTIPLIED[image.mode]), size, filter, box)
        return whole.convert(image.mode)
    left, top, right, bottom = box or (0, 0, *image.size)
    if filter == Filter.NEAREST:
        return image.resize(size, filter, (left, top, right, bottom))
    rows = image.resize((size[0], image.height), filter, (left, 0, right, image.height))
    return rows.resize(size, filter, (0, top, size[0], bottom))


def resample_levels(levels: Tensor, size: Size) -> Tensor:
    """Levels ``[C, H, W]`` at ``size`` by Lanczos, on the device that they are on."""
    if (levels.shape[2], levels.shape[1]) == size:
        return levels
    if levels.device.type == "cpu":
        return to_levels(resample(to_image(levels), size))
    return lanczos(levels, size)


def lanczos(levels: Tensor, size: Size) -> Tensor:
    """What Pillow's Lanczos gives, to the bit, by torch alone: sums of integers are exact in float64."""
    width, height = size
    across = _weights(levels.shape[2], width).to(levels.device)
    down = _weights(levels.shape[1], height).to(levels.device)
    return torch.stack([_rounded(down @ _rounded(plane.double() @ across.T).double()) for plane in levels])


def _rounded(sums: Tensor) -> Tensor:
    """Sums with ``_FRACTION`` bits below the point as bytes, rounded half up."""
    return ((sums + 2 ** (_FRACTION - 1)) / 2**_FRACTION).floor().clamp(0, 255).byte()


@lru_cache(maxsize=8)
def _weights(old: int, new: int) -> Tensor:
    """Pillow's fixed-point weights ``[new, old]`` from ``old`` samples to ``new`` (Resample.c, HPND licence)."""
    scale = old / new
    stretch = max(scale, 1.0)
    support = _LOBES * stretch
    weights = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * scale
        first, last = max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), old)
        x = (np.arange(first, last) - centre + 0.5) / stretch
        row = np.where(np.abs(x) < _LOBES, np.sinc(x) * np.sinc(x / _LOBES), 0.0)
        row /= row.sum()
        weights[i, first:last] = np.trunc(row * 2**_FRACTION + np.copysign(0.5, row))
    return torch.from_numpy(weights)


def to_levels(image: Image.Image) -> Tensor:
    """A picture as levels ``[3, H, W]`` (one channel for L)."""
    array = np.array(image if image.mode == "L" else image.convert("RGB"))
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1).contiguous()


def to_image(levels: Tensor) -> Image.Image:
    """Levels ``[3, H, W]`` or ``[1, H, W]`` as a picture."""
    array = levels.permute(1, 2, 0).contiguous().cpu().numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def scaled(size: Size, by: float, multiple: int = 1) -> Size:
    """A size times ``by``, cut to whole multiples."""
    width, height = (int(side * by) // multiple * multiple for side in size)
    return width, height
