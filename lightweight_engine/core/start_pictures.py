"""The pictures that image-to-image starts from, as a request gives them, and what is done to its results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..errors import RequestError
from ..extensions.inpainting import Masking, Prepared, latent_mask, paste_back, prepare, read_mask
from ..request import SMALLEST_SIDE, GenerationRequest
from ..upscalers.picture import Picture
from ..upscalers.resampling import HOST, resample
from ..upscalers.resizing import LATENT, STRETCH
from ..upscalers.upscaler import Upscaler
from .colours import match_colours
from .pictures import PictureReader, flattened, pictures_in

SLIGHT = 0.02  # change of aspect that nobody sees, as of sides cut to whole cells


@dataclass(frozen=True)
class StartPictures:
    """One picture for all outputs, or one for each.

    Args:
        recolour: results get the colours of their start picture.
        originals: as they were given, upright and opaque.
        device: where they are resized.
    """

    pictures: tuple[Prepared, ...]
    masking: Masking
    recolour: bool = False
    originals: tuple[Picture, ...] = ()
    device: torch.device = HOST

    def of(self, index: int) -> Prepared:
        """The start of output ``index``."""
        return self.pictures[index if len(self.pictures) > 1 else 0]

    def original(self, index: int) -> Picture:
        """The start picture of output ``index`` at its own size."""
        return self.originals[index if len(self.originals) > 1 else 0]

    def finish(self, result: Picture, index: int) -> Picture:
        """The result of output ``index`` in its colours and its place."""
        begin = self.of(index)
        made: Image.Image | Tensor = match_colours(result.image, begin.picture) if self.recolour else result.made
        return paste_back(made, begin, device=self.device)


def read_start(
    request: GenerationRequest,
    size: tuple[int, int],
    reader: PictureReader,
    upscaler: Upscaler | None,
    warnings: list[str],
    device: torch.device = HOST,
    *,
    max_side: int,
    cell: int,
) -> StartPictures | None:
    """The start pictures of a request that was checked for a pass of ``size`` (height, width); None for text-to-image.

    Args:
        device: may resize them.
        max_side: of a picture whose latent is resized, as it is encoded at its own size.
        cell: pixels a side of a cell of the latent.

    Raises:
        RequestError: a picture cannot be read, or is too small or too large for its latent to be resized.
        DownloadError: one cannot be fetched.
    """
    if request.image is None:
        return None
    pictures = [_given(each, reader, request.background_color) for each in pictures_in(request.image)]
    if request.resize_mode == LATENT:
        _check_own_size(pictures, max_side)
    masking = masking_of(request)
    mask = None
    if request.mask is not None:
        if request.resize_mode == LATENT and not masking.only_masked:
            raise RequestError("resize_mode: 3 cannot be had with a mask; choose 0, 1 or 2", field="resize_mode")
        mask = read_mask(reader.read(request.mask, "mask"), round=masking.round)
        masking = _for_blank(mask, masking, request, warnings)
    if not (mask and masking.only_masked):  # then the part around the mask has the drawing's aspect
        _tell_stretching(request, size, pictures[0], warnings)
    made = [
        prepare(
            picture,
            _fitting(mask, picture, warnings),
            (size[1], size[0]),
            request.resize_mode,
            masking,
            upscaler,
            device=device,
        )
        for picture in pictures
    ]
    _tell_faint(made[0], (size[0] // cell, size[1] // cell), masking, warnings)
    return StartPictures(tuple(made), masking, request.color_correction, tuple(pictures), device)


def _given(given: Any, reader: PictureReader, background: str) -> Picture:
    """A picture of a request as it is drawn on; one that the engine itself has made is not read."""
    return given if isinstance(given, Picture) else Picture(flattened(reader.read(given), background))


def _check_own_size(pictures: Sequence[Picture], max_side: int) -> None:
    """Refuse pictures whose latent cannot be resized: they are encoded as they are."""
    for picture in pictures:
        told = f"resize_mode: 3 encodes the start picture at its own size, {picture.width}x{picture.height}, "
        if min(picture.size) < SMALLEST_SIDE:
            told += f"and {SMALLEST_SIDE} pixels a side are the least"
        elif max(picture.size) > max_side:
            told += f"and {max_side} pixels a side are the most (setting max_side)"
        else:
            continue
        raise RequestError(f"{told}; choose 0, 1 or 2", field="resize_mode")


def masking_of(request: GenerationRequest) -> Masking:
    """How a request uses its mask."""
    x, y = request.mask_blur_x, request.mask_blur_y
    return Masking(
        blur=(request.mask_blur if x is None else x, request.mask_blur if y is None else y),
        invert=request.inpainting_mask_invert,
        round=request.mask_round,
        content=request.inpainting_fill,
        only_masked=request.inpaint_full_res,
        padding=request.inpaint_full_res_padding,
    )


def _for_blank(mask: Image.Image, masking: Masking, request: GenerationRequest, warnings: list[str]) -> Masking:
    """A mask that paints nothing has no masked part to draw: the reference then paints all, ours nothing."""
    if mask.getextrema() != ((255, 255) if masking.invert else (0, 0)):
        return masking
    if request.compat == "forge":
        warnings.append("the mask is blank: the whole picture is painted")
        return masking
    warnings.append(
        "the mask is blank: nothing is painted anew, though all steps run; paint white what is to change, or invert it"
    )
    return replace(masking, only_masked=False)


def _tell_faint(begin: Prepared, cells: tuple[int, int], masking: Masking, warnings: list[str]) -> None:
    """Say that a mask which is not blank is so in a latent of ``cells``: too grey, as red paint is, or too small."""
    if begin.mask is None or not masking.round or begin.mask.getextrema()[1] == 0:
        return
    if not _is_white_within(begin.mask, cells) and not latent_mask(begin.mask, cells).any():
        side = begin.mask.height // cells[0]
        warnings.append(
            f"the mask is less than half white in every cell of {side}x{side} pixels: nothing is painted anew, though "
            "all steps run, and what it covers only passes through the autoencoder; paint it white, or larger, or set "
            "mask_round to false"
        )


def _is_white_within(mask: Image.Image, cells: tuple[int, int]) -> bool:
    """Whether a mask is white in the middle of what it paints, as far around as a cell depends on; most masks are."""
    left, top, right, bottom = mask.getbbox() or (0, 0, 0, 0)
    reach = 3 * (mask.height // cells[0])
    x, y = (left + right) // 2, (top + bottom) // 2
    return mask.crop((x - reach, y - reach, x + reach, y + reach)).getextrema() == (255, 255)


def _tell_stretching(request: GenerationRequest, size: tuple[int, int], picture: Picture, warnings: list[str]) -> None:
    """Say that a picture of another aspect is stretched to a size which the model chose, and perhaps nobody meant."""
    height, width = size
    changed = abs(width * picture.height / (height * picture.width) - 1) > SLIGHT
    if changed and request.resize_mode == STRETCH and (request.width is None or request.height is None):
        warnings.append(
            f"the start picture of {picture.width}x{picture.height} is stretched to {width}x{height}, as its size was "
            "not asked for; give width and height, or resize_mode 1 (cut to fit) or 2 (fit and fill)"
        )


def _fitting(mask: Image.Image | None, picture: Picture, warnings: list[str]) -> Image.Image | None:
    if mask is None or mask.size == picture.size:
        return mask
    warnings.append(
        f"the mask of {mask.width}x{mask.height} was resized to the picture's {picture.width}x{picture.height}"
    )
    return resample(mask, picture.size)
