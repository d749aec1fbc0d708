"""Upscalers and detectors that a request names, checked by name, with those of the demonstration model in their place.

Loads no torch: what is no name is told before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import RequestError
from ..extensions.detailer_args import (
    FACES,
    HANDS,
    ADetailerArgs,
    Passes,
    check_samplers,
    check_supported,
    of_pass,
    read_passes,
    service_passes,
)
from ..extensions.detector_list import DetectorList
from ..labels import LATENT_UPSCALERS
from ..request import GenerationRequest, Task
from ..upscalers.files import HIRES, UpscalerFiles
from .models import TINY

if TYPE_CHECKING:
    from ..config import EngineConfig

TINY_UPSCALER = "4x_tiny"
"""That ships with the engine."""

# The detectors that the demonstration model has for those that a request does not name.
TINY_DETECTORS = {str(FACES["ad_model"]): "face_tiny", str(HANDS["ad_model"]): "hand_tiny"}


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


def passes_of(request: GenerationRequest, *, is_tiny: bool, detectors: Sequence[str]) -> Passes:
    """The detailer's passes of a request: its own list, or those of ``predict()`` for faces and hands.

    Raises:
        RequestError: an argument is wrong.
    """
    if request.adetailer_passes:
        for number, each in enumerate(request.adetailer_passes):
            if isinstance(each, Mapping) and not each.get("ad_model"):
                field = f"adetailer_passes[{number}].ad_model"
                raise RequestError(f"{field}: there is none; name a detector", field=field)
        return read_passes(list(request.adetailer_passes), request.compat, "adetailer_passes")
    if not request.adetailer:
        return Passes(())
    passes = service_passes(
        request.adetailer_args,
        request.adetailer_args_hands,
        faces_prompt=request.ad_prompt,
        hands_prompt=request.ad_hands_prompt,
    )
    if not is_tiny:
        return passes
    return replace(passes, passes=tuple(_of_tiny(args, detectors) for args in passes.passes))


def _of_tiny(args: ADetailerArgs, there: Sequence[str]) -> ADetailerArgs:
    """A pass whose detector is not there, with the demonstration model's own."""
    own = TINY_DETECTORS.get(args.ad_model)
    return args if own is None or args.ad_model in there else args.model_copy(update={"ad_model": own})


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
    if not (request.adetailer or request.adetailer_passes):
        return
    passes = passes_of(request, is_tiny=is_tiny, detectors=detectors.names())
    check_supported(passes)
    check_samplers(passes, request.sampler, request.scheduler, request.compat)
    for place, args in passes.placed:
        with of_pass(place):
            detectors.require(args.ad_model)
