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

from . import kernels
from .kernels import pieces as programs

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
    rows, step = x.reshape(-1, x.shape[-1]), _STEPS[weight.dtype]
    if x.is_cuda and kernels.available():
        pieces, scales = programs.split(rows, weight.dtype, COUNT, step)
        made = programs.join(_products(pieces, weight), scales, step)
    else:
        pieces, scales = split(rows, weight.dtype, step)
        made = join(_products(pieces, weight), scales, step)
    return made.view(*x.shape[:-1], -1)


def split(rows: Tensor, dtype: torch.dtype, step: float) -> tuple[Tensor, Tensor | None]:
    """Pieces ``[COUNT, rows, in]``: what each rounds off is ``1 / step`` times the next.

    Returns:
        The pieces, and what rows were divided by, a power of two for each; None where ``step`` is 1.
    """
    scales = None
    if step != 1:
        exponents = torch.frexp(rows.abs().amax(-1)).exponent
        scales = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)
        rows = rows / scales[:, None]  # exact
    made = torch.empty(COUNT, *rows.shape, dtype=dtype, device=rows.device)
    first, second, third = made
    first.copy_(rows)
    rest = (rows - first).mul_(step)
    second.copy_(rest)
    third.copy_(rest.sub_(second).mul_(step))
    return made, scales


def join(parts: Tensor, scales: Tensor | None, step: float) -> Tensor:
    """The sum of products ``[COUNT, rows, out]`` with the pieces."""
    made = parts[2]
    for part in (parts[1], parts[0]):  # the smallest first
        made = torch.add(part, made, alpha=1 / step)
    return made if scales is None else made.mul_(scales[:, None])


def _products(pieces: Tensor, weight: Tensor) -> Tensor:
    """Those of ``[COUNT, rows, in]`` with a weight: ``[COUNT, rows, out]`` in float32."""
    return _in_float32(pieces.flatten(0, 1), weight.t()).unflatten(0, (COUNT, -1))


def _in_float32(a: Tensor, b: Tensor) -> Tensor:
    """A product of matrices in float32: some columns after others, whose sum is added to in float32."""
    if not a.is_cuda:
        return a.float() @ b.float()
    (first, *others) = zip(a.split(WIDTH, dim=1), b.split(WIDTH), strict=True)
    made = torch.mm(*first, out_dtype=torch.float32)
    for left, right in others:
        torch.addmm(made, left, right, out_dtype=torch.float32, out=made)
    return made
