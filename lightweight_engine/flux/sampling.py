"""One pass through a schedule: what to walk, where to start, and the walk itself::

schedule = plan(sampler, scheduler, steps, mu, options=..., strength=...)
x = schedule.start(noise.first(), init)
x = run(schedule, denoise, x, noise, after_step, options)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from ..labels import Compat
from .noise import ImageNoise
from .sampler_parts import AfterStep, Denoise, Noise
from .samplers import SAMPLERS
from .schedules import (
    ScheduleOptions,
    alpha_bar,
    discrete_timesteps,
    image_to_image_steps,
    make_sigmas,
    sigma_table,
)


@dataclass(frozen=True)
class SamplerOptions:
    """Knobs of the samplers; each takes those it has. ``eta`` None is the sampler's own; ``s_tmax`` 0 is no limit."""

    eta: float | None = None
    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = 0.0
    s_noise: float = 1.0


@dataclass(frozen=True)
class Schedule:
    """What a sampler walks in one pass.

    Args:
        sampler: a label of ``SAMPLERS``.
        levels: sigmas, or table positions for discrete samplers, from the entry on; empty where nothing is to be run.
        whole: the sigmas before an image-to-image pass cut them; the Brownian tree spans these.
        steps: how many steps the pass counts.
        noise_weight: of the noise in the start latent.
        picture_weight: of the start picture.
        sigma_min, sigma_max, evaluations: what DPM fast and DPM adaptive cover.
        table: the model's sigmas.
        entered: the pass starts from a picture.
    """

    sampler: str
    levels: tuple[float, ...]
    whole: tuple[float, ...]
    steps: int
    noise_weight: float
    picture_weight: float
    sigma_min: float
    sigma_max: float
    evaluations: int
    table: Tensor
    entered: bool

    def start(
        self, noise: Tensor, picture: Tensor | None = None, *, noise_multiplier: float = 1.0, extra_noise: float = 0.0
    ) -> Tensor:
        """The latent that the pass starts from.

        Args:
            picture: the latent of the start picture; None where the pass starts from noise.
            noise_multiplier: of the noise, with a picture (``initial_noise_multiplier``).
            extra_noise: further noise, with a picture (``img2img_extra_noise``).
        """
        if picture is None:
            return noise * self.noise_weight
        noise = noise * noise_multiplier
        return noise * self.noise_weight + picture * self.picture_weight + noise * extra_noise


def plan(
    sampler: str,
    scheduler: str,
    steps: int,
    mu: float,
    *,
    options: ScheduleOptions | None = None,
    strength: float | None = None,
    exact: bool = False,
    compat: Compat = "fixed",
) -> Schedule:
    """The schedule of a pass from noise, or with ``strength`` from a picture.

    Args:
        sampler, scheduler: labels, as ``labels.resolve_sampler`` gives them.
        mu: the model's time shift (``FluxParams.mu``).
        strength: denoising strength of an image-to-image pass, 0..1.
        exact: run ``steps`` steps whatever the strength (hires passes, ``img2img_fix_steps``).
    """
    total, last = (steps, steps - 1) if strength is None else image_to_image_steps(steps, strength, exact=exact)
    if total == 0:
        return _nothing(sampler, mu)
    if SAMPLERS[sampler].discrete:
        return _plan_discrete(sampler, total, last, mu, entered=strength is not None)
    whole = make_sigmas(scheduler, total, mu, sampler=sampler, options=options)
    if compat == "fixed":  # a step of no length, which extreme Beta curves have, would divide by zero
        whole = [sigma for sigma, _ in groupby(whole)]
    table = sigma_table(mu)
    if strength is None:
        levels, low, high, count = whole, float(table[0]), float(table[-1]), steps
    else:
        levels = whole[total - last - 1 :]
        low, high, count = levels[-2], levels[0], len(levels) - 1
    entered = strength is not None
    return Schedule(
        sampler, tuple(levels), tuple(whole), last + 1, levels[0], 1 - levels[0], low, high, count, table, entered
    )


def _plan_discrete(sampler: str, total: int, last: int, mu: float, *, entered: bool) -> Schedule:
    table = sigma_table(mu)
    timesteps = discrete_timesteps(total)
    noise_weight, picture_weight = 1.0, 0.0
    if entered:
        rising = timesteps[::-1]
        alpha = float(alpha_bar(table[rising[last]]))
        noise_weight, picture_weight = math.sqrt(1 - alpha), math.sqrt(alpha)
        timesteps = rising[:last][::-1]
    levels = tuple(timesteps)
    return Schedule(sampler, levels, (), last + 1, noise_weight, picture_weight, 0.0, 0.0, 0, table, entered)


def _nothing(sampler: str, mu: float) -> Schedule:
    """A pass of strength 0 that is to run an exact number of steps: the picture comes back as it is."""
    return Schedule(sampler, (), (), 0, 0.0, 1.0, 0.0, 0.0, 0, sigma_table(mu), True)


def run(
    schedule: Schedule,
    denoise: Denoise,
    x: Tensor,
    noise: ImageNoise,
    after_step: AfterStep,
    options: SamplerOptions | None = None,
) -> Tensor:
    """Walk the schedule from ``x`` ``[B, C, h, w]`` (float32) to the finished latent.

    Args:
        denoise: ``(x, sigma) -> denoised``.
        noise: the pictures' streams, from which the first noise has been drawn.
        after_step: called with the step's number, the latent after it, and what the network took for the picture; to
            stop, raise from it.
    """
    if not schedule.levels:
        return x
    return _walk(schedule, denoise, x, step_noise(schedule, noise, x), after_step, options or SamplerOptions())


def step_noise(schedule: Schedule, noise: ImageNoise, x: Tensor) -> Noise:
    """The noise that the schedule's sampler adds between two sigmas, for a batch like ``x``."""
    kind = SAMPLERS[schedule.sampler].noise
    if kind == "brownian":
        positive = [sigma for sigma in schedule.whole if sigma > 0]
        return noise.brownian(min(positive), max(positive))
    if kind == "side":
        draw = noise.side()
        return lambda s, n: draw(x)
    return lambda s, n: noise.next()


@dataclass(frozen=True)
class Forecast:
    """What a pass will do: the sigmas at which it asks the network, in order, and how often it reports a step."""

    sigmas: tuple[float, ...]
    reports: int


def forecast(schedule: Schedule, options: SamplerOptions | None = None) -> Forecast | None:
    """What a pass will do, found by walking it with a latent of one number; None where that depends on the latent."""
    if SAMPLERS[schedule.sampler].own_work is not None:
        return None
    asked: list[float] = []
    reports: list[int] = []
    blank = torch.zeros(1)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        asked.append(sigma)
        return x

    def report(step: int, x: Tensor, denoised: Tensor) -> None:
        reports.append(step)

    if schedule.levels:
        _walk(schedule, denoise, blank, lambda s, n: blank, report, options or SamplerOptions())
    return Forecast(tuple(asked), len(reports))


def guess(schedule: Schedule, options: SamplerOptions) -> tuple[int, int]:
    """About as many evaluations and steps as a pass without a forecast usually takes at the most."""
    own_work = SAMPLERS[schedule.sampler].own_work
    return own_work(1.0 if options.eta is None else options.eta) if own_work and schedule.levels else (0, 0)


def _walk(
    schedule: Schedule, denoise: Denoise, x: Tensor, noise: Noise, after_step: AfterStep, options: SamplerOptions
) -> Tensor:
    sampler = SAMPLERS[schedule.sampler]
    chosen = {name: getattr(options, name) for name in sampler.options}
    if chosen.get("eta", 0.0) is None:
        del chosen["eta"]
    if "s_tmax" in chosen:
        chosen["s_tmax"] = chosen["s_tmax"] or math.inf
    needed = {name: getattr(schedule, name) for name in sampler.needs}
    try:
        return sampler.function(denoise, x, schedule.levels, noise, after_step, **chosen, **needed)
    except (ZeroDivisionError, OverflowError, ValueError):
        if min(schedule.levels[:-1]) > 0:
            raise
        # A step that starts at sigma 0 (the invalid scheduler Uniform): tensor arithmetic would have made this
        return torch.full_like(x, math.nan)
