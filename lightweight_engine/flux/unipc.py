"""UniPC: a predictor and a corrector that share their history (not valid for Flux; kept to match the reference).

Time runs from 1 down to the first table entry in even steps, and alphas are read from the whole table, while the
network is asked at the table position of a thousandth of it: the reference mixes the two scales.
Source: Zhao et al., "UniPC" (2023), variant B1(h), order 3, and the authors' implementation (MIT).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .sampler_parts import AfterStep, Denoise, Noise
from .samplers_discrete import VariancePreserving
from .schedules import alpha_bar


class _LogSnr:
    """Signal, noise and half the log ratio of the two at a time in (0, 1], interpolated in the table."""

    def __init__(self, table: Tensor, time: float) -> None:
        count = len(table)
        position = min(max(time * count - 1, 0.0), count - 1.0)
        low = min(int(position), count - 2)
        logs = 0.5 * alpha_bar(table[low : low + 2]).log()
        log_alpha = float(logs[0] + (position - low) * (logs[1] - logs[0]))
        self.alpha = math.exp(log_alpha)
        self.sigma = math.sqrt(1 - math.exp(2 * log_alpha))
        self.lam = log_alpha - math.log(self.sigma)


def unipc(
    denoise: Denoise, x: Tensor, timesteps: Sequence[int], noise: Noise, after_step: AfterStep,
    *, table: Tensor, entered: bool = False, order: int = 3,
) -> Tensor:  # fmt: skip
    """``timesteps`` only tell how many steps there are and, where ``entered`` midway, from which time."""
    steps = len(timesteps)
    if steps == 0:
        return x
    order = min(order, steps)
    start = timesteps[0] / 1000 + 1 / 1000 if entered else 1.0
    times = torch.linspace(start, 1 / len(table), steps + 1).tolist()
    view = VariancePreserving(table)

    def picture(latent: Tensor, time: float, at: _LogSnr) -> Tensor:
        epsilon, _ = view.epsilon(denoise, latent, round((time - 1 / len(table)) * 1000))
        return (latent - epsilon * at.sigma) / at.alpha

    points = [_LogSnr(table, time) for time in times]
    pictures = [picture(x, times[0], points[0])]
    for step in range(1, steps + 1):
        step_order = min(step, order, steps + 1 - step)
        base, history, b_h = _base(x, pictures, points[: step + 1], step_order)
        predicted, corrected = _weights(points[: step + 1], step_order)
        mean = sum((d * w for d, w in zip(history, predicted, strict=True)), start=torch.zeros_like(x))
        x = base - mean * b_h
        if step < steps:
            pictures.append(picture(x, times[step], points[step]))
            mean = sum((d * w for d, w in zip(history, corrected, strict=False)), start=torch.zeros_like(x))
            x = base - (mean + (pictures[-1] - pictures[-2]) * corrected[-1]) * b_h
        after_step(step - 1, x, pictures[-1])
    return x


def _base(x: Tensor, pictures: list[Tensor], points: list[_LogSnr], order: int) -> tuple[Tensor, list[Tensor], float]:
    """The first-order result, the scaled differences of older pictures, and the weight of the correction."""
    target, last = points[-1], points[-2]
    h = target.lam - last.lam
    base = x * (target.sigma / last.sigma) - pictures[-1] * (target.alpha * math.expm1(-h))
    ratios = [(points[-2 - i].lam - last.lam) / h for i in range(1, order)]
    history = [(pictures[-1 - i] - pictures[-1]) / ratio for i, ratio in enumerate(ratios, start=1)]
    return base, history, target.alpha * -h


def _weights(points: list[_LogSnr], order: int) -> tuple[list[float], list[float]]:
    """The weights of the differences for the predictor and, with the new picture's last, for the corrector."""
    h = points[-1].lam - points[-2].lam
    ratios = [(points[-2 - i].lam - points[-2].lam) / h for i in range(1, order)] + [1.0]
    phi = math.expm1(-h) / -h - 1
    rows, targets, factorial = [], [], 1
    for i in range(1, order + 1):
        rows.append([ratio ** (i - 1) for ratio in ratios])
        targets.append(phi * factorial / -h)
        factorial *= i + 1
        phi = phi / -h - 1 / factorial
    matrix, vector = torch.tensor(rows, dtype=torch.float64), torch.tensor(targets, dtype=torch.float64)
    if order == 1:
        return [], [0.5]
    corrected = torch.linalg.solve(matrix, vector).tolist()
    if order == 2:
        return [0.5], corrected
    return torch.linalg.solve(matrix[:-1, :-1], vector[:-1]).tolist(), corrected
