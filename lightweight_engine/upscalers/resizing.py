"""A picture at another size, in the reference's resize modes: stretched, cut to fit, or fitted and filled."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from PIL import Image
from torch import Tensor

from .picture import Box, Picture
from .resampling import HOST, Filter, Size, in_mode, resample, to_image, to_levels
from .upscaler import Upscaler, enlarged, size_of

STRETCH, CROP, FILL, LATENT = range(4)
"""``LATENT`` leaves the picture alone: its latent is resized."""

_EDGE = 2  # rows or columns that a bicubic filter takes into account at a border


def resize(
    image: Image.Image,
    size: Size,
    mode: int = STRETCH,
    upscaler: Upscaler | None = None,
    *,
    device: torch.device = HOST,
) -> Image.Image:
    """``image`` at ``size`` (width, height).

    Args:
        mode: ``STRETCH`` changes the aspect, ``CROP`` cuts what is too much, ``FILL`` stretches the border to what is
            missing. The last two give RGB.
        upscaler: enlarges in place of Lanczos, which then does the rest; not of L.
        device: where that is done; the bytes are the same.
    """
    if device != HOST:
        made = to_image(levels_at(image, size, mode, None if image.mode == "L" else upscaler, device=device))
        return made if mode == STRETCH else in_mode(made, "RGB")
    if image.mode == "RGBA":
        image = image.convert("RGB")
    if mode == STRETCH:
        return _scaled(image, size, upscaler)
    inner = _inner(image.size, size, cover=mode == CROP)
    resized = _scaled(image, inner, upscaler)
    canvas = Image.new("RGB", size)
    canvas.paste(resized, (size[0] // 2 - inner[0] // 2, size[1] // 2 - inner[1] // 2))
    if mode == FILL:
        for place, edge in _borders(size, inner, image.size):
            canvas.paste(_stretched(resized, place, edge), place[:2])
    return canvas


def levels_at(
    picture: Image.Image | Picture,
    size: Size,
    mode: int = STRETCH,
    upscaler: Upscaler | None = None,
    *,
    device: torch.device = HOST,
) -> Tensor:
    """What ``resize`` makes of a picture as levels on ``device``, which it then does not leave."""
    if device == HOST:
        image = picture.image if isinstance(picture, Picture) else picture
        return to_levels(resize(image, size, mode, upscaler))
    return resize_levels(Picture.of(picture).levels(device), size, mode, upscaler)


def resize_levels(levels: Tensor, size: Size, mode: int = STRETCH, upscaler: Upscaler | None = None) -> Tensor:
    """Levels ``[C, H, W]`` at ``size`` on the device that they are on, to the byte as ``resize`` makes a picture."""
    if mode == STRETCH:
        return enlarged(levels, size, upscaler)
    inner = _inner(size_of(levels), size, cover=mode == CROP)
    resized = enlarged(levels, inner, upscaler)
    canvas = levels.new_zeros(len(levels), size[1], size[0])
    _paste(canvas, resized, size[0] // 2 - inner[0] // 2, size[1] // 2 - inner[1] // 2)
    if mode == FILL:
        for place, edge in _borders(size, inner, size_of(levels)):
            left, top = (max(each - _EDGE, 0) for each in edge[:2])
            strip = to_image(resized[:, top : edge[3] + _EDGE, left : edge[2] + _EDGE])
            within = edge[0] - left, edge[1] - top, edge[2] - left, edge[3] - top
            _paste(canvas, to_levels(_stretched(strip, place, within), levels.device), *place[:2])
    return canvas


def _paste(canvas: Tensor, levels: Tensor, left: int, top: int) -> None:
    """Levels with a corner at a place of a canvas, which may lie outside it."""
    part = levels[:, max(-top, 0) : canvas.shape[1] - top, max(-left, 0) : canvas.shape[2] - left]
    left, top = max(left, 0), max(top, 0)
    canvas[:, top : top + part.shape[1], left : left + part.shape[2]] = part


def _inner(old: Size, new: Size, *, cover: bool) -> Size:
    """The size at the old aspect that covers the new one, or fits into it."""
    (old_width, old_height), (width, height) = old, new
    aspect, old_aspect = width / height, old_width / old_height
    if aspect > old_aspect if cover else aspect < old_aspect:
        return width, max(old_height * width // old_width, 1)
    return max(old_width * height // old_height, 1), height


def _borders(size: Size, inner: Size, old: Size) -> Iterator[tuple[Box, Box]]:
    """What is missing beside a fitted picture, and the edge of it that is stretched there; an odd rest stays black."""
    (width, height), (inner_width, inner_height) = size, inner
    if width / height < old[0] / old[1]:
        margin = height // 2 - inner_height // 2
        if margin > 0:
            yield (0, 0, width, margin), (0, 0, width, 0)
            bottom = margin + inner_height
            yield (0, bottom, width, bottom + margin), (0, inner_height, width, inner_height)
    elif width / height > old[0] / old[1]:
        margin = width // 2 - inner_width // 2
        if margin > 0:
            yield (0, 0, margin, height), (0, 0, 0, height)
            right = margin + inner_width
            yield (right, 0, right + margin, height), (inner_width, 0, inner_width, height)


def _stretched(image: Image.Image, place: Box, edge: Box) -> Image.Image:
    """An edge, which has no area, as large as a place."""
    return resample(image, (place[2] - place[0], place[3] - place[1]), Filter.BICUBIC, edge)


def _scaled(image: Image.Image, size: Size, upscaler: Upscaler | None) -> Image.Image:
    if upscaler is None or image.mode == "L":
        return resample(image, size)
    return to_image(enlarged(to_levels(image), size, upscaler))
