"""Products of float32 with a 16-bit weight on tensor cores, nearly as exact as those of float32.

A float32 number is the sum of three 16-bit ones, and a 16-bit weight needs no rounding: three products, summed in
float32, are that of the whole. On a GPU they take a third of the time, as products in float32 know no tensor cores, and
the weight need not be written out in float32 first. Sums inside tensor cores lose a little more at each number than
float32 does, so that few are summed there at a time: four times as far off as a product in float32, where one in TF32
is 500 times as far.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

COUNT = 3
WIDTH = 2048
"""Numbers of a row that are summed inside tensor cores."""
LEAST = 1 << 22
"""Numbers of a weight below which starting so many kernels takes longer than one product."""
MOST_ROWS = 512
"""Of what is multiplied, a text of 512 tokens; more take more room for their pieces than the weight in float32."""

# What each piece is multiplied by beside the one before. Half precision has no room below for what bfloat16 has: its
# numbers are brought to 1 at most, and each rest back to there.
_STEPS = {torch.bfloat16: 1.0, torch.float16: 2048.0}


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether such a product is to be had, and quicker than that of float32."""
    if not (x.is_cuda and x.dtype == torch.float32 and weight.dtype in _STEPS and weight.numel() >= LEAST):
        return False
    few = x.numel() <= MOST_ROWS * x.shape[-1]
    return few and not torch.is_grad_enabled() and _has_bfloat16(x.device)


@cache
def _has_bfloat16(device: torch.device) -> bool:
    """Whether tensor cores know it, and with it sums in float32 that are kept so: Ampere and later."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T``.

    Args:
        x: float32 ``[..., in]``.
        weight: ``[out, in]``, bfloat16 or float16.

    Returns:
        float32 ``[..., out]``.
    """
    rows = x.reshape(-1, x.shape[-1])
    step, scale = _STEPS[weight.dtype], None
    if step != 1:
        scale = torch.ldexp(torch.ones_like(rows[:, :1]), torch.frexp(rows.abs().amax(-1, keepdim=True)).exponent)
        rows = rows / scale  # of a power of two: exact
    parts = _in_float32(_pieces(rows, weight.dtype, step).flatten(0, 1), weight.t()).unflatten(0, (COUNT, -1))
    made = parts[2]
    for part in (parts[1], parts[0]):  # the smallest first
        made = torch.add(part, made, alpha=1 / step)
    made = made if scale is None else made.mul_(scale)
    return made.view(*x.shape[:-1], -1)


def _pieces(rows: Tensor, dtype: torch.dtype, step: float) -> Tensor:
    """``[COUNT, rows, in]``: what each rounds off is ``1 / step`` times the next."""
    made = torch.empty(COUNT, *rows.shape, dtype=dtype, device=rows.device)
    first, second, third = made
    first.copy_(rows)
    rest = rows - first if step == 1 else (rows - first).mul_(step)
    second.copy_(rest)
    if step == 1:
        torch.sub(rest, second, out=third)
    else:
        third.copy_(rest.sub_(second).mul_(step))
    return made


def _in_float32(a: Tensor, b: Tensor) -> Tensor:
    """A product of matrices in float32: some columns after others, whose sum is added to in float32."""
    if not a.is_cuda:
        return a.float() @ b.float()
    (first, *others) = zip(a.split(WIDTH, dim=1), b.split(WIDTH), strict=True)
    made = torch.mm(*first, out_dtype=torch.float32)
    for left, right in others:
        torch.addmm(made, left, right, out_dtype=torch.float32, out=made)
    return made
