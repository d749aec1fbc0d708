"""One picture enlarged by an upscaler, with nothing drawn: what ``upscale`` does."""

from __future__ import annotations

from PIL import Image

from ..config import EngineConfig
from ..errors import RequestError
from ..request import Progress
from ..upscalers.library import UpscalerLibrary
from ..upscalers.resampling import resample, resample_levels, scaled, to_image, to_levels
from .progress import Watch

LARGEST = 16.0
TINY_UPSCALER = "4x_tiny"
"""That ships with the engine."""


def usual_upscaler(config: EngineConfig, library: UpscalerLibrary) -> str:
    """The upscaler of the settings; where nobody set it and its file is not there, the one that ships with us."""
    there = config.is_set("hr_upscaler") or config.hr_upscaler in library.names()
    return config.hr_upscaler if there else TINY_UPSCALER


def upscale_picture(
    picture: Image.Image, by: float, name: str, library: UpscalerLibrary, config: EngineConfig, watch: Watch
) -> Image.Image:
    """``picture`` at ``by`` times its size, as RGB or RGBA; at a scale of 1 a network runs all the same.

    Raises:
        RequestError: the upscaler is not known, or the picture would be larger than the configuration allows.
        GenerationCancelled: the caller asked to stop.
        EngineError: the upscaler's file is not there or cannot be used.
    """
    if not 0 < by <= LARGEST:
        raise RequestError(f"by: {by:g} is not above 0 and at most {LARGEST:g}; ask for less", field="by")
    size = scaled(picture.size, by)
    if min(size) < 1 or max(size) > config.max_side:
        raise RequestError(
            f"by: the picture would have {size[0]}x{size[1]} pixels, and 1 to {config.max_side} a side are allowed "
            "(setting max_side); choose another",
            field="by",
        )

    def after_tile(done: int, total: int) -> None:
        watch.check()
        if watch.on_progress is not None:
            watch.on_progress(Progress(stage="upscale", step=done, steps=total, fraction=done / total))

    upscaler = library.find(name, after_tile=after_tile)
    made = to_image(resample_levels(upscaler.upscale(to_levels(picture), by), size))
    if picture.mode == "RGBA":  # whose transparency no network has seen
        made.putalpha(resample(picture.getchannel("A"), size))
    return made
