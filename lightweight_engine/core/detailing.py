"""The detailer's passes of a job, checked and planned before anything is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from ..errors import EngineError, RequestError
from ..extensions.adetailer import ADetailer, DetailerOptions
from ..extensions.detailer_args import NONE_RUNS, ADetailerArgs, Passes, check_samplers, idle_arguments, of_pass
from ..extensions.detailer_prompts import is_skipped, prompts_of
from ..extensions.detailer_targets import drawn
from ..extensions.detection import Detection
from ..request import SMALLEST_SIDE, GenerationRequest
from .limits import check_length, check_parts
from .mask_request import ONE_PICTURE, with_outer_loras
from .named_passes import passes_of
from .passes import Pass, Tools, check_work, first_pass, plan_passes
from .plan import Plan

if TYPE_CHECKING:
    from ..config import EngineConfig


@dataclass(frozen=True, eq=False)
class Detailing:
    """The passes of a job, ready to run."""

    detailer: ADetailer
    passes: Passes


def detailing_of(request: GenerationRequest, tools: Tools) -> Detailing | None:
    """The passes that a request asks for; None where it asks for none.

    Raises:
        RequestError: an argument is wrong, or an unknown detector or class is named.
        ModelError, MissingDependencyError: a detector cannot be used.
    """
    is_tiny = tools.networks.models.is_tiny
    passes = passes_of(request, is_tiny=is_tiny, detectors=tools.detectors.names())
    if not passes.active:
        return None
    config = tools.config
    options = DetailerOptions(
        order=config.ad_order,
        dynamic_denoise_power=config.ad_dynamic_denoise_power,
        match_size=config.ad_match_size,
        same_seed=config.ad_same_seed,
        compat=request.compat,
    )
    detailer = ADetailer(tools.detectors, options)
    detailer.check(passes)
    check_samplers(passes, request.sampler, request.scheduler, request.compat)
    return Detailing(detailer, passes)


def idle_detailing(detailing: Detailing | None) -> list[str]:
    """What a request that asks for the detailer asks in vain."""
    return [NONE_RUNS] if detailing is None else idle_arguments(detailing.passes)


def find(request: GenerationRequest, tools: Tools, image: Image.Image) -> tuple[list[list[Detection]], Image.Image]:
    """What the passes of a request find on a picture, and the picture with its boxes and masks; nothing is painted."""
    detailing = detailing_of(request, tools)
    found, shown = [], image
    for args in detailing.passes.active if detailing else ():
        assert detailing is not None
        detections, targets = detailing.detailer.find_targets(image, args)
        found.append(detections)
        shown = drawn(shown, detections, targets)
    return found, shown


def plan_detailing(detailing: Detailing, first: Pass, tools: Tools) -> list[Plan]:
    """The memory plan of each pass, at the size that it draws: of the mask that takes most.

    Masks are planned with each text that they may be painted with: a pass that finds nothing would not tell what is
    wrong with them.

    Args:
        first: the first pass of the job.

    Raises:
        RequestError: a mask is drawn at a size, or takes more work, than the configuration allows; or a text is wrong.
        EngineError: a LoRA of a text cannot be had or used.
    """
    plans = []
    for place, args in detailing.passes.placed:
        with of_pass(place), _of_arguments(args):
            plans += sorted(_plans(args, first, tools), key=lambda plan: plan.peak)[-1:]
    return plans


def _plans(args: ADetailerArgs, first: Pass, tools: Tools) -> Iterator[Plan]:
    request = first.request
    own = args.ad_use_inpaint_width_height
    width, height = (args.ad_inpaint_width, args.ad_inpaint_height) if own else (first.size[1], first.size[0])
    if min(width, height) < SMALLEST_SIDE:
        field = "ad_inpaint_width" if width < SMALLEST_SIDE else "ad_inpaint_height"
        raise RequestError(f"{field}: {width}x{height} is less than {SMALLEST_SIDE} pixels; give more", field=field)
    mask = request.model_copy(
        update={
            **ONE_PICTURE,
            "width": width,
            "height": height,
            "steps": args.ad_steps if args.ad_use_steps else request.steps,
            "cfg_scale": args.ad_cfg_scale if args.ad_use_cfg_scale else request.cfg_scale,
            "sampler": args.own_sampler or first.sampler,
            "scheduler": args.own_scheduler or first.scheduler,
            "denoising_strength": args.ad_denoising_strength,
            "image": Image.new("RGB", (1, 1)),  # stands for any: only that there is one matters
        }
    )
    mains = dict.fromkeys(prompt for batch in first.batches for prompt in batch.prompts)
    for prompt, negative in dict.fromkeys(pair for main in mains for pair in _texts(args, request, main, tools.config)):
        one = first_pass(mask.model_copy(update={"prompt": prompt, "negative_prompt": negative}), tools, [], _untold)
        check_work(one, tools.config)
        yield plan_passes(one, None, None, tools)


def _texts(
    args: ADetailerArgs, request: GenerationRequest, main: str, config: EngineConfig
) -> Iterator[tuple[str, str]]:
    """Prompt and negative prompt of the masks of a picture, as far as they have some of their own."""
    parts = []
    for name, text, outer in (
        ("prompt", args.ad_prompt, main),
        ("negative_prompt", args.ad_negative_prompt, request.negative_prompt),
    ):
        check_length(name, text, config)
        parts.append(prompts_of(text, [outer], 0, ""))
        check_parts(name, len(parts[-1]), config)
    for number in range(max(map(len, parts))):
        prompt, negative = (texts[min(number, len(texts) - 1)] for texts in parts)
        if is_skipped(prompt):
            continue
        for name, text in (("prompt", prompt), ("negative_prompt", negative)):
            check_length(name, text, config)
        yield with_outer_loras(request, prompt, main), negative


@contextmanager
def _of_arguments(args: ADetailerArgs) -> Iterator[None]:
    """Faults of the request that paints a mask name the arguments of the pass which its fields are from."""
    own = {
        "prompt": ("ad_", args.ad_prompt),
        "negative_prompt": ("ad_", args.ad_negative_prompt),
        "steps": ("ad_", args.ad_use_steps),
        "width": ("ad_inpaint_", args.ad_use_inpaint_width_height),
        "height": ("ad_inpaint_", args.ad_use_inpaint_width_height),
    }
    try:
        yield
    except EngineError as error:
        prefix, is_own = own.get(error.field or "", ("", False))
        if is_own:
            error.put_before(prefix)
        raise


def _untold(*_: object) -> None:
    """Nobody watches what is planned."""
