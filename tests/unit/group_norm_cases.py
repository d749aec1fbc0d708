"""Feature maps for the group norm's programs, with what their twin says in float64, for interpreter and GPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6

# By label: batch, channels, height, width, groups; mean, deviation; whether SiLU follows.
CASES: dict[str, tuple[tuple[int, int, int, int, int], tuple[float, float], bool]] = {
    "one pixel": ((1, 64, 1, 1, 32), (0.0, 1.0), True),
    "odd sides": ((2, 128, 7, 13, 32), (0.5, 2.0), True),
    "without SiLU": ((2, 256, 5, 9, 32), (0.5, 2.0), False),
    "a channel a group": ((1, 32, 6, 6, 32), (0.0, 1.0), True),
    "no powers of two": ((3, 96, 11, 5, 32), (-1.0, 0.5), True),
    "one group": ((1, 24, 9, 10, 1), (0.0, 1.0), False),
    "parts of several tiles": ((1, 512, 67, 93, 32), (0.0, 1.0), True),
    "far from zero": ((2, 64, 31, 40, 32), (300.0, 0.5), False),
    "shifted": ((2, 96, 13, 7, 32), (0.5, 2.0), True),
    "shifted far from zero": ((1, 64, 9, 40, 32), (-40.0, 0.5), False),
    "nearly constant": ((1, 32, 8, 8, 32), (0.0, 1e-4), False),
}


SUMS = {"one pixel": (1, 64, 1, 1), "odd sides": (2, 128, 7, 13), "no powers of two": (3, 96, 31, 5)}

Arguments = tuple[Tensor, Tensor, Tensor, int, bool, Tensor | None]


def arguments(label: str, dtype: torch.dtype, device: str = "cpu") -> Arguments:
    """Map with its channels last, weight, bias, groups, SiLU, shift. In one pixel, a channel in four is an outlier."""
    (batch, channels, height, width, groups), (mean, deviation), silu = CASES[label]
    random = torch.Generator().manual_seed(0)
    x = mean + deviation * torch.randn(batch, channels, height, width, generator=random)
    x[:, ::4, 0, 0] += 20 * deviation
    weight, bias, shift = (each.to(device, dtype) for each in torch.randn(3, channels, generator=random))
    x = x.to(device, dtype, memory_format=torch.channels_last)
    return x, weight, bias, groups, silu, 10 * shift if label.startswith("shifted") else None


def expected(x: Tensor, weight: Tensor, bias: Tensor, groups: int, silu: bool, shift: Tensor | None) -> Tensor:
    """The textbook in float64."""
    shifted = x.double() if shift is None else x.double() + shift.double()[:, None, None]
    normed = F.group_norm(shifted, groups, weight.double(), bias.double(), EPS)
    return F.silu(normed) if silu else normed


def tolerance(label: str, dtype: torch.dtype) -> float:
    """Rounding of the result, and in float32 that of the mean, in deviations."""
    mean, deviation = CASES[label][1]
    own = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]
    return own + 4 * torch.finfo(torch.float32).eps * abs(mean) / deviation


def summands(label: str, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Two maps with their channels last, and what is added to each channel."""
    random = torch.Generator().manual_seed(1)
    shape = SUMS[label]
    x, update = torch.randn(2, *shape, generator=random)
    shift = torch.randn(shape[1], generator=random).to(device, dtype)
    x, update = (each.to(device, dtype, memory_format=torch.channels_last) for each in (x, update))
    return x, update, shift
