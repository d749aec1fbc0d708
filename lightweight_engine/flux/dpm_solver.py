"""DPM-Solver with steps of its own choosing: DPM fast and DPM adaptive.

Both walk t = -log(sigma) from sigma_max to sigma_min and leave the schedule aside.
Source: Lu et al., "DPM-Solver" (2022), and k-diffusion (MIT).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import RequestError
from .sampler_parts import AfterStep, Denoise, Noise, Sigmas, ancestral_step, slope


@dataclass
class _Step:
    """One step from ``t`` on: each intermediate slope is evaluated once, whatever orders are asked for."""

    denoise: Denoise
    x: Tensor
    t: float
    denoised: Tensor = field(init=False)
    _slopes: dict[str, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.denoised = self.denoise(self.x, math.exp(-self.t))
        self._slopes["start"] = slope(self.x, self.denoised, math.exp(-self.t))

    def solve(self, order: int, end: float, r1: float | None = None) -> Tensor:
        """``x`` at ``end``, by the solver of ``order`` 1 to 3; ``r1`` places its first inner point."""
        return {1: self._first, 2: self._second, 3: self._third}[order](end, r1)

    def _slope_at(self, name: str, x: Tensor, t: float) -> Tensor:
        if name not in self._slopes:
            sigma = math.exp(-t)
            self._slopes[name] = slope(x, self.denoise(x, sigma), sigma)
        return self._slopes[name]

    def _to(self, t: float) -> Tensor:
        """First order: along the starting slope to ``t``."""
        return self.x - self._slopes["start"] * (math.exp(-t) * math.expm1(t - self.t))

    def _first(self, end: float, r1: float | None) -> Tensor:
        return self._to(end)

    def _second(self, end: float, r1: float | None) -> Tensor:
        r1 = r1 or 1 / 2
        h = end - self.t
        inner = self.t + r1 * h
        d1 = self._slope_at("first", self._to(inner), inner)
        return self._to(end) - (d1 - self._slopes["start"]) * (math.exp(-end) / (2 * r1) * math.expm1(h))

    def _third(self, end: float, r1: float | None) -> Tensor:
        r1, r2 = r1 or 1 / 3, 2 / 3
        h = end - self.t
        first, second = self.t + r1 * h, self.t + r2 * h
        d0 = self._slopes["start"]
        d1 = self._slope_at("first", self._to(first), first)
        bend = math.exp(-second) * (r2 / r1) * (math.expm1(r2 * h) / (r2 * h) - 1)
        d2 = self._slope_at("second", self._to(second) - (d1 - d0) * bend, second)
        return self._to(end) - (d2 - d0) * (math.exp(-end) / r2 * (math.expm1(h) / h - 1))


def _renoised_end(t: float, t_next: float, t_end: float, eta: float) -> tuple[float, float]:
    """Where the ODE step ends, and the noise to add so that the sigma is that of ``t_next``."""
    if not eta:
        return t_next, 0.0
    down, _ = ancestral_step(math.exp(-t), math.exp(-t_next), eta)
    end = min(t_end, -math.log(down)) if down > 0 else t_end
    return end, math.sqrt(max(math.exp(-2 * t_next) - math.exp(-2 * end), 0.0))


def dpm_fast(
    denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise, after_step: AfterStep,
    *, sigma_min: float, sigma_max: float, evaluations: int, eta: float = 1.0, s_noise: float = 1.0,
) -> Tensor:  # fmt: skip
    """Third-order steps of equal length, the last ones of lower order so that the evaluations come out even."""
    t_start, t_end = -math.log(sigma_max), -math.log(sigma_min)
    count = evaluations // 3 + 1
    orders = [3] * (count - 2) + [2, 1] if evaluations % 3 == 0 else [3] * (count - 1) + [evaluations % 3]
    times = torch.linspace(t_start, t_end, count + 1, dtype=torch.float64).tolist()
    for i, order in enumerate(orders):
        t, t_next = times[i], times[i + 1]
        end, up = _renoised_end(t, t_next, t_end, eta)
        step = _Step(denoise, x, t)
        x = step.solve(order, end)
        if eta:
            x = x + noise(math.exp(-t), math.exp(-t_next)) * (up * s_noise)
        after_step(i, x, step.denoised)
    return x


_FAR_TOO_MANY = 10  # times the usual steps


def adaptive_work(eta: float) -> tuple[int, int]:
    """About as many evaluations and steps as DPM adaptive usually takes at the most, rejected steps included.

    Measured with the demonstration model and with formulas, up to an eta of 1: 5 to 16 steps without a negative prompt,
    28 with one at a scale of 8, 44 at 30. Where eta is more, a long step would add more noise than its end has, and the
    length of those that are accepted falls with the square of eta: up to 82 steps at 2, 197 at 3, 2,240 at 10.
    """
    steps = math.ceil(30 * max(eta, 1.0) ** 2)
    return 3 * steps, steps


def dpm_adaptive(
    denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise, after_step: AfterStep,
    *, sigma_min: float, sigma_max: float, eta: float = 1.0, s_noise: float = 1.0,
    rtol: float = 0.05, atol: float = 0.0078, h_init: float = 0.05,
) -> Tensor:  # fmt: skip
    """Steps as long as the second and third order agree on.

    The error is taken over the whole batch, so pictures of one batch influence one another; and whether a step is
    accepted has to be known on the host, so each step waits for the device once. A latent that is not a number is given
    back as such: no step from there would ever be accepted.

    Raises:
        RequestError: it comes to no end within many more steps than are usual.
    """
    t, t_end = -math.log(sigma_max), -math.log(sigma_min)
    control = _StepSize(h_init, order=1.5 if eta else 3.0)
    previous, i = x, 0
    most = _FAR_TOO_MANY * adaptive_work(eta)[1]
    while t < t_end - 1e-5:
        if i == most:
            raise RequestError(
                f"sampler: DPM adaptive has tried {most:,} steps, and the network's answers are too unlike one another "
                "for it to come to an end; choose another sampler, or lower cfg_scale and the strengths of LoRAs",
                field="sampler",
            )
        t_next = min(t_end, t + control.h)
        end, up = _renoised_end(t, t_next, t_end, eta)
        step = _Step(denoise, x, t)
        low, high = step.solve(2, end, r1=1 / 3), step.solve(3, end)
        scale = torch.maximum(low.abs(), previous.abs()).mul(rtol).clamp(min=atol)
        error = float(torch.linalg.vector_norm((low - high) / scale)) / math.sqrt(x.numel())
        if math.isnan(error):
            return torch.full_like(x, math.nan)
        if control.accepts(error):
            previous, x = low, high
            if eta:
                x = x + noise(math.exp(-t), math.exp(-t_next)) * (up * s_noise)
            t = t_next
        after_step(i, x, step.denoised)
        i += 1
    return x


class _StepSize:
    """Grows or shrinks the step by its last error (the integral part of a PID controller)."""

    _ACCEPTED = 0.81
    _SMALLEST = 1e-8

    def __init__(self, h: float, order: float) -> None:
        self.h = h
        self._exponent = 1 / order

    def accepts(self, error: float) -> bool:
        factor = 1 + math.atan((1 / (error + self._SMALLEST)) ** self._exponent - 1)
        self.h *= factor
        return factor >= self._ACCEPTED
