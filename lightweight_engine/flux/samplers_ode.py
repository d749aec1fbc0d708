"""Samplers that solve the ODE: no noise of their own (Euler, Heun and DPM2 can be told to churn).

Each is a pure function ``(denoise, x, sigmas, noise, after_step, **options) -> x``.
Sources: k-diffusion (MIT); Adams-Bashforth and Lagrange coefficients from the papers of PNDM and DEIS.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from .sampler_parts import AfterStep, Churn, Denoise, Noise, Sigmas, slope


def euler(
    denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise, after_step: AfterStep,
    *, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0,
) -> Tensor:  # fmt: skip
    churn = Churn(len(sigmas) - 1, s_churn, s_tmin, s_tmax, s_noise)
    for i, (s, n) in enumerate(pairwise(sigmas)):
        x, s = churn(x, s, n, noise)
        denoised = denoise(x, s)
        x = x + slope(x, denoised, s) * (n - s)
        after_step(i, x, denoised)
    return x


def heun(
    denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise, after_step: AfterStep,
    *, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0,
) -> Tensor:  # fmt: skip
    churn = Churn(len(sigmas) - 1, s_churn, s_tmin, s_tmax, s_noise)
    for i, (s, n) in enumerate(pairwise(sigmas)):
        x, s = churn(x, s, n, noise)
        x, denoised = heun_step(denoise, x, s, n)
        after_step(i, x, denoised)
    return x


def heun_step(denoise: Denoise, x: Tensor, s: float, n: float) -> tuple[Tensor, Tensor]:
    """One step with the mean of the slopes at both ends; with the first alone where it ends at 0."""
    denoised = denoise(x, s)
    d = slope(x, denoised, s)
    end = x + d * (n - s)
    if n == 0:
        return end, denoised
    d_end = slope(end, denoise(end, n), n)
    return x + (d + d_end) / 2 * (n - s), denoised


def dpm2(
    denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise, after_step: AfterStep,
    *, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0,
) -> Tensor:  # fmt: skip
    """The slope at the geometric middle of the step."""
    churn = Churn(len(sigmas) - 1, s_churn, s_tmin, s_tmax, s_noise)
    for i, (s, n) in enumerate(pairwise(sigmas)):
        x, s = churn(x, s, n, noise)
        denoised = denoise(x, s)
        d = slope(x, denoised, s)
        if n > 0:
            middle = math.sqrt(s * n)
            x_middle = x + d * (middle - s)
            d = slope(x_middle, denoise(x_middle, middle), middle)
        x = x + d * (n - s)
        after_step(i, x, denoised)
    return x


def heunpp2(denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise, after_step: AfterStep) -> Tensor:
    """Up to three slopes, weighted by how much of the first sigma each has left."""
    for i, (s, n) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, s)
        d = slope(x, denoised, s)
        if n == sigmas[-1]:
            mean = d
        else:
            x2 = x + d * (n - s)
            d2 = slope(x2, denoise(x2, n), n)
            after = sigmas[i + 2]
            if after == sigmas[-1]:
                w2 = n / (2 * sigmas[0])
                mean = d * (1 - w2) + d2 * w2
            else:
                x3 = x2 + d2 * (after - n)
                d3 = slope(x3, denoise(x3, after), after)
                w2, w3 = n / (3 * sigmas[0]), after / (3 * sigmas[0])
                mean = d * (1 - w2 - w3) + d2 * w2 + d3 * w3
        x = x + mean * (n - s)
        after_step(i, x, denoised)
    return x


def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise, after_step: AfterStep) -> Tensor:
    """Two-step exponential integrator in the logarithm of sigma."""
    previous: Tensor | None = None
    h_last = 0.0
    for i, (s, n) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, s)
        h = math.log(s / n) if n else math.inf
        extrapolated = denoised
        if previous is not None and n > 0:
            r = h_last / h
            extrapolated = denoised * (1 + 1 / (2 * r)) - previous * (1 / (2 * r))
        x = x * (n / s) - extrapolated * math.expm1(-h)
        previous, h_last = denoised, h
        after_step(i, x, denoised)
    return x


Weights = Callable[[int], list[float]]


def _multistep(
    denoise: Denoise, x: Tensor, sigmas: Sigmas, after_step: AfterStep, weights: Weights, history: int
) -> Tensor:
    """``x`` plus a weighted sum of the newest slopes; ``weights(i)`` are those of step ``i``, newest first."""
    slopes: deque[Tensor] = deque(maxlen=history)
    for i, s in enumerate(sigmas[:-1]):
        denoised = denoise(x, s)
        slopes.appendleft(slope(x, denoised, s))
        for weight, d in zip(weights(i), slopes, strict=False):
            x = x + d * weight
        after_step(i, x, denoised)
    return x


def lms(denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise, after_step: AfterStep) -> Tensor:
    """Linear multistep of order 4 on the actual sigmas."""
    return _multistep(denoise, x, sigmas, after_step, lambda i: lms_weights(sigmas, i), 4)


def lms_weights(sigmas: Sigmas, i: int, order: int = 4) -> list[float]:
    """Integrals over step ``i`` of the Lagrange basis on the newest sigmas, newest first."""
    nodes = sigmas[max(i - order + 1, 0) : i + 1][::-1]
    s, n = sigmas[i], sigmas[i + 1]
    points, gauss = np.polynomial.legendre.leggauss(order)  # exact for these polynomials
    times = (s + n) / 2 + (n - s) / 2 * points
    return [float(_lagrange(times, nodes, j) @ gauss) * (n - s) / 2 for j in range(len(nodes))]


def _lagrange(times: np.ndarray, nodes: Sigmas, j: int) -> np.ndarray:
    basis = np.ones_like(times)
    for k, node in enumerate(nodes):
        if k != j:
            basis = basis * (times - node) / (nodes[j] - node)
    return basis


_ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def ipndm(denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise, after_step: AfterStep) -> Tensor:
    """Adams-Bashforth of order 4, as if all steps had one length."""

    def weights(i: int) -> list[float]:
        return [k * (sigmas[i + 1] - sigmas[i]) for k in _ADAMS_BASHFORTH[min(i, 3)]]

    return _multistep(denoise, x, sigmas, after_step, weights, 4)


def ipndm_v(denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise, after_step: AfterStep) -> Tensor:
    """Adams-Bashforth of order 4 for steps of varying length, with the reference's coefficients."""

    def weights(i: int) -> list[float]:
        lengths = [sigmas[k + 1] - sigmas[k] for k in range(i, max(i - 4, -1), -1)]
        return [k * lengths[0] for k in ipndm_v_weights(lengths)]

    return _multistep(denoise, x, sigmas, after_step, weights, 4)


def ipndm_v_weights(lengths: list[float]) -> list[float]:
    """Weights of the newest slopes for the newest one to four step lengths.

    The third-order term is not the textbook one; the reference's pictures are made with it.
    """
    if len(lengths) == 1:
        return [1.0]
    a, b = lengths[:2]
    if len(lengths) == 2:
        return [1 + a / (2 * b), -a / (2 * b)]
    c = lengths[2]
    t1 = (1 - a**2 / (3 * b * (b + c))) / 2
    if len(lengths) == 3:
        return [1 + a / (2 * b) + t1, -a / (2 * b) - (1 + b / c) * t1, t1 * b / c]
    e = lengths[3]
    q = b * (b + c) / (c * (c + e))
    t2 = ((1 - a / (3 * (a + b))) / 2 + (1 - a / (2 * (a + b))) * a / (6 * (a + b + c))) * (
        a * (a + b) * (a + b + c) / (b * (b + c) * (b + c + e))
    )
    return [
        1 + a / (2 * b) + t1 + t2,
        -a / (2 * b) - (1 + b / c) * t1 - (1 + b / c + q) * t2,
        t1 * b / c + (b / c + q * (1 + c / e)) * t2,
        -t2 * q * b / c,
    ]


def deis(denoise: Denoise, x: Tensor, sigmas: Sigmas, noise: Noise, after_step: AfterStep) -> Tensor:
    """DEIS of order 3 with tabulated integrals ("tab")."""
    return _multistep(denoise, x, sigmas, after_step, lambda i: deis_weights(sigmas, i), 3)


def _exp_below_one(x: Tensor) -> Tensor:
    """The float32 exponential of small negative numbers, rounded as the reference's was on any CPU.

    Where alpha is 2 to 5 units of the last place from one, that last bit is worth 2e-5 of a weight. The exponential
    that the reference ran on lies 0.036 of such a unit too low there: found from its weights, all of which it explains.
    """
    return (x.double().exp() - 0.036 * 2**-24).float()


def deis_weights(sigmas: Sigmas, i: int, max_order: int = 3) -> list[float]:
    """Weights of the newest slopes at step ``i``, newest first.

    They are integrals in the time of a variance-preserving diffusion, in float32, whose rounding the reference's
    values carry. Euler's weight for the first step and for one that ends at 0.
    """
    if i == 0 or sigmas[i + 1] <= 0:
        return [sigmas[i + 1] - sigmas[i]]
    ends = (torch.tensor([0.002, 80.0]) ** 2 + 1).log()  # the range that the method fixes its diffusion to
    epsilon = 1e-3
    beta_slope = 2 * (ends[0] / epsilon - ends[1]) / (epsilon - 1)
    beta_0 = ends[1] - 0.5 * beta_slope
    beta_1 = beta_slope + beta_0
    newest = torch.tensor(sigmas[max(i - max_order + 1, 0) : i + 2])
    root = (
        (beta_0**2 + 2 * beta_slope * (newest**2 + 1).log()).double().sqrt().float()
    )  # not every CPU rounds sqrt right
    times = (root - beta_0) / beta_slope
    start, end = times[-2], times[-1]
    tau = torch.linspace(float(start), float(end), 10_000)
    alpha = _exp_below_one(-0.5 * tau**2 * (beta_1 - beta_0) - tau * beta_0)
    density = 0.5 * (tau * (beta_1 - beta_0) + beta_0) / torch.sqrt(alpha * (1 - alpha))
    nodes = times[:-1].flip(0)
    weights = []
    for j, node in enumerate(nodes):
        basis = torch.ones_like(tau)
        for k, other in enumerate(nodes):
            if k != j:
                basis = basis * ((tau - other) / (node - other))
        weights.append(float((density * basis).sum() * (end - start) / len(tau)))
    return weights
