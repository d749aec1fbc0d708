"""Samplers that add noise of their own: ancestral, SDE, and Restart.

Each is a pure function ``(denoise, x, sigmas, noise, after_step, **options) -> x``; ``noise(s, n)`` is unit noise for
the step from s to n. Only the two flow-ancestral ones respect that signal and noise add up to one; the others use
the formulas of diffusion models on flow sigmas, because that is the output to match. Source: k-diffusion (MIT).
"""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor

from .sampler_parts import AfterStep, Denoise, Noise, Sigmas, ancestral_step, flow_ancestral_step, log_middle, slope
from .samplers_ode import heun, heun_step
from .schedules import karras


def euler_ancestral(
    denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise, after_step: AfterStep, *, eta: float = 1.0
) -> Tensor:
    for i, (s, n) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, s)
        if n == 0:
            x = denoised
        else:
            down, shrink, weight = flow_ancestral_step(s, n, eta)
            x = x * (down / s) + denoised * (1 - down / s)
            if eta > 0:
                x = x * shrink + noise(s, n) * weight
        after_step(i, x, denoised)
    return x


def dpm2_ancestral(
    denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise, after_step: AfterStep,
    *, eta: float = 1.0, s_noise: float = 1.0,
) -> Tensor:  # fmt: skip
    for i, (s, n) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, s)
        d = slope(x, denoised, s)
        down, shrink, weight = flow_ancestral_step(s, n, eta)
        if down == 0:
            x = x + d * (down - s)
        else:
            middle = math.sqrt(s * down)
            x_middle = x + d * (middle - s)
            x = x + slope(x_middle, denoise(x_middle, middle), middle) * (down - s)
            x = x * shrink + noise(s, n) * (s_noise * weight)
        after_step(i, x, denoised)
    return x


def dpmpp_2s_ancestral(
    denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise, after_step: AfterStep,
    *, eta: float = 1.0, s_noise: float = 1.0,
) -> Tensor:  # fmt: skip
    for i, (s, n) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, s)
        down, up = ancestral_step(s, n, eta)
        if down == 0:
            x = x + slope(x, denoised, s) * (down - s)
        else:
            h = math.log(s / down)
            middle = log_middle(s, down)
            x_middle = x * (middle / s) - denoised * math.expm1(-h / 2)
            x = x * (down / s) - denoise(x_middle, middle) * math.expm1(-h)
        if n > 0:
            x = x + noise(s, n) * (s_noise * up)
        after_step(i, x, denoised)
    return x


def dpmpp_sde(
    denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise, after_step: AfterStep,
    *, eta: float = 1.0, s_noise: float = 1.0,
) -> Tensor:  # fmt: skip
    for i, (s, n) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, s)
        if n == 0:
            x = x + slope(x, denoised, s) * (n - s)
        else:
            middle = log_middle(s, n)
            down, up = ancestral_step(s, middle, eta)
            x_middle = x * (down / s) + denoised * (1 - down / s) + noise(s, middle) * (s_noise * up)
            denoised_middle = denoise(x_middle, middle)
            down, up = ancestral_step(s, n, eta)
            x = x * (down / s) + denoised_middle * (1 - down / s) + noise(s, n) * (s_noise * up)
        after_step(i, x, denoised)
    return x


def dpmpp_2m_sde(
    denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise, after_step: AfterStep,
    *, eta: float = 1.0, s_noise: float = 1.0, heun_like: bool = False,
) -> Tensor:  # fmt: skip
    """Two-step exponential integrator of the SDE; its correction by the midpoint rule, or by Heun's."""
    previous: Tensor | None = None
    h_last = 0.0
    for i, (s, n) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, s)
        if n == 0:
            x = denoised
        else:
            h = math.log(s / n)
            total = h * (1 + eta)
            x = x * (n / s * math.exp(-eta * h)) - denoised * math.expm1(-total)
            if previous is not None:
                k = math.expm1(-total) / total + 1 if heun_like else -0.5 * math.expm1(-total)
                x = x + (denoised - previous) * (k * h / h_last)
            if eta:
                x = x + noise(s, n) * (n * math.sqrt(-math.expm1(-2 * eta * h)) * s_noise)
            h_last = h
        previous = denoised
        after_step(i, x, denoised)
    return x


def dpmpp_2m_sde_heun(
    denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise, after_step: AfterStep,
    *, eta: float = 1.0, s_noise: float = 1.0,
) -> Tensor:  # fmt: skip
    return dpmpp_2m_sde(denoise, x, sigmas, noise, after_step, eta=eta, s_noise=s_noise, heun_like=True)


def dpmpp_3m_sde(
    denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise, after_step: AfterStep,
    *, eta: float = 1.0, s_noise: float = 1.0,
) -> Tensor:  # fmt: skip
    """Three-step exponential integrator of the SDE."""
    history: list[tuple[Tensor, float]] = []  # (denoised, h that led there), newest first
    h = 0.0
    for i, (s, n) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, s)
        if n == 0:
            x = denoised
        else:
            h = math.log(s / n)
            h_eta = h * (eta + 1)
            x = x * math.exp(-h_eta) - denoised * math.expm1(-h_eta) + _third_order(denoised, history, h, h_eta)
            if eta:
                x = x + noise(s, n) * (n * math.sqrt(-math.expm1(-2 * h * eta)) * s_noise)
        history = [(denoised, h), *history[:1]]
        after_step(i, x, denoised)
    return x


def _third_order(denoised: Tensor, history: list[tuple[Tensor, float]], h: float, h_eta: float) -> Tensor | float:
    """The correction of ``dpmpp_3m_sde`` from the last one or two denoised latents; 0 without any."""
    if not history:
        return 0.0
    phi2 = math.expm1(-h_eta) / h_eta + 1
    newer, h1 = history[0]
    if len(history) == 1:
        return (denoised - newer) * (phi2 * h / h1)
    older, h2 = history[1]
    r0, r1 = h1 / h, h2 / h
    a, b = (denoised - newer) / r0, (newer - older) / r1
    first = a + (a - b) * (r0 / (r0 + r1))
    second = (a - b) / (r0 + r1)
    return first * phi2 - second * (phi2 / h_eta - 0.5)


def restart(denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise, after_step: AfterStep) -> Tensor:
    """Heun with jumps back to more noise; plain Heun under 20 steps. Source: Xu et al., "Restart Sampling" (2023)."""
    if len(sigmas) - 1 < 20:
        return heun(denoise, x, sigmas, noise, after_step)
    last = math.inf
    for i, (s, n) in enumerate(restart_steps(sigmas)):
        if s > last:
            x = x + noise(last, s) * math.sqrt(s**2 - last**2)
        x, denoised = heun_step(denoise, x, s, n)
        last = n
        after_step(i, x, denoised)
    return x


def restart_steps(sigmas: Sigmas) -> list[tuple[float, float]]:
    """The (from, to) pairs of Restart for 20 steps or more: a Karras schedule, with passes from the top down to 0.1."""
    steps = len(sigmas) - 1
    extra, passes = (steps // 4, 2) if steps >= 36 else (9, 1)
    levels = [*karras(steps - extra * passes, sigmas[-2], sigmas[0]).tolist(), 0.0]
    bottom = _nearest(levels, 0.1)
    top = _nearest(levels, 2.0)
    again = karras(extra + 1, levels[bottom], levels[top]).tolist() if top < bottom else []
    pairs = list(pairwise(levels))
    return pairs[:bottom] + list(pairwise(again)) * passes + pairs[bottom:]


def _nearest(levels: Sigmas, target: float) -> int:
    return min(range(len(levels)), key=lambda index: abs(levels[index] - target))
