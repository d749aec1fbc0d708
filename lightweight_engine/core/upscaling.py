"""Pictures enlarged by upscalers, with nothing drawn: what ``upscale`` does. Source: pipelines.md §g, extras.

The reference cuts what an upscaler makes to multiples of 8 pixels; here the size is what was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from ..config import EngineConfig
from ..errors import RequestError
from ..request import LARGEST_SCALE, UpscaleRequest
from ..results import Progress
from ..upscalers.library import UpscalerLibrary
from ..upscalers.resampling import Size, resample, resample_levels, scaled, to_image, to_levels
from .image_text import PNG_KEY
from .images import check_size
from .named import TINY_UPSCALER
from .progress import Interrupt, Interrupted, Watch

USUAL_SCALE = 2.0

AfterTile = Callable[[int, int], None]


@dataclass(frozen=True)
class Target:
    """What a picture becomes: ``by`` times as large, at ``size`` exactly, of which the middle is kept where cut."""

    by: float
    size: Size
    cut: Size | None = None

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of what is kept."""
        width, height = self.cut or self.size
        left, top = self.size[0] // 2 - width // 2, self.size[1] // 2 - height // 2
        return left, top, left + width, top + height


def usual_upscaler(config: EngineConfig, library: UpscalerLibrary) -> str:
    """The upscaler of the settings; where nobody set it and its file is not there, the one that ships with us."""
    there = config.is_set("hr_upscaler") or config.hr_upscaler in library.names()
    return config.hr_upscaler if there else TINY_UPSCALER


def target_of(request: UpscaleRequest, size: Size, config: EngineConfig) -> Target:
    """What a picture of a size becomes.

    Raises:
        RequestError: it would be larger than the configuration or the file's format allows, or nothing would be left.
    """
    width, height = request.width, request.height
    asked = [side / old for side, old in zip((width, height), size, strict=True) if side]
    by = max(asked) if asked else request.by or USUAL_SCALE
    # Of sides that are given, one is met exactly, and the other covered.
    whole = (round(size[0] * by), round(size[1] * by)) if asked else scaled(size, by)
    field = "by" if not asked else "width" if width else "height"
    if by > LARGEST_SCALE:
        raise RequestError(
            f"{field}: {by:g} times the picture's size is more than {LARGEST_SCALE:g}; ask for less", field=field
        )
    if min(whole) < 1 or max(whole) > config.max_side:
        raise RequestError(
            f"{field}: the picture would have {whole[0]}x{whole[1]} pixels, and 1 to {config.max_side} a side are "
            "allowed (setting max_side); choose another",
            field=field,
        )
    target = Target(by, whole, (width, height) if request.crop and width and height else None)
    check_size(target.cut or target.size, request.output_format)
    return target


def upscale_pictures(
    request: UpscaleRequest,
    pictures: Sequence[Image.Image],
    library: UpscalerLibrary,
    config: EngineConfig,
    watch: Watch,
) -> tuple[list[Image.Image], tuple[str, ...], bool]:
    """The pictures, as RGB or RGBA; at a scale of 1 a network runs all the same. The text of one stays in its ``info``.

    Returns:
        The pictures, the upscalers that made them, and whether an interrupt left some out.

    Raises:
        RequestError: an upscaler is not known, or a picture would be larger than the configuration allows.
        GenerationCancelled: the caller asked to stop.
        EngineError: an upscaler's file is not there or cannot be used.
    """
    chosen = {"upscaler": request.upscaler or usual_upscaler(config, library)}
    if request.upscaler_2 is not None and request.upscaler_2_visibility > 0:
        chosen["upscaler_2"] = request.upscaler_2
    for field, name in chosen.items():  # all that can be refused is, before any work
        library.entry(name, field=field)
    targets = [target_of(request, picture.size, config) for picture in pictures]
    interrupt = watch.interrupt or Interrupt()
    follower = _Follower(watch, interrupt, len(pictures), len(chosen))
    made: list[Image.Image] = []
    for number, (picture, target) in enumerate(zip(pictures, targets, strict=True)):
        if interrupt.ends_job:
            break
        interrupt.start_batch()
        try:
            versions = [
                _enlarged(picture, target, library, field, name, follower.after_tile(number, part))
                for part, (field, name) in enumerate(chosen.items())
            ]
        except Interrupted:  # part of a picture is none
            continue
        made.append(_finished(picture, target, versions, request.upscaler_2_visibility))
        follower.tell(number, 1.0)
    return made, tuple(chosen.values()), len(made) < len(pictures)


@dataclass(frozen=True)
class _Follower:
    """Tells the caller where the work is, and stops it where asked to. ``parts``: upscalers of each picture."""

    watch: Watch
    interrupt: Interrupt
    pictures: int
    parts: int

    def after_tile(self, number: int, part: int) -> AfterTile:
        """What is called after the tiles of an upscaler."""

        def after_tile(done: int, total: int) -> None:
            self.tell(number, (part + done / total) / self.parts, done, total)
            if done < total and self.interrupt.ends_batch:
                raise Interrupted

        return after_tile

    def tell(self, number: int, part: float, done: int = 0, total: int = 0) -> None:
        """``part`` of a picture is done. Raises GenerationCancelled where the caller asked to stop."""
        self.watch.check()
        if self.watch.on_progress is not None:
            place = {"image_index": number, "image_count": self.pictures}
            fraction = (number + part) / self.pictures
            self.watch.on_progress(Progress(stage="upscale", step=done, steps=total, fraction=fraction, **place))


def _enlarged(
    picture: Image.Image, target: Target, library: UpscalerLibrary, field: str, name: str, after_tile: AfterTile
) -> Image.Image:
    upscaler = library.find(name, field=field, after_tile=after_tile)
    levels = upscaler.upscale(to_levels(picture.convert("RGB")), target.by)
    return to_image(resample_levels(levels, target.size))


def _finished(picture: Image.Image, target: Target, versions: Sequence[Image.Image], visibility: float) -> Image.Image:
    """The versions blended, with the transparency of the picture, which no network has seen, cut, and with its text."""
    made = versions[0] if len(versions) == 1 else Image.blend(versions[0], versions[1], visibility)
    if picture.mode == "RGBA":
        made.putalpha(resample(picture.getchannel("A"), target.size))
    if target.cut is not None:
        made = made.crop(target.box)
    if PNG_KEY in picture.info:
        made.info[PNG_KEY] = picture.info[PNG_KEY]
    return made
