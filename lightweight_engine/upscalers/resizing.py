"""A picture at another size, in the reference's resize modes: stretched, cut to fit, or fitted and filled."""

from __future__ import annotations

import torch
from PIL import Image

from .resampling import HOST, Filter, Size, resample, to_image, to_levels
from .upscaler import Upscaler, enlarged

STRETCH, CROP, FILL, LATENT = range(4)
"""``LATENT`` leaves the picture alone: its latent is resized."""


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
        upscaler: enlarges in place of Lanczos, which then does the rest.
        device: where that is done; the bytes are the same.
    """
    if image.mode == "RGBA":
        image = image.convert("RGB")
    if mode == STRETCH:
        return _scaled(image, size, upscaler, device)
    inner = _inner(image.size, size, cover=mode == CROP)
    resized = _scaled(image, inner, upscaler, device)
    canvas = Image.new("RGB", size)
    canvas.paste(resized, (size[0] // 2 - inner[0] // 2, size[1] // 2 - inner[1] // 2))
    if mode == FILL:
        _fill_borders(canvas, resized, image.size)
    return canvas


def _inner(old: Size, new: Size, *, cover: bool) -> Size:
    """The size at the old aspect that covers the new one, or fits into it."""
    (old_width, old_height), (width, height) = old, new
    aspect, old_aspect = width / height, old_width / old_height
    if aspect > old_aspect if cover else aspect < old_aspect:
        return width, max(old_height * width // old_width, 1)
    return max(old_width * height // old_height, 1), height


def _fill_borders(canvas: Image.Image, resized: Image.Image, old: Size) -> None:
    """Stretch the outermost rows or columns of the picture to the border; an odd one left over stays black."""
    (width, height), (inner_width, inner_height) = canvas.size, resized.size
    if width / height < old[0] / old[1]:
        margin = height // 2 - inner_height // 2
        if margin > 0:
            size = (width, margin)
            canvas.paste(resample(resized, size, Filter.BICUBIC, (0, 0, width, 0)), (0, 0))
            bottom = resample(resized, size, Filter.BICUBIC, (0, inner_height, width, inner_height))
            canvas.paste(bottom, (0, margin + inner_height))
    elif width / height > old[0] / old[1]:
        margin = width // 2 - inner_width // 2
        if margin > 0:
            size = (margin, height)
            canvas.paste(resample(resized, size, Filter.BICUBIC, (0, 0, 0, height)), (0, 0))
            right = resample(resized, size, Filter.BICUBIC, (inner_width, 0, inner_width, height))
            canvas.paste(right, (margin + inner_width, 0))


def _scaled(image: Image.Image, size: Size, upscaler: Upscaler | None, device: torch.device) -> Image.Image:
    if upscaler is None or image.mode == "L":
        return resample(image, size, device=device)
    return to_image(enlarged(to_levels(image, device), size, upscaler))
