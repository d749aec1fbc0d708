"""Attention over what a projection in 8 bits made, itself in 8 bits where the GPU is one of Hopper's.

Scores are sums of products of integers, with a scale for each query and for each 128 keys; weights and values are 8-bit
floats, with a power of two for the values of a head. Everywhere else attention stays in 16 bits.

Sources: SageAttention 2 (Zhang et al. 2024); FlashAttention-3 (Shah et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

from .attention import attention
from .eight_bit import LARGEST, EightBitLinear
from .fused import Stream, heads, plain_heads, rotate
from .kernels import eight_bit_attention as programs
from .kernels.hopper import plan, usable

LIFT = 6
"""A weight of 1 is 2 ** 6 in 8 bits, which hold 448."""
SLACK = 2.5
"""Powers of two by which scores may grow before what was summed up is scaled anew."""
LARGEST_INTEGER, LEAST = 127, 1e-30


def attend(streams: Sequence[Stream], rotary: Tensor, projection: nn.Module) -> Tensor:
    """Attention ``[B, S, N*K]`` over streams one behind another.

    Args:
        streams: their projections may be written to.
        rotary: complex64 ``[S, K/2]`` for all of them.
        projection: that made the last of them; if its products are in 8 bits, so is attention where it can be.
    """
    wanted = isinstance(projection, EightBitLinear) and not torch.is_grad_enabled()
    if wanted and available(rotary.device) and programs.take(streams):
        return programs.attend(streams, rotary)
    return attention(*heads(streams, rotary))


@cache
def available(device: torch.device) -> bool:
    """Whether a device has the programs; asked before a model is ready, as they may have to be compiled."""
    return usable(programs.programs, device, "speed = fp8: attention stays in 16 bits")


def twin(streams: Sequence[Stream], rotary: Tensor, blocks: int = 1) -> Tensor:
    """What the programs compute, every rounding in its place, in plain torch; tests compare with it.

    Args:
        blocks: that cut jobs among them, as many as the GPU has multiprocessors; one cuts none. Every part rounds by
            its own scores.
    """
    wide = [(qkv.float(), first.float(), second.float()) for qkv, first, second in streams]
    queries, keys, values = plain_heads(wide, rotary, rotate)
    values, exponent = _rounded_values(values)
    queries, query_units = _integers(queries, 1)
    padding = -queries.shape[2] % programs.TILE
    keys, key_units = _integers(nn.functional.pad(keys, (0, 0, 0, padding)), programs.TILE)
    scale = query_units * (queries.shape[-1] ** -0.5 / math.log(2))
    beside_ones = torch.cat((values, torch.ones_like(values[..., :1])), dim=-1)
    lowest = torch.full_like(query_units, -(LEAST**-1))
    nothing = torch.zeros(*queries.shape[:-1], queries.shape[-1] + 1), lowest
    before, (total, most) = nothing, nothing
    for tile, begins in enumerate(_beginnings(queries.shape, blocks).unbind(-1)):
        before = _where(begins, _joined(before, (total, most)), before)
        total, most = _where(begins, nothing, (total, most))
        rows = slice(tile * programs.TILE, min((tile + 1) * programs.TILE, queries.shape[2]))
        scores = queries @ keys[:, :, rows].mT * (scale * key_units[:, :, tile, None])
        peak = scores.amax(-1, keepdim=True)
        grown = torch.where(peak <= most + SLACK, most, peak)
        total = total * torch.exp2(most - grown) + _weights(scores - grown) @ beside_ones[:, :, rows]
        most = grown
    total, _ = _joined(before, (total, most))
    return (total[..., :-1] / total[..., -1:] * torch.exp2(exponent)).transpose(1, 2).flatten(2)


Sums = tuple[Tensor, Tensor]
"""Of values and weights ``[B, N, S, K + 1]``, and the power of two that they are multiples of."""


def _joined(first: Sums, second: Sums) -> Sums:
    most = torch.maximum(first[1], second[1])
    return sum((total * torch.exp2(power - most) for total, power in (first, second)), torch.zeros(())), most


def _where(chosen: Tensor, first: Sums, second: Sums) -> Sums:
    return torch.where(chosen, first[0], second[0]), torch.where(chosen, first[1], second[1])


def _beginnings(shape: torch.Size, blocks: int) -> Tensor:
    """Whether a part of a job begins at a tile, for queries ``[B, N, S, K]``: ``[B, N, S, 1, T]``."""
    batch, heads, tokens, _ = shape
    parts = plan(batch, heads, tokens, programs.TILE, blocks)
    jobs = torch.arange(parts.jobs).view(batch, heads, -1).repeat_interleave(programs.TILE, dim=2)[:, :, :tokens, None]
    tiles = torch.arange(parts.tiles)
    cut = (jobs >= parts.whole) & (((jobs - parts.whole) * parts.tiles + tiles) % parts.share == 0)
    return ((tiles == 0) | cut)[..., None, :]


def _integers(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Integers of up to 127 ``[B, N, S, K]``, and what 1 stands for in each so many rows ``[B, N, S / rows, 1]``."""
    largest = x.unflatten(2, (-1, rows)).abs().amax((-2, -1)).clamp(min=LEAST)
    unit = (largest / LARGEST_INTEGER)[..., None]
    return (x / unit.repeat_interleave(rows, dim=2)).round(), unit


def _rounded_values(x: Tensor) -> tuple[Tensor, Tensor]:
    """Values ``[B, N, S, K]`` as 8-bit floats, over a power of two for each head ``[B, N, 1, 1]``; and its exponent."""
    largest = x.abs().amax((-2, -1), keepdim=True)
    exponent = torch.where(largest == 0, 0, (largest / LARGEST).log2().clamp(min=-100).ceil())
    return (x * torch.exp2(-exponent)).to(torch.float8_e4m3fn).float(), exponent


def _weights(powers: Tensor) -> Tensor:
    """``2 ** (power + LIFT)`` as 8-bit floats: bits that are linear in the power."""
    bits = ((powers + LIFT + 7) / 16).clamp(0, 1).half() * 128  # as halves, 11 bits
    return bits.float().round().to(torch.uint8).view(torch.float8_e4m3fn).float()
