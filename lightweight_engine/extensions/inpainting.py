"""Inpainting: what the autoencoder gets of a picture and its mask, and how the result goes back into the picture.

A mask is an L picture, white where something new is painted. Sizes are (width, height), boxes left, top, right, bottom.
Every step and its order are the reference's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, ImageChops, ImageFilter, ImageOps
from torch import Tensor

from ..upscalers.picture import Box, Picture
from ..upscalers.resampling import HOST, Filter, Size, bicubic, in_mode, resample, to_image, to_levels, to_numbers
from ..upscalers.resizing import CROP, FILL, LATENT, STRETCH, levels_at, resize, resize_levels
from ..upscalers.upscaler import Upscaler
from .masks import blur, crop_region, expand_region

SURROUNDINGS, ORIGINAL, NOISE, NOTHING = range(4)
"""What painting starts from (``inpainting_fill``)."""

_HALF = 127  # the last level of a mask that counts as black where cells are painted wholly or not at all

# (radius, how often) of the blurs that are laid over one another, so that colours run into the masked part.
_SPREAD = ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1))


@dataclass(frozen=True)
class Masking:
    """How a mask is used.

    Args:
        blur: of its edge, along rows and along columns.
        round: cells of the latent are painted wholly or not at all.
        only_masked: the masked part alone is drawn, at the full size, with ``padding`` pixels around it.
    """

    blur: tuple[int, int] = (4, 4)
    invert: bool = False
    round: bool = True
    content: int = ORIGINAL
    only_masked: bool = False
    padding: int = 32


@dataclass(frozen=True, eq=False)
class Prepared:
    """A start picture as it is drawn on.

    Attributes:
        levels: ``[3, H, W]`` at the size that is drawn, or at its own where its latent is resized; on the device.
        mask: at the size that is drawn; None where all is painted.
        kept: the picture that the result goes into.
        overlay_mask: of the size of ``kept``; what it covers is the result's.
        paste_to: where the result goes in ``kept``; None is everywhere.
    """

    levels: Tensor
    mask: Image.Image | None = None
    kept: Picture | None = None
    overlay_mask: Image.Image | None = None
    paste_to: Box | None = None

    @property
    def picture(self) -> Image.Image:
        """The levels as RGB."""
        return to_image(self.levels)

    @property
    def overlay(self) -> Image.Image | None:
        """RGBA: what is kept, as it is laid over the result."""
        if self.kept is None or self.overlay_mask is None:
            return None
        return _cut_out(self.kept.image, self.overlay_mask).convert("RGBA")

    def cropped(self, box: Box) -> Prepared:
        """What concerns a part of the picture that is kept, which holds all that the result covers."""
        assert self.kept is not None and self.overlay_mask is not None
        return replace(self, kept=self.kept.crop(box), overlay_mask=self.overlay_mask.crop(box), paste_to=None)


def read_mask(image: Image.Image, *, round: bool = True) -> Image.Image:
    """A mask of any mode as L: of a picture with transparency its opaque part, of others its brightness."""
    if image.mode != "RGBA" or image.getchannel("A").getextrema() == (255, 255):
        return in_mode(image, "L")
    alpha = image.getchannel("A")
    return alpha.point([0] * 129 + [255] * 127) if round else alpha


def prepare(
    given: Image.Image | Picture,
    mask: Image.Image | None,
    size: Size,
    mode: int = STRETCH,
    masking: Masking | None = None,
    upscaler: Upscaler | None = None,
    *,
    device: torch.device = HOST,
) -> Prepared:
    """A start picture at the size that is drawn, its mask, and what is laid over the result.

    Args:
        given: the picture, upright.
        mask: L, as ``read_mask`` gives it; a blank one counts as none where only the masked part is drawn.
        mode: of resizing (``upscalers.resizing``).
        upscaler: enlarges the picture, where a whole one is resized.
        device: where pictures are resized; the bytes are the same.
    """
    picture, masking, region = Picture.of(given), masking or Masking(), None
    if mask is not None:
        mask = blur(ImageOps.invert(mask) if masking.invert else mask, *masking.blur)
        if masking.only_masked:
            region = _region(mask, size, masking.padding)
            mask = mask if region else None
    if mask is None:
        if mode == LATENT:
            return Prepared(picture.levels(device))
        return Prepared(levels_at(picture, size, mode, upscaler, device=device))
    if region is not None:
        overlay_mask, mask = mask, _mask_at(mask.crop(region), size, FILL, device)
        kept, levels = picture, levels_at(picture.crop(region), size, FILL, device=device)
    else:
        mode = FILL if mode == LATENT else mode
        mask = _mask_at(mask, size, mode, device)
        overlay_mask = ImageChops.add(mask, mask)
        levels = levels_at(picture, size, mode, upscaler, device=device)
        kept = Picture(levels)
    if masking.content != ORIGINAL:
        levels = to_levels(spread(to_image(levels), mask), device)
    return Prepared(levels, mask, kept, overlay_mask, region)


def _mask_at(mask: Image.Image, size: Size, mode: int, device: torch.device) -> Image.Image:
    """A mask resized as its picture is, and L as it was."""
    if device != HOST:
        return to_image(levels_at(mask, size, mode, device=device))
    return in_mode(resize(mask, size, mode), "L")


def _region(mask: Image.Image, size: Size, padding: int) -> Box | None:
    """The part of a picture that is drawn for its mask, at the aspect of ``size``; None for a blank mask."""
    region = crop_region(mask, padding)
    return expand_region(region, size, mask.size) if region else None


def _cut_out(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """A picture without what the mask covers, its colours premultiplied (RGBa)."""
    kept = Image.new("RGBa", picture.size)
    kept.paste(picture.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask))
    return kept


def spread(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """A picture whose masked part is filled with the colours around it."""
    kept = _cut_out(picture, mask)
    filled = Image.new("RGBA", picture.size)
    for radius, times in _SPREAD:
        blurred = kept.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(times):
            filled.alpha_composite(blurred)
    return filled.convert("RGB")


def latent_mask(
    mask: Image.Image, cells: tuple[int, int], *, round: bool = True, device: torch.device = HOST
) -> Tensor:
    """The mask of a latent ``[h, w]``: 1 where it is painted.

    Args:
        device: where it is made, with the same numbers, and stays.
    """
    size = cells[1], cells[0]
    if device != HOST:
        small = bicubic(to_levels(mask, device), size)[0]
        return (small > _HALF).float() if round else to_numbers(small)
    share = np.asarray(resample(mask, size, Filter.BICUBIC), dtype=np.float32) / 255
    return torch.from_numpy(np.around(share) if round else share)


def start_content(latent: Tensor, mask: Tensor, noise: Tensor, content: int) -> Tensor:
    """The latent that painting starts from.

    Args:
        mask: 1 where it is painted.
        noise: the first draw of each picture, ``[B, C, h, w]``.
    """
    if content in (SURROUNDINGS, ORIGINAL):
        return latent
    kept = latent * (1 - mask)
    return kept + noise * mask if content == NOISE else kept


def paste_back(result: Image.Image | Tensor, prepared: Prepared, *, device: torch.device = HOST) -> Picture:
    """The result in its place, under the part of the picture that was kept.

    Args:
        result: a picture, or levels ``[3, H, W]`` on the device.
        device: as in ``prepare``; the picture is made there.
    """
    box = prepared.paste_to
    if prepared.kept is None:
        return Picture(result)
    if box is None:
        return Picture(_laid_over(Picture(result).image, prepared))
    size = box[2] - box[0], box[3] - box[1]
    if isinstance(result, Tensor) and result.device != HOST:
        return Picture(_placed(resize_levels(result, size, CROP), prepared, box))
    canvas = prepared.kept.image.copy()  # away from the result, what is laid over it is the picture itself
    part = resize(Picture(result).image, size, CROP, device=device)
    canvas.paste(_laid_over(part, prepared.cropped(box)), box)
    return Picture(canvas)


def _laid_over(result: Image.Image, prepared: Prepared) -> Image.Image:
    overlay = prepared.overlay
    if overlay is None:
        return result
    canvas = result.convert("RGBA")
    canvas.alpha_composite(overlay)
    return canvas.convert("RGB")


def _placed(part: Tensor, prepared: Prepared, box: Box) -> Tensor:
    """A result at the size of its place, on the device that it is on."""
    assert prepared.kept is not None and prepared.overlay_mask is not None
    left, top, right, bottom = box
    canvas = prepared.kept.levels(part.device).clone()
    place = canvas[:, top:bottom, left:right]
    place.copy_(laid_over(part, place, to_levels(prepared.overlay_mask.crop(box), part.device)))
    return canvas


def laid_over(result: Tensor, kept: Tensor, mask: Tensor) -> Tensor:
    """What ``overlay`` makes of a result that it is laid over, to the byte, in whole numbers as Pillow computes it.

    Args:
        result, kept: levels ``[3, H, W]``.
        mask: levels ``[1, H, W]``; 255 where all is the result's.
    """
    alpha = 255 - mask.int()
    premultiplied = _over_255(kept.int() * alpha)
    colour = (premultiplied * 255).div(alpha.clamp(min=1), rounding_mode="floor").clamp(max=255)
    return _over_255(colour * alpha + result.int() * (255 - alpha)).byte()


def _over_255(products: Tensor) -> Tensor:
    """Divided by 255 and rounded."""
    products = products + 128
    return ((products >> 8) + products) >> 8
