"""Samplers of the first diffusion models, which Flux cannot use: kept only to reproduce the reference's pictures.

DDIM, DDIM CFG++ and PLMS walk falling positions of the sigma table. What they see is variance-preserving: for a
sigma s, alpha = 1 / (s^2 + 1), and the network is asked at x * sqrt(s^2 + 1). LCM and DDPM walk sigmas.
Sources: the papers of DDIM, PNDM and DDPM; latent-diffusion (MIT) for PLMS.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .sampler_parts import AfterStep, Denoise, Noise, Sigmas, slope
from .schedules import alpha_bar, alpha_sigma


class VariancePreserving:
    """The variance-preserving view of a sigma table: alphas in float32, whose rounding the reference's values carry."""

    def __init__(self, table: Tensor) -> None:
        self._alphas = alpha_bar(table)

    def alpha(self, timestep: int) -> float:
        return float(self._alphas[timestep])

    def sigma(self, timestep: int) -> float:
        return float(alpha_sigma(self._alphas[timestep]))

    def epsilon(self, denoise: Denoise, x: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
        """The noise that the network sees in ``x``, and the denoised latent."""
        sigma = self.sigma(timestep)
        scaled = x * math.sqrt(sigma**2 + 1)
        denoised = denoise(scaled, sigma)
        return slope(scaled, denoised, sigma), denoised


def _toward(
    x: Tensor, epsilon: Tensor, direction: Tensor, alpha: float, alpha_next: float, kept: float = 0.0
) -> Tensor:
    """DDIM's step: to the picture along ``epsilon``, back along ``direction``, less the variance ``kept``."""
    picture = (x - epsilon * math.sqrt(1 - alpha)) / math.sqrt(alpha)
    return picture * math.sqrt(alpha_next) + direction * math.sqrt(max(1 - alpha_next - kept, 0.0))


def ddim(
    denoise: Denoise, x: Tensor, timesteps: Sequence[int], noise: Noise, after_step: AfterStep,
    *, table: Tensor, eta: float = 0.0,
) -> Tensor:  # fmt: skip
    view = VariancePreserving(table)
    for i, (t, t_next) in enumerate(pairwise(timesteps)):
        alpha, alpha_next = view.alpha(t), view.alpha(t_next)
        epsilon, denoised = view.epsilon(denoise, x, t)
        up = eta * math.sqrt((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next))
        x = _toward(x, epsilon, epsilon, alpha, alpha_next, up**2)
        if eta:
            x = x + noise(view.sigma(t), view.sigma(t_next)) * up
        after_step(i, x, denoised)
    return x


def ddim_cfgpp(
    denoise: Denoise, x: Tensor, timesteps: Sequence[int], noise: Noise, after_step: AfterStep,
    *, table: Tensor, eta: float = 0.0,
) -> Tensor:  # fmt: skip
    """DDIM that goes back along the unconditional noise (Chung et al., "CFG++", 2024).

    ``denoise.unconditional`` is the denoised latent of the negative prompt at the last call; where there is none the
    reference takes a zero latent for it.
    """
    view = VariancePreserving(table)
    for i, (t, t_next) in enumerate(pairwise(timesteps)):
        alpha, alpha_next, sigma = view.alpha(t), view.alpha(t_next), view.sigma(t)
        epsilon, denoised = view.epsilon(denoise, x, t)
        unconditional: Tensor | None = getattr(denoise, "unconditional", None)
        scaled = x * math.sqrt(sigma**2 + 1)
        back = (scaled if unconditional is None else scaled - unconditional) / sigma
        up = eta * math.sqrt((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next))
        x = _toward(x, epsilon, back, alpha, alpha_next, up**2)
        if eta:
            x = x + noise(sigma, view.sigma(t_next)) * up
        after_step(i, x, denoised)
    return x


_PLMS = ((3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def plms(
    denoise: Denoise, x: Tensor, timesteps: Sequence[int], noise: Noise, after_step: AfterStep, *, table: Tensor
) -> Tensor:
    """DDIM's step along a multistep mean of the noise; the first is a Heun step."""
    view = VariancePreserving(table)
    history: deque[Tensor] = deque(maxlen=4)
    for i, (t, t_next) in enumerate(pairwise(timesteps)):
        alpha, alpha_next = view.alpha(t), view.alpha(t_next)
        epsilon, denoised = view.epsilon(denoise, x, t)
        history.appendleft(epsilon)
        if i == 0:
            ahead = _toward(x, epsilon, epsilon, alpha, alpha_next)
            mean = (epsilon + view.epsilon(denoise, ahead, t_next)[0]) / 2
        else:
            mean = torch.stack([e * w for e, w in zip(history, _PLMS[min(i, 3) - 1], strict=True)]).sum(0)
        x = _toward(x, mean, mean, alpha, alpha_next)
        after_step(i, x, denoised)
    return x


def lcm(denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise, after_step: AfterStep) -> Tensor:
    """To the picture and back to the next sigma, with fresh noise."""
    for i, (s, n) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, s)
        x = denoised if n == 0 else denoised + noise(s, n) * n
        after_step(i, x, denoised)
    return x


def ddpm(denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise, after_step: AfterStep) -> Tensor:
    """The posterior of DDPM between the alphas of two sigmas, in float32 as the reference computes them."""
    alphas = alpha_bar(torch.tensor(sigmas))
    for i, (s, n) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, s)
        bar, bar_next = alphas[i], alphas[i + 1]
        alpha = bar / bar_next
        lost = float((1 - alpha) / (1 - bar).sqrt())
        x = (x / math.sqrt(1 + s**2) - slope(x, denoised, s) * lost) * float((1 / alpha).sqrt())
        if n > 0:
            x = x + noise(s, n) * float(((1 - alpha) * (1 - bar_next) / (1 - bar)).sqrt())
            x = x * math.sqrt(1 + n**2)
        after_step(i, x, denoised)
    return x
