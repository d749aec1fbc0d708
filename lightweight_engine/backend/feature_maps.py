"""What a network of convolutions does between them: plain torch, and on a GPU programs where the channels are last.

The plain-torch body is what a CPU and training run, and the twin that the programs are tested against.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels
from .kernels import group_norm as programs

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


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
    """Group norm of feature maps ``[B, C, H, W]``, and SiLU of it where asked; the order in memory is kept.

    torch's own norm runs over maps with their channels last at a twentieth of the speed of an H200's memory.

    Args:
        shift: ``[C]``, added to ``x`` before.
    """
    if have_programs(x):
        return programs.group_norm(x, groups, weight, bias, eps, silu=silu, shift=shift)
    normed = F.group_norm(x if shift is None else x + shift[:, None, None], groups, weight, bias, eps)
    return F.silu(normed, inplace=not normed.requires_grad) if silu else normed


def add(x: Tensor, update: Tensor, shift: Tensor) -> Tensor:
    """``x + update + shift`` of maps ``[B, C, H, W]`` and ``[C]``; ``update`` may be written to."""
    if have_programs(x) and have_programs(update):
        return programs.add(x, update, shift)
    return x + update + shift[:, None, None]


def have_programs(x: Tensor) -> bool:
    """Whether programs do what is between convolutions, which then need no passes of their own for their biases."""
    if not x.is_cuda or x.dtype not in _DTYPES or torch.is_grad_enabled() or not kernels.available():
        return False
    return x.is_contiguous(memory_format=torch.channels_last)


def channels_last_is_faster(device: torch.device) -> bool:
    """Whether convolutions and what is between them run faster with their channels last.

    On a CPU they take no second copy of each map, nor the time to make it; on a GPU it takes the programs.
    """
    return device.type == "cpu" or (device.type == "cuda" and kernels.available())
