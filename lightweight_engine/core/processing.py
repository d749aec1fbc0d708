"""How a request becomes pictures: the story, in the order in which it happens.

Image-to-image differs from text-to-image in two things: the start latent, and a schedule that is entered part-way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backend.pace import Lead
from ..extensions.hires_fix import LatentMode, Passes, Target
from ..extensions.hires_fix import start as hires_start
from ..extensions.inpainting import start_content
from ..flux.conditioner import Conditioner, resolve_guidance
from ..flux.conditioning import Composition, Scheduled
from ..flux.guidance import Guided, Inpainting, SkipRules
from ..flux.latents import token_count
from ..flux.lora_set import NO_LORAS, LoraSet
from ..flux.noise import ImageNoise, Source
from ..flux.prompt import PromptPlan, parse_networks, plan_negative, plan_prompt
from ..flux.sampling import Forecast, SamplerOptions, Schedule, plan, run
from ..flux.schedules import ScheduleOptions
from ..flux.velocity import Velocity
from ..labels import Compat, schedule_steps
from ..request import GenerationRequest
from ..upscalers.picture import Picture
from ..upscalers.upscaler import Upscaler
from .coding import Start, decode_latent, encode_pixels, start_of
from .finite import check_finite
from .images import quantised, to_images
from .networks import Networks
from .progress import Interrupted
from .recovery import Recovery
from .start_pictures import StartPictures

if TYPE_CHECKING:
    from PIL import Image

    from .detailing import Detailing

DEFAULT_STRENGTH = 0.75

Texts = tuple[list[Composition], list[Scheduled] | None]
"""The conditioning of each picture's prompt, and of the negative prompt."""


@dataclass(frozen=True)
class Job:
    """One pass, as it is for every picture of a request.

    Args:
        forecast: None where the number of steps depends on the latent.
        size: (height, width) in pixels.
        begin: the pictures that it starts from.
        attempt: does a piece of a stage's work, once more with less on the device where memory runs out.
        enter: called with the name of a stage as it begins.
        after_step: called with (step, latent, denoised); raises Interrupted to stop with what there is.
        ends: whether the caller wants the batch as it is, so that what would follow is left out.
        batches: what is drawn at once, in order.
        base_steps: of a hires pass those of the first, from which schedules of its prompts count on.
        hires: the pass that follows.
        detailing: what is done to the finished pictures.
    """

    request: GenerationRequest
    networks: Networks
    conditioner: Conditioner
    sampler: str
    scheduler: str
    schedule: Schedule
    forecast: Forecast | None
    size: tuple[int, int]
    noise_source: Source
    begin: StartPictures | None
    attempt: Recovery
    enter: Callable[[str], None]
    after_step: Callable[[int, Tensor, Tensor], None]
    ends: Callable[[], bool]
    warnings: list[str]
    batches: tuple[Batch, ...]
    base_steps: int | None
    hires: Hires | None = None
    detailing: Detailing | None = None

    @property
    def cells(self) -> tuple[int, int]:
        """(h, w) of the latent."""
        factor = self.networks.autoencoder_factor
        return self.size[0] // factor, self.size[1] // factor

    @property
    def is_drawn(self) -> bool:
        """Whether pictures are drawn at all; else the start pictures are detailed as they are."""
        return not (self.request.skip_img2img and self.detailing and self.begin)

    @property
    def all_batches(self) -> list[Batch]:
        """Of this pass and the one that follows."""
        return [*self.batches, *(self.hires.batches.values() if self.hires else ())]

    @property
    def strength(self) -> float | None:
        """The denoising strength of an image-to-image pass; None for text-to-image."""
        return denoising_strength(self.request) if self.begin is not None else None


@dataclass(frozen=True)
class Hires:
    """The pass that refines an enlarged picture.

    Args:
        method: what enlarges it; None is Lanczos.
        batches: the same pictures with what their second pass asks for, by the number of their first.
    """

    job: Job
    target: Target
    method: LatentMode | Upscaler | None
    batches: Mapping[int, Batch]


@dataclass(frozen=True)
class Batch:
    """Pictures that are drawn at once: a seed, a subseed and a prompt for each, and the LoRAs that act on all.

    ``first`` is the number of the first of them in the job.
    """

    seeds: tuple[int, ...]
    subseeds: tuple[int, ...]
    prompts: tuple[str, ...]
    loras: LoraSet = NO_LORAS
    first: int = 0

    @classmethod
    def of(cls, rows: Sequence[tuple[int, int, str]], loras: LoraSet = NO_LORAS) -> Batch:
        """From (seed, subseed, prompt) of each picture."""
        return cls(tuple(row[0] for row in rows), tuple(row[1] for row in rows), tuple(row[2] for row in rows), loras)

    @property
    def rows(self) -> list[tuple[int, int, str]]:
        """(seed, subseed, prompt) of each picture."""
        return list(zip(self.seeds, self.subseeds, self.prompts, strict=True))


@dataclass(frozen=True)
class Drawn:
    """Finished latents ``[B, 16, h, w]`` and pixels ``[B, 3, H, W]`` in 0..1.

    ``stages`` are the pixels of the stages before, by name in their order, where a request keeps them.
    """

    latent: Tensor
    pixels: Tensor
    stages: Mapping[str, Tensor] = field(default_factory=dict)


@torch.inference_mode()
def draw(job: Job, batch: Batch) -> Drawn:
    """Draw one batch of pictures."""
    job.enter("encode")
    texts = job.attempt("encode", lambda: encode_prompts(job, batch))
    if job.hires is None:
        return decoded(job, walk(job, batch, texts, start_of(job, batch)))
    second, again = job.hires.job, job.hires.batches[batch.first]
    later = job.attempt("encode", lambda: encode_prompts(second, again))
    latent = walk(job, batch, texts, start_of(job, batch))
    return decoded(job, latent) if job.ends() else refine(job, latent, again, later)


def decoded(job: Job, latent: Tensor, stages: Mapping[str, Tensor] | None = None) -> Drawn:
    """The finished latent of a pass with its pixels, where no pass follows."""
    job.enter("decode")
    return Drawn(latent, job.attempt("decode", lambda: decode_latent(job, latent)), stages or {})


def walk(job: Job, batch: Batch, texts: Texts, start: Start) -> Tensor:
    """One pass through a schedule: the finished latent ``[B, 16, h, w]``."""
    request, networks = job.request, job.networks
    positives, negatives = texts
    noise = image_noise(job, batch)
    first = noise.first()
    job.enter("sample")
    networks.adapt(batch.loras)
    model = job.attempt("sample", networks.load, "transformer")
    foreseen = job.forecast.sigmas if job.forecast else ()
    velocity = Velocity(model, networks.recorded(token_count(*job.cells), len(foreseen) or None))
    job.attempt("sample", velocity.precompute, foreseen, conditionings(positives, negatives))
    evaluate = partial(job.attempt, "sample", velocity)
    guided = Guided(evaluate, positives, negatives, request.cfg_scale, rules=skip_rules(job), compat=request.compat)
    init, painted = start.latent, None
    if init is not None and start.mask is not None:
        init = start_content(init, start.mask, first, start.content)
        painted = Inpainting(guided, init, 1 - start.mask, noise.side())
    latent = job.schedule.start(
        first, init, noise_multiplier=request.initial_noise_multiplier, extra_noise=request.img2img_extra_noise
    )
    lead = Lead(networks.device)

    def after_step(step: int, latent: Tensor, denoised: Tensor) -> None:
        lead.step()
        job.after_step(step, latent, denoised)

    try:
        latent = run(job.schedule, painted or guided, latent, noise, after_step, sampler_options(request))
    except Interrupted as interrupted:
        latent = interrupted.denoised
    latent = painted.blend(latent) if painted else latent
    check_finite(networks, "transformer", [latent])
    return latent


def refine(job: Job, latent: Tensor, batch: Batch, texts: Texts) -> Drawn:
    """The hires pass of a batch, from the finished latent of its first pass."""
    assert job.hires is not None
    hires, second = job.hires, job.hires.job
    factor = second.networks.autoencoder_factor
    kept: dict[str, Tensor] = {}

    def decode(finished: Tensor) -> Tensor:
        job.enter("decode")
        kept["base"] = job.attempt("decode", lambda: decode_latent(job, finished))
        return kept["base"]

    def enlarge(work: Callable[[], Tensor]) -> Tensor:
        second.enter("upscale")
        kept["upscaled"] = second.attempt("upscale", work)
        return kept["upscaled"]

    def encode(pixels: Tensor) -> Tensor:
        second.networks.enter("decode", second.attempt.plan)
        return second.attempt("decode", lambda: encode_pixels(second, pixels, batch.seeds))

    try:
        start = hires_start(latent, hires.target, hires.method, Passes(decode, encode, enlarge), factor)
    except Interrupted:
        start = None
    if start is None or job.ends():
        return Drawn(latent, kept["base"]) if "base" in kept else decoded(job, latent)
    if job.request.save_stages and "base" not in kept:
        decode(latent)
    stages = kept if job.request.save_stages else {}
    if not second.schedule.levels and "upscaled" in kept:
        return Drawn(start, hires.target.cut_pixels(kept["upscaled"], factor), stages)
    latent = walk(second, batch, texts, Start(start)) if second.schedule.levels else start
    return decoded(second, latent, stages)


def encode_prompts(job: Job, batch: Batch) -> Texts:
    """The conditioning of each picture's prompt, and of the negative prompt where guidance needs one."""
    request, count = job.request, len(batch.prompts)
    job.networks.adapt(batch.loras)
    plans = plans_of(request, batch.prompts, job.sampler, job.base_steps)
    guidance = resolve_guidance(request.distilled_cfg_scale, job.networks.params.guidance_embed, request.compat)
    made = job.conditioner.adapted(batch.loras.text_key)(plans, guidance, job.warnings)
    return made[:count], [made[count].parts[0][1]] * count if len(made) > count else None


def plans_of(
    request: GenerationRequest, prompts: Sequence[str], sampler: str, base_steps: int | None
) -> list[PromptPlan]:
    """What each prompt asks for when; last the negative one, where guidance takes it.

    Schedules count the steps that are asked for, also where a pass that starts from a picture runs fewer, as in the
    reference.

    Args:
        base_steps: of ``Job``.
    """
    compat, steps = request.compat, schedule_steps(sampler, request.steps)
    plans = [
        plan_prompt(encoded_text(prompt, compat), steps, base_steps=base_steps, compat=compat) for prompt in prompts
    ]
    if request.cfg_scale != 1:
        negative = encoded_text(request.negative_prompt, compat, negative=True)
        plans.append(plan_negative(negative, steps, base_steps=base_steps))
    return plans


def encoded_text(prompt: str, compat: Compat, *, negative: bool = False) -> str:
    """What is encoded of a prompt: all but its tags, which ``forge`` leaves in a negative one."""
    return prompt if negative and compat == "forge" else parse_networks(prompt)[0]


def conditionings(positives: Sequence[Composition], negatives: Sequence[Scheduled] | None) -> list[Any]:
    """Every conditioning that sampling may ask for."""
    scheduled = [part for picture in positives for _, part in picture.parts] + list(negatives or ())
    return [cond for each in scheduled for _, cond in each.entries]


def make(
    job: Job, batch: Batch, refine: Callable[[list[Picture]], list[Picture]]
) -> tuple[list[Image.Image], list[dict[str, Image.Image]]]:
    """The pictures of a batch, and of each the stages before it, by name in their order.

    Args:
        refine: what is done to finished pictures.
    """
    if not job.is_drawn:
        assert job.begin is not None
        given = [job.begin.original(batch.first + i) for i in range(len(batch.seeds))]
        return [each.image for each in refine(given)], [{} for _ in given]
    drawn = draw(job, batch)
    return [each.image for each in finished(job, batch, drawn.pixels, refine)], stages_of(job, drawn)


def finished(
    job: Job, batch: Batch, pixels: Tensor, refine: Callable[[list[Picture]], list[Picture]] = list
) -> list[Picture]:
    """The pictures of a batch as they are given back: in the colours and in the place that its start pictures ask for.

    Args:
        pixels: ``[B, 3, H, W]`` in 0..1.
        refine: what is done to them before that.
    """
    results = refine([Picture(levels) for levels in quantised(pixels)])
    if job.begin is None:
        return results
    return [job.begin.finish(result, batch.first + i) for i, result in enumerate(results)]


def stages_of(job: Job, drawn: Drawn) -> list[dict[str, Image.Image]]:
    """For each picture, those of the stages before it, by name in their order."""
    kept = dict(drawn.stages)
    if job.request.save_stages and job.detailing:
        kept["undetailed"] = drawn.pixels
    pictures = {name: to_images(pixels) for name, pixels in kept.items()}
    return [{name: each[i] for name, each in pictures.items()} for i in range(len(drawn.pixels))]


def image_noise(job: Job, batch: Batch) -> ImageNoise:
    """The noise of a batch, as the request and the reference's rules have it."""
    request, factor = job.request, job.networks.autoencoder_factor
    resized = request.seed_resize_from_h > 0 and request.seed_resize_from_w > 0
    return ImageNoise(
        (16, *job.cells),
        batch.seeds,
        source=job.noise_source,
        device=job.networks.device,
        subseeds=batch.subseeds,
        subseed_strength=request.subseed_strength,
        resize_from=(request.seed_resize_from_h // factor, request.seed_resize_from_w // factor) if resized else None,
        seed_delta=request.eta_noise_seed_delta,
        compat=request.compat,
    )


def denoising_strength(request: GenerationRequest) -> float:
    """Of an image-to-image pass, as asked or the reference's default."""
    return DEFAULT_STRENGTH if request.denoising_strength is None else request.denoising_strength


def plan_schedule(request: GenerationRequest, sampler: str, scheduler: str, mu: float, *, entered: bool) -> Schedule:
    """Which sigmas a request's pass walks, for a model of the time shift ``mu``.

    Args:
        entered: it starts from a picture.
    """
    options = ScheduleOptions(
        sigma_min=request.sigma_min,
        sigma_max=request.sigma_max,
        rho=request.rho,
        beta_alpha=request.beta_alpha,
        beta_beta=request.beta_beta,
        use_old_karras=request.use_old_karras,
        always_discard_next_to_last=request.discard_next_to_last,
    )
    strength = denoising_strength(request) if entered else None
    exact = strength is not None and request.img2img_fix_steps
    return plan(
        sampler,
        scheduler,
        request.steps,
        mu,
        options=options,
        strength=strength,
        exact=exact,
        compat=request.compat,
    )


def sampler_options(request: GenerationRequest) -> SamplerOptions:
    return SamplerOptions(request.eta, request.s_churn, request.s_tmin, request.s_tmax, request.s_noise)


def skip_rules(job: Job) -> SkipRules:
    request = job.request
    return SkipRules(
        request.s_min_uncond,
        request.s_min_uncond_all,
        request.skip_early_cond,
        schedule_steps(job.sampler, job.schedule.steps),
    )
