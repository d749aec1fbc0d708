"""Calls of the programs between a block's products, with what their twins say in float64, for interpreter and GPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightweight_engine.backend import eight_bit, fused


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def residual_norm(batch: int, tokens: int, width: int) -> tuple[Any, ...]:
    """x a part of longer rows of tokens, and a modulation of which the vectors are parts."""
    x = randn(batch, tokens + 3, width)[:, 3:]
    gate, shift, scale = randn(batch, 1, 3 * width, seed=1).chunk(3, dim=-1)
    return x, (gate, randn(batch, tokens, width, seed=2)), (shift, scale)


def gate_of_its_own(batch: int, tokens: int, width: int) -> tuple[Any, ...]:
    """A gate from the modulation of another block, which is as wide as that is."""
    x, (_, update), modulation = residual_norm(batch, tokens, width)
    return x, (randn(batch, 1, 6 * width, seed=3)[..., width : 2 * width], update), modulation


def large(batch: int, tokens: int, width: int) -> tuple[Any, ...]:
    """Sums of up to three times what float16 takes."""
    x, (gate, update), modulation = residual_norm(batch, tokens, width)
    return 2e4 * x, (gate.clamp(-2, 2), (2e4 * update).clamp(-6e4, 6e4)), modulation


def one_modulation(batch: int, tokens: int, width: int) -> tuple[Any, ...]:
    """A batch that shares one row of a table, as pictures of one prompt do."""
    gate, shift, scale = randn(5, 1, 3 * width, seed=1)[2:3].chunk(3, dim=-1)
    return randn(batch, tokens, width), (gate, randn(batch, tokens, width, seed=2)), (shift, scale)


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


def rows_of(x: Tensor) -> Tensor:
    """Numbers whose rows are far apart in size, one of them all zero."""
    x = x * torch.logspace(-6, 3, x.shape[1])[None, :, None]
    x[:, 0] = 0
    return x


CASES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "one token": ("residual_norm", residual_norm(1, 1, 8)),
    "odd width": ("residual_norm", residual_norm(2, 5, 100)),
    "gate of its own": ("residual_norm", gate_of_its_own(2, 5, 40)),
    "clipped": ("residual_norm_clipped", large(2, 5, 100)),
    "one modulation for all": ("residual_norm", one_modulation(3, 2, 40)),
    "one modulation for all, in 8 bits": ("residual_norm_rows", one_modulation(3, 2, 48)),
    "wide": ("residual_norm", residual_norm(2, 3, 3072)),
    "one stream": ("heads", streams(2, (5,), 3, 8)),
    "two streams": ("heads", streams(2, (3, 5), 9, 16)),
    "heads of 128": ("heads", streams(1, (2, 3), 24, 128)),
    "norm in 8 bits": ("residual_norm_rows", residual_norm(2, 5, 112)),
    "wide norm in 8 bits": ("residual_norm_rows", residual_norm(1, 3, 3072)),
    "8 bits": ("in_rows", (rows_of(randn(2, 7, 48)),)),
    "8 bits of a part": ("in_rows", (rows_of(randn(2, 9, 100))[:, 4:, :64],)),
    "activation in 8 bits": ("in_rows", (None, 3 * randn(2, 5, 3 * 64)[..., 64:])),
    "beside in 8 bits": ("in_rows", (randn(2, 3, 24), 2 * randn(2, 3, 3 * 24 + 96)[..., 72:])),
    "beside in 8 bits, wide": ("in_rows", (randn(1, 2, 3072), 2 * randn(1, 2, 12288))),
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


def run(programs: Any, name: str, arguments: tuple[Any, ...], rows: torch.dtype = torch.float8_e4m3fn) -> Any:
    """What a program says: of scaled rows their numbers, and their scales.

    Args:
        rows: what the values of such rows are written in.
    """
    if name == "residual_norm":
        return programs.residual_norm(*arguments)[:2]
    if name == "residual_norm_clipped":
        return programs.residual_norm(*arguments, limit=fused.LARGEST_HALF)[:2]
    if name == "residual_norm_rows":
        total, values, scales = programs.residual_norm(*arguments, rows=rows)
        return total, values.float() * scales, scales
    if name == "in_rows":
        values, scales = programs.in_rows(*arguments, rows=rows)
        return values.float() * scales, scales
    return getattr(programs, name)(*arguments)


def twin(name: str, arguments: tuple[Any, ...], rounded: bool = True) -> Any:
    """What the plain-torch body says, on a CPU; ``rounded``: to 8 bits, where the program does that."""
    if name == "in_rows":
        first, second = arguments[0], arguments[1] if len(arguments) > 1 else None
        active = None if second is None else F.gelu(second, approximate="tanh")
        return _scaled(torch.cat([each for each in (first, active) if each is not None], dim=-1), rounded)
    if not name.startswith("residual_norm"):
        return getattr(fused, name)(*arguments)
    x, (gate, update), (shift, scale) = arguments
    stream = fused.ResidualStream(x)
    stream.add(gate, update)
    total = stream.tokens
    if name == "residual_norm_clipped":
        total = total.clamp(-fused.LARGEST_HALF, fused.LARGEST_HALF)
    normed = fused.norm_modulate(total, shift, scale)
    return (total, *_scaled(normed, rounded)) if name == "residual_norm_rows" else (total, normed)


def _scaled(x: Tensor, rounded: bool) -> tuple[Tensor, Tensor]:
    rows = eight_bit.in_rows(x)
    return rows.numbers() if rounded else x, rows.scale


def tolerances(name: str, tolerance: float, expected: Any) -> tuple[float, float]:
    """Relative and absolute: what is just between two 8-bit floats may become either, an eighth apart at most, or
    where they lie evenly, 2^-9 of a scale."""
    if name not in ("residual_norm_rows", "in_rows"):
        return tolerance, tolerance
    return 1 / 7, max(tolerance, 2.0**-9 * float(expected[-1].max()))
