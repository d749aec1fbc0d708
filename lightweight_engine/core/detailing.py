"""The detailer's passes in a job: checked and planned beforehand, then run on each picture by jobs of their own.

What a mask is painted with is a request like any other: image-to-image on one picture, with a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..errors import EngineError, RequestError
from ..extensions.adetailer import ADetailer, DetailerOptions, Outer, PassReport, Repaint
from ..extensions.detailer_args import ADetailerArgs, Passes, check_samplers, of_pass
from ..extensions.detailer_prompts import is_skipped, prompts_of
from ..extensions.detailer_targets import drawn
from ..extensions.detection import Detection
from ..flux.conditioner import resolve_guidance
from ..flux.prompt import parse_networks
from ..request import DetailReport, GenerationRequest
from .limits import check_length, check_parts
from .named import passes_of
from .passes import Pass, Tools, check_work, first_pass, plan_passes
from .plan import Plan
from .processing import Batch, Job, draw, finished

if TYPE_CHECKING:
    from ..config import EngineConfig

SMALLEST_SIDE = 16

# What an inner job does not take over from the outer one.
ONE_PICTURE: Mapping[str, Any] = {
    "num_outputs": 1, "batch_size": 1, "enable_hr": False, "adetailer": False, "adetailer_passes": (),
    "save_stages": False, "skip_img2img": False, "color_correction": False, "subseed_strength": 0.0,
    "resize_mode": 0, "inpainting_fill": 1, "inpainting_mask_invert": False, "mask_round": True,
    "mask_blur_x": None, "mask_blur_y": None, "img2img_upscaler": "None", "img2img_extra_noise": 0.0,
    "img2img_fix_steps": False, "initial_noise_multiplier": 1.0, "seed_resize_from_w": 0, "seed_resize_from_h": 0,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Detailing:
    """The passes of a job, ready to run."""

    detailer: ADetailer
    passes: Passes


@dataclass(eq=False)
class Workshop:
    """Where masks are painted.

    Args:
        plan: makes an inner job of a request.
        enter: called with ``detect`` and ``detail`` as they begin.

    Attributes:
        jobs: those that painted.
        reports: of each picture.
        stages: of each picture, how each pass left it, where the request keeps that.
    """

    plan: Callable[[GenerationRequest], Job]
    enter: Callable[[str], None]
    jobs: list[Job] = field(default_factory=list)
    reports: list[DetailReport] = field(default_factory=list)
    stages: list[dict[str, Image.Image]] = field(default_factory=list)

    def leave_out(self) -> None:
        """The next picture is left as it is."""
        self.reports.append(DetailReport())
        self.stages.append({})

    def refiner(self, job: Job, batch: Batch) -> Callable[[list[Image.Image]], list[Image.Image]]:
        """What is done to the pictures of a batch."""
        return partial(detail, job, batch, self) if job.detailing else list


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


def detail(job: Job, batch: Batch, workshop: Workshop, images: Sequence[Image.Image]) -> list[Image.Image]:
    """Pictures of a batch after all passes."""
    assert job.detailing is not None
    results = []
    for number, image in enumerate(images):
        if job.ends():
            workshop.leave_out()
            results.append(image)
            continue
        outer = _outer(job, batch.first + number)
        prompt = outer.prompts[outer.index]
        workshop.enter("detect")
        done = job.detailing.detailer.detail(
            image, job.detailing.passes, outer, lambda one, prompt=prompt: _paint(job, one, prompt, workshop)
        )
        workshop.reports.append(_told(done.reports))
        kept = done.reports if job.request.save_stages else ()
        workshop.stages.append({f"pass {i}": report.image for i, report in enumerate(kept, 1)})
        results.append(done.image)
    return results


def _outer(job: Job, index: int) -> Outer:
    everyone = [row for each in job.batches for row in each.rows]
    request = job.request
    return Outer(
        prompts=tuple(prompt for _, _, prompt in everyone),
        negative_prompts=(request.negative_prompt,) * len(everyone),
        seeds=tuple(seed for seed, _, _ in everyone),
        subseeds=tuple(subseed for _, subseed, _ in everyone),
        size=(job.size[1], job.size[0]),
        steps=request.steps,
        cfg_scale=request.cfg_scale,
        distilled_cfg_scale=resolve_guidance(request.distilled_cfg_scale, True, request.compat) or 0.0,
        sampler=job.sampler,
        scheduler=job.scheduler,
        index=index,
        mask=_painted(job, index),
    )


def _painted(job: Job, index: int) -> Image.Image | None:
    """The mask of an inpainting job that painted the whole picture."""
    if job.begin is None:
        return None
    prepared = job.begin.of(index)
    return prepared.overlay_mask if prepared.paste_to is None else None


def _paint(job: Job, repaint: Repaint, outer_prompt: str, workshop: Workshop) -> Image.Image | None:
    """Paint one mask by a job of its own; None where it was interrupted, or would be now."""
    if job.ends():
        return None
    workshop.enter("detail")
    inner = workshop.plan(request_of(job.request, repaint, outer_prompt))
    workshop.jobs.append(inner)
    (batch,) = inner.batches
    drawn = draw(inner, batch)
    workshop.enter("detect")
    if job.ends():
        return None
    (image,) = finished(inner, batch, drawn.pixels)
    return image


def request_of(request: GenerationRequest, repaint: Repaint, outer_prompt: str) -> GenerationRequest:
    """The request that paints a mask."""
    update = {
        **ONE_PICTURE,
        "image": repaint.image,
        "mask": repaint.mask,
        "prompt": with_outer_loras(request, repaint.prompt, outer_prompt),
        "negative_prompt": repaint.negative_prompt,
        "seed": repaint.seed,
        "subseed": repaint.subseed,
        "denoising_strength": repaint.denoising_strength,
        "width": repaint.size[0],
        "height": repaint.size[1],
        "steps": repaint.steps,
        "cfg_scale": repaint.cfg_scale,
        "distilled_cfg_scale": repaint.distilled_cfg_scale,
        "sampler": repaint.sampler,
        "scheduler": repaint.scheduler,
        "mask_blur": repaint.mask_blur,
        "inpaint_full_res": repaint.only_masked,
        "inpaint_full_res_padding": repaint.padding,
    }
    if repaint.noise_multiplier is not None:
        update["initial_noise_multiplier"] = repaint.noise_multiplier
    return request.model_copy(update=update)


def with_outer_loras(request: GenerationRequest, prompt: str, outer_prompt: str) -> str:
    """The prompt of a mask: LoRAs of the outer prompt act, unless its own names some."""
    tags = [tag for tag in parse_networks(outer_prompt)[1] if tag.kind == "lora"]
    if request.compat == "fixed" and not any(tag.kind == "lora" for tag in parse_networks(prompt)[1]):
        prompt += "".join(map(str, tags))
    return prompt


def _told(reports: Sequence[PassReport]) -> DetailReport:
    return DetailReport(
        passes=tuple(
            {
                "model": report.args.ad_model,
                "found": [{"box": each.box, "score": each.score, "label": each.label} for each in report.found],
                "masks": len(report.targets),
                "painted": report.painted,
            }
            for report in reports
        )
    )
