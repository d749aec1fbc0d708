"""How a request becomes pictures: the story, in the order in which it happens.

Image-to-image differs from text-to-image in two things: the start latent, and a schedule that is entered part-way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..flux.autoencoder import Autoencoder
from ..flux.conditioner import Conditioner, resolve_guidance
from ..flux.conditioning import Composition, Scheduled
from ..flux.guidance import Guided, SkipRules
from ..flux.lora_set import NO_LORAS, LoraSet
from ..flux.noise import ImageNoise, Source, TorchStream, side_seed
from ..flux.prompt import parse_networks, plan_negative, plan_prompt
from ..flux.sampling import Forecast, SamplerOptions, Schedule, plan, run
from ..flux.schedules import ScheduleOptions
from ..flux.tiling import decode_tiled
from ..flux.velocity import Velocity
from ..labels import schedule_steps
from ..request import GenerationRequest
from .networks import Networks
from .recovery import Recovery

DEFAULT_STRENGTH = 0.75


@dataclass(frozen=True)
class Job:
    """What is the same for every picture of a request.

    Args:
        forecast: None where the number of steps depends on the latent.
        size: (height, width) in pixels.
        picture: the start picture ``[1, 3, H, W]`` in 0..1.
        attempt: does a piece of a stage's work, once more with less on the device where memory runs out.
        enter: called with the name of a stage as it begins.
        after_step: called with (step, latent, denoised); may raise to stop.
        batches: what is drawn at once, in order.
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
    picture: Tensor | None
    attempt: Recovery
    enter: Callable[[str], None]
    after_step: Callable[[int, Tensor, Tensor], None]
    warnings: list[str]
    batches: tuple[Batch, ...]

    @property
    def strength(self) -> float | None:
        """The denoising strength of an image-to-image pass; None for text-to-image."""
        return denoising_strength(self.request) if self.picture is not None else None


@dataclass(frozen=True)
class Batch:
    """Pictures that are drawn at once: a seed, a subseed and a prompt for each, and the LoRAs that act on all."""

    seeds: tuple[int, ...]
    subseeds: tuple[int, ...]
    prompts: tuple[str, ...]
    loras: LoraSet = NO_LORAS

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
    """Finished latents ``[B, 16, h, w]`` and pixels ``[B, 3, H, W]`` in 0..1."""

    latent: Tensor
    pixels: Tensor


@torch.inference_mode()
def draw(job: Job, batch: Batch) -> Drawn:
    """Draw one batch of pictures."""
    request, networks = job.request, job.networks
    networks.adapt(batch.loras)

    job.enter("encode")
    positives, negatives = job.attempt("encode", lambda: encode_prompts(job, batch))
    start = job.attempt("decode", lambda: encode_picture(job, batch.seeds))
    noise = image_noise(job, batch)

    job.enter("sample")
    velocity = Velocity(job.attempt("sample", networks.load, "transformer"))
    foreseen = job.forecast.sigmas if job.forecast else ()
    job.attempt("sample", velocity.precompute, foreseen, conditionings(positives, negatives))
    evaluate = partial(job.attempt, "sample", velocity)
    denoise = Guided(evaluate, positives, negatives, request.cfg_scale, rules=skip_rules(job), compat=request.compat)
    latent = job.schedule.start(
        noise.first(),
        start,
        noise_multiplier=request.initial_noise_multiplier,
        extra_noise=request.img2img_extra_noise,
    )
    latent = run(job.schedule, denoise, latent, noise, job.after_step, sampler_options(request))
    del velocity, denoise, evaluate  # with all that they computed beforehand

    job.enter("decode")
    return Drawn(latent, job.attempt("decode", lambda: decode_latent(job, latent)))


def decode_latent(job: Job, latent: Tensor) -> Tensor:
    """Pixels of latents, one picture after another: in tiles where the plan says so."""
    decode = decode_tiled if job.attempt.plan.stage("decode").tiled else Autoencoder.decode
    autoencoder = job.networks.load("autoencoder")
    return torch.cat([decode(autoencoder, picture) for picture in latent.split(1)])


def encode_prompts(job: Job, batch: Batch) -> tuple[list[Composition], list[Scheduled] | None]:
    """The conditioning of each picture's prompt, and of the negative prompt where guidance needs one."""
    request, prompts = job.request, batch.prompts
    calls = schedule_steps(job.sampler, request.steps)
    negative = request.negative_prompt if request.compat == "forge" else parse_networks(request.negative_prompt)[0]
    plans = [plan_prompt(parse_networks(prompt)[0], calls, compat=request.compat) for prompt in prompts]
    if request.cfg_scale != 1:
        plans.append(plan_negative(negative, calls))
    guidance = resolve_guidance(request.distilled_cfg_scale, job.networks.params.guidance_embed, request.compat)
    made = job.conditioner.adapted(batch.loras.text_key)(plans, guidance, job.warnings)
    count = len(prompts)
    return made[:count], [made[count].parts[0][1]] * count if len(made) > count else None


def conditionings(positives: Sequence[Composition], negatives: Sequence[Scheduled] | None) -> list[Any]:
    """Every conditioning that sampling may ask for."""
    scheduled = [part for picture in positives for _, part in picture.parts] + list(negatives or ())
    return [cond for each in scheduled for _, cond in each.entries]


def encode_picture(job: Job, seeds: Sequence[int]) -> Tensor | None:
    """The latents of the start picture, one draw from its posterior for each seed; None without a picture."""
    if job.picture is None:
        return None
    factor = job.networks.autoencoder_factor
    shape = (1, 16, job.size[0] // factor, job.size[1] // factor)
    job.networks.enter("decode", job.attempt.plan)
    autoencoder = job.networks.load("autoencoder")
    weight = autoencoder.encoder.conv_in.weight
    latents = []
    for seed in seeds:
        # The reference draws on the global generator; a stream of the seed makes the picture repeatable.
        eps = torch.randn(shape) if job.request.compat == "forge" else TorchStream(side_seed(seed), "cpu").randn(shape)
        latents.append(autoencoder.encode(job.picture.to(weight), eps.to(weight)).float())
    return torch.cat(latents)


def image_noise(job: Job, batch: Batch) -> ImageNoise:
    """The noise of a batch, as the request and the reference's rules have it."""
    request, factor = job.request, job.networks.autoencoder_factor
    height, width = job.size
    resized = request.seed_resize_from_h > 0 and request.seed_resize_from_w > 0
    return ImageNoise(
        (16, height // factor, width // factor),
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


def plan_schedule(request: GenerationRequest, sampler: str, scheduler: str, mu: float) -> Schedule:
    """Which sigmas a request's pass walks, for a model of the time shift ``mu``."""
    options = ScheduleOptions(
        sigma_min=request.sigma_min,
        sigma_max=request.sigma_max,
        rho=request.rho,
        beta_alpha=request.beta_alpha,
        beta_beta=request.beta_beta,
        use_old_karras=request.use_old_karras,
        always_discard_next_to_last=request.discard_next_to_last,
    )
    strength = None if request.image is None else denoising_strength(request)
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
