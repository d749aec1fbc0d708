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

from ..backend.devices import sent

Size = tuple[int, int]
Filter = Image.Resampling
LANCZOS, BICUBIC = Filter.LANCZOS, Filter.BICUBIC
HOST = torch.device("cpu")

_PREMULTIPLIED = {"LA": "La", "RGBA": "RGBa"}
_FRACTION = 22  # bits of Pillow's weights below the point, for 8-bit pictures
_SUPPORT = {LANCZOS: 3.0, BICUBIC: 2.0}  # samples to either side, at the old size or the new, whichever is larger
_BAND = 1024  # rows that are taken along at once: in float64 they are eight times as large


def resample(
    image: Image.Image,
    size: Size,
    filter: Filter = LANCZOS,
    box: tuple[int, int, int, int] | None = None,
    *,
    device: torch.device = HOST,
) -> Image.Image:
    """``image`` at ``size``, or the part of it inside ``box`` (left, top, right, bottom).

    Args:
        device: may do the work, with the same bytes.
    """
    if device != HOST and filter == LANCZOS and box is None and image.mode in ("L", "RGB"):
        return to_image(resample_levels(to_levels(image, device), size))
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
    if levels.device == HOST:
        return to_levels(resample(to_image(levels), size))
    return lanczos(levels, size)


def lanczos(levels: Tensor, size: Size) -> Tensor:
    """What Pillow's Lanczos gives, to the bit, by torch alone."""
    return _by_products(levels, size, LANCZOS)


def bicubic(levels: Tensor, size: Size) -> Tensor:
    """What Pillow's bicubic filter gives, to the bit, by torch alone."""
    return _by_products(levels, size, BICUBIC)


def _by_products(levels: Tensor, size: Size, filter: Filter) -> Tensor:
    """Two products with matrices of weights: sums of integers are exact in float64."""
    width, height = size
    across = _matrix(levels.shape[2], width, filter, levels.device).T
    down = _matrix(levels.shape[1], height, filter, levels.device)
    rows = [torch.cat([_rounded(band.double() @ across) for band in plane.split(_BAND)]) for plane in levels]
    return torch.stack([_rounded(down @ plane.double()) for plane in rows])


def _matrix(old: int, new: int, filter: Filter, device: torch.device) -> Tensor:
    """The weights ``[new, old]`` from ``old`` samples to ``new``, spread out where they are used."""
    first, taps = (sent(torch.from_numpy(each), device) for each in _weights(old, new, filter))
    places = first[:, None] + torch.arange(taps.shape[1], device=device)
    return taps.new_zeros(new, old + taps.shape[1]).scatter_(1, places, taps)[:, :old]


def _rounded(sums: Tensor) -> Tensor:
    """Sums with ``_FRACTION`` bits below the point as bytes, rounded half up; the sums are used up."""
    return sums.add_(2 ** (_FRACTION - 1)).div_(2**_FRACTION).floor_().clamp_(0, 255).byte()


@lru_cache(maxsize=32)  # a job has four of an upscaler, and six of each part that the detailer paints
def _weights(old: int, new: int, filter: Filter = LANCZOS) -> tuple[np.ndarray, np.ndarray]:
    """Pillow's fixed-point weights (Resample.c, HPND licence): the first sample of each sum, and its weights.

    Returns:
        int64 ``[new]`` and float64 ``[new, taps]``, zeros behind the last sample.
    """
    scale = old / new
    stretch = max(scale, 1.0)
    support = _SUPPORT[filter] * stretch
    centre = (np.arange(new) + 0.5) * scale
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + support + 0.5).astype(np.int64), old)
    sample = first[:, None] + np.arange((last - first).max())
    x = (sample - centre[:, None] + 0.5) / stretch
    taps = np.where(sample < last[:, None], (_lanczos if filter == LANCZOS else _bicubic)(np.abs(x)), 0.0)
    taps /= taps.cumsum(1)[:, -1:]  # one after another, as Pillow adds them
    return first, np.trunc(taps * 2**_FRACTION + np.copysign(0.5, taps))


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where(x < 3, np.sinc(x) * np.sinc(x / 3), 0.0)


def _bicubic(x: np.ndarray) -> np.ndarray:
    a = -0.5
    inner, outer = ((a + 2) * x - (a + 3)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    """A picture in a mode: itself where it has it, which Pillow would copy."""
    return image if image.mode == mode else image.convert(mode)


def to_levels(image: Image.Image, device: torch.device = HOST) -> Tensor:
    """A picture as levels ``[3, H, W]`` (one channel for L) on a device."""
    array = np.array(image if image.mode == "L" else in_mode(image, "RGB"))
    return sent(torch.from_numpy(array.reshape(*array.shape[:2], -1)), device).permute(2, 0, 1).contiguous()


def to_numbers(levels: Tensor) -> Tensor:
    """Levels as float32 in 0..1, by a table: a GPU's own division by 255 has other last bits than a CPU's."""
    if levels.device == HOST:
        return levels.float() / 255
    return (torch.arange(256).float() / 255).to(levels.device)[levels.int()]


def to_image(levels: Tensor) -> Image.Image:
    """Levels ``[3, H, W]`` or ``[1, H, W]`` as a picture."""
    array = levels.permute(1, 2, 0).contiguous().cpu().numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def scaled(size: Size, by: float, multiple: int = 1) -> Size:
    """A size times ``by``, cut to whole multiples."""
    width, height = (int(side * by) // multiple * multiple for side in size)
    return width, height
