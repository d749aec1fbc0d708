"""Norms and sums of feature maps with their channels last, on the GPU.

A group norm is one pass for the statistics and one that applies them. What a convolution would have added comes in as a
``shift``, so that no pass is made for it.

The twin in plain torch is in ``..feature_maps``. Sums are made in the same order at every run, on every card.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import launch

_TILE = 4096  # numbers that a program reads at once, a vector of 16 for each of its threads
_WARPS = 8
_PARTS = 512  # of a picture, whose statistics are merged: about four programs for each multiprocessor of a large card
_STEPS = 4  # tiles of a program that applies them, for one reading of the vectors


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    silu: bool = False,
    shift: Tensor | None = None,
) -> Tensor:
    """The norm of each group of channels of a picture, and SiLU of it where asked.

    Args:
        x: ``[B, C, H, W]`` of 16 or 32 bits, contiguous with channels last.
        groups: a divisor of C.
        weight, bias: ``[C]``, contiguous.
        shift: ``[C]``, contiguous, added to ``x`` before; None for none.
    """
    from .channels import merge, moments, normalise

    batch, channels, height, width = x.shape
    pixels, each = height * width, channels // groups
    block = _power_of_two(channels)
    rows = max(_TILE // block, 1)
    steps = -(-pixels // (rows * _PARTS))
    parts = -(-pixels // (rows * steps))
    means, squares = torch.empty((2, batch, parts, channels), dtype=torch.float32, device=x.device)
    mean, unit = torch.empty((2, batch, groups), dtype=torch.float32, device=x.device)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    added, is_shifted = (weight if shift is None else shift), shift is not None
    shape = {"CHANNELS": channels, "BLOCK": block, "ROWS": rows, "num_warps": _WARPS}
    launch(moments, (parts, batch), x, means, squares, pixels, steps, **shape)
    launch(
        merge,
        (groups, batch),
        *(means, squares, added, mean, unit, pixels, parts, rows * steps),
        CHANNELS=channels,
        EACH=each,
        EACH_BLOCK=_power_of_two(each),
        PARTS_BLOCK=_PARTS,
        EPS=eps,
        SHIFTED=is_shifted,
        num_warps=_WARPS,
    )
    launch(
        normalise,
        (-(-pixels // (rows * _STEPS)), batch),
        *(x, out, added, mean, unit, weight, bias, pixels),
        EACH=each,
        STEPS=_STEPS,
        SILU=silu,
        SHIFTED=is_shifted,
        **shape,
    )
    return out


def add(x: Tensor, update: Tensor, shift: Tensor) -> Tensor:
    """``x + update + shift`` in the place of ``update``.

    Args:
        x, update: ``[B, C, H, W]``, contiguous with channels last.
        shift: ``[C]``, contiguous.
    """
    from .channels import add as program

    batch, channels, height, width = x.shape
    pixels, block = batch * height * width, _power_of_two(channels)
    rows = max(_TILE // block, 1)
    launch(
        program,
        (-(-pixels // (rows * _STEPS)),),
        *(x, update, shift, pixels),
        CHANNELS=channels,
        BLOCK=block,
        ROWS=rows,
        STEPS=_STEPS,
        num_warps=_WARPS,
    )
    return update


def _power_of_two(number: int) -> int:
    """The least that is no less."""
    return 1 << (number - 1).bit_length()
