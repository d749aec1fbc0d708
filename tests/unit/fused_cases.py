"""Calls of the programs between a block's products, with what their twins say in float64, for interpreter and GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightweight_engine.backend import fused


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def residual_norm(batch: int, tokens: int, width: int) -> tuple[Any, ...]:
    """x a part of longer rows of tokens, and a modulation of which the vectors are parts."""
    x = randn(batch, tokens + 3, width)[:, 3:]
    gate, shift, scale = randn(batch, 1, 3 * width, seed=1).chunk(3, dim=-1)
    return x, (gate, randn(batch, tokens, width, seed=2)), (shift, scale)


def streams(batch: int, lengths: tuple[int, ...], count: int, dim: int) -> tuple[Any, Tensor]:
    """Projections that are parts of wider rows, as ``linear1`` makes them, and their rotations."""
    made = [
        (
            randn(batch, tokens, 3 * count * dim + 5, seed=i)[..., : 3 * count * dim],
            randn(dim, seed=9),
            randn(dim, seed=8),
        )
        for i, tokens in enumerate(lengths)
    ]
    angles = 6 * randn(sum(lengths), dim // 2, seed=7)
    return made, torch.polar(torch.ones_like(angles), angles)


def beside(batch: int, tokens: int, width: int, mlp: int) -> tuple[Tensor, Tensor]:
    return randn(batch, tokens, width), 2 * randn(batch, tokens, 3 * width + mlp, seed=1)


CASES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "one token": ("residual_norm", residual_norm(1, 1, 8)),
    "odd width": ("residual_norm", residual_norm(2, 5, 100)),
    "wide": ("residual_norm", residual_norm(2, 3, 3072)),
    "one stream": ("heads", streams(2, (5,), 3, 8)),
    "two streams": ("heads", streams(2, (3, 5), 9, 16)),
    "heads of 128": ("heads", streams(1, (2, 3), 24, 128)),
    "beside": ("gelu_beside", beside(2, 3, 24, 96)),
    "beside, wide": ("gelu_beside", beside(1, 2, 1536, 2048)),
}
"""By label: a program, and its arguments in float32."""


def to(value: Any, dtype: torch.dtype, device: str = "cpu") -> Any:
    """Tensors at any depth in a dtype and on a device, strides kept; rotations stay complex."""
    if isinstance(value, tuple | list):
        return type(value)(to(each, dtype, device) for each in value)
    if not isinstance(value, Tensor):
        return value
    if value.is_complex():
        return value.to(device, torch.complex128 if dtype == torch.float64 else torch.complex64)
    return value.to(device, dtype)


def twin(name: str, arguments: tuple[Any, ...]) -> Any:
    """What the plain-torch body says, on a CPU."""
    if name != "residual_norm":
        return getattr(fused, name)(*arguments)
    x, (gate, update), (shift, scale) = arguments
    return fused.gate_residual_norm(x, gate, update, shift, scale)
