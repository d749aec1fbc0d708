"""The detailer's passes that a request asks for: their arguments read, their detectors checked by name.

Loads no torch, and is imported where a request asks for some.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

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
from ..request import GenerationRequest

# The detectors that the demonstration model has for those that a request does not name.
TINY_DETECTORS = {str(FACES["ad_model"]): "face_tiny", str(HANDS["ad_model"]): "hand_tiny"}


def passes_of(request: GenerationRequest, *, is_tiny: bool, detectors: Sequence[str]) -> Passes:
    """The detailer's passes of a request: its own list, or those of ``predict()`` for faces and hands.

    Raises:
        RequestError: an argument is wrong.
    """
    if request.adetailer_passes:
        passes = read_passes(list(request.adetailer_passes), request.compat, "adetailer_passes")  # tells of slips first
        for number, each in enumerate(request.adetailer_passes):
            if isinstance(each, Mapping) and not each.get("ad_model"):
                field = f"adetailer_passes[{number}].ad_model"
                raise RequestError(f"{field}: there is none; name a detector", field=field)
        return passes
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


def check_passes(request: GenerationRequest, detectors: DetectorList, *, is_tiny: bool) -> None:
    """Refuse detectors that are not there, and arguments that are wrong. No file is opened.

    Raises:
        RequestError, ModelNotFoundError: names the field, close names, and those that there are.
    """
    passes = passes_of(request, is_tiny=is_tiny, detectors=detectors.names())
    check_supported(passes)
    check_samplers(passes, request.sampler, request.scheduler, request.compat)
    for place, args in passes.placed:
        with of_pass(place):
            detectors.require(args.ad_model)
