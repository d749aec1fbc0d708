"""Projections that attention in 8 bits is tried on, on a CPU and on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from lightweight_engine.backend.attention import attention
from lightweight_engine.backend.fused import Stream, plain_heads, rotate

DIM = 128

# (tokens of each stream, heads, batch): whole tiles and parts of them, one tile, more than sums are kept in 8 bits for.
SHAPES = [
    ((128,), 2, 1),
    ((1,), 1, 2),
    ((77, 223), 3, 2),
    ((512, 1000), 2, 1),
    ((256, 2304), 1, 1),
]


def projections(tokens: tuple[int, ...], heads: int, batch: int, *, spread: float = 1.0) -> tuple[list[Stream], Tensor]:
    """Random streams in bfloat16, in rows that lie apart, and a rotary table for all of them.

    Args:
        spread: of scores; theirs is about 1 by itself.
    """
    random = torch.Generator().manual_seed(sum(tokens) + heads)
    streams: list[Stream] = []
    for count in tokens:
        wide = torch.randn(batch, count, 3 * heads * DIM + 64, generator=random).bfloat16()
        gains = [(spread**0.5 * (1 + 0.1 * torch.randn(DIM, generator=random))).bfloat16() for _ in range(2)]
        streams.append((wide[..., : 3 * heads * DIM], *gains))
    angles = 3 * torch.randn(sum(tokens), DIM // 2, generator=random)
    return streams, torch.polar(torch.ones_like(angles), angles)


def exact(streams: list[Stream], rotary: Tensor) -> Tensor:
    """Attention in float64."""
    wide = [(qkv.double(), first.double(), second.double()) for qkv, first, second in streams]
    q, k, v = plain_heads(wide, rotary, rotate)
    return attention(q.double(), k.double(), v.double(), backend="reference")


def distance(actual: Tensor, expected: Tensor) -> float:
    """Relative to what is expected."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())
