"""Upscalers and detectors that a request names, checked by name; the demonstration model has an upscaler of its own.

Loads no torch: what is no name is told before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..extensions.detector_list import DetectorList
from ..labels import LATENT_UPSCALERS
from ..request import GenerationRequest, Task
from ..upscalers.files import HIRES, UpscalerFiles
from .models import TINY

if TYPE_CHECKING:
    from ..config import EngineConfig

TINY_UPSCALER = "4x_tiny"
"""That ships with the engine."""


def at_home(request: GenerationRequest, *, is_tiny: bool, upscalers: Callable[[], Sequence[str]]) -> GenerationRequest:
    """A request with the demonstration model's own upscaler, where that of the production job is asked for in vain.

    Args:
        is_tiny: the demonstration model draws.
        upscalers: lists the names of those that are there, which takes a look at all folders.
    """
    usual = GenerationRequest.model_fields[HIRES].default
    if not is_tiny or request.hr_upscaler != usual or usual in upscalers():
        return request
    return request.model_copy(update={HIRES: TINY_UPSCALER})


def check_named(task: Task, config: EngineConfig, *, is_tiny: bool) -> None:
    """Refuse upscalers and detectors that are not there, and arguments of passes that are wrong. No file is opened.

    Args:
        is_tiny: the demonstration model draws.

    Raises:
        RequestError, ModelNotFoundError: names the field, close names, and those that there are.
    """
    upscalers = UpscalerFiles([config.models_dir, TINY])
    if isinstance(task, GenerationRequest):
        _check_generation(task, upscalers, DetectorList(upscalers.roots), is_tiny=is_tiny)
        return
    for field in ("upscaler", "upscaler_2"):
        if (name := getattr(task, field)) is not None:
            upscalers.entry(name, field=field)


def _check_generation(
    request: GenerationRequest, upscalers: UpscalerFiles, detectors: DetectorList, *, is_tiny: bool
) -> None:
    """Folders are listed for those requests alone that name something in them."""
    if request.hires and request.image is None and request.hr_upscaler not in LATENT_UPSCALERS:
        request = at_home(request, is_tiny=is_tiny, upscalers=upscalers.names)
        upscalers.entry(request.hr_upscaler, field=HIRES)
    if request.image is not None and request.compat != "forge":
        upscalers.entry(request.img2img_upscaler, field="img2img_upscaler")
    if request.detailed:
        from .named_passes import check_passes  # the detailer's arguments, which other requests do not need

        check_passes(request, detectors, is_tiny=is_tiny)
