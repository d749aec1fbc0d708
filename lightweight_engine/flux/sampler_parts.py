"""What samplers share: the shape of their arguments, the slope, churn, and the two kinds of ancestral step.

Letters, in all sampler files: s the sigma of a step, n the next one, D the denoised latent, d the slope (x - D) / s.
Sigmas are Python floats, so coefficients are computed on the host and nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Denoise = Callable[[Tensor, float], Tensor]
Noise = Callable[[float, float], Tensor]
AfterStep = Callable[[int, Tensor, Tensor], None]
Sigmas = Sequence[float]


def slope(x: Tensor, denoised: Tensor, sigma: float) -> Tensor:
    """The direction of the ODE at ``x``."""
    return (x - denoised) / sigma


@dataclass(frozen=True)
class Churn:
    """Noise put back before a step: ``amount`` spread over all steps, where ``low <= sigma <= high``."""

    steps: int
    amount: float
    low: float
    high: float
    s_noise: float

    def __call__(self, x: Tensor, s: float, n: float, noise: Noise) -> tuple[Tensor, float]:
        """``x`` and its sigma after the noise. Every step draws, used or not, as the reference's do."""
        if not self.amount:
            return x, s
        drawn = noise(s, n)
        gamma = min(self.amount / self.steps, math.sqrt(2) - 1) if self.low <= s <= self.high else 0.0
        if gamma <= 0:
            return x, s
        raised = s * (gamma + 1)
        return x + drawn * (self.s_noise * math.sqrt(raised**2 - s**2)), raised


def ancestral_step(s: float, n: float, eta: float) -> tuple[float, float]:
    """The sigma to step down to, and the noise to add after it, so that the total is ``n``.

    In float32: over a long step the difference of squares cancels, and the reference's rounding decides where it ends.
    """
    if not eta:
        return n, 0.0
    start, end = torch.tensor(s), torch.tensor(n)
    up = torch.minimum(end, eta * (end**2 * (start**2 - end**2) / start**2) ** 0.5)
    return float((end**2 - up**2) ** 0.5), float(up)


def log_middle(s: float, n: float) -> float:
    """The geometric middle, by way of logarithms in float32.

    The Brownian tree rounds times to six decimals, so the last bit of the reference's float32 can choose the noise.
    """
    start, end = (-torch.tensor(sigma).log() for sigma in (s, n))
    return float((-(start + (end - start) * 0.5)).exp())


def flow_ancestral_step(s: float, n: float, eta: float) -> tuple[float, float, float]:
    """The same for a rectified flow, where signal and noise add up to one.

    Returns:
        The sigma to step down to, the factor that then shrinks the signal, and the weight of the noise.
    """
    down = n * (1 + (n / s - 1) * eta)
    if down == 1:
        return down, 1.0, 0.0
    shrink = (1 - n) / (1 - down)
    return down, shrink, math.sqrt(max(n**2 - (down * shrink) ** 2, 0.0))
