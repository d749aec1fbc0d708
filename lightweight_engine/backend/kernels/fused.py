"""What a block does between its products, on the GPU in one pass each; the twins in plain torch are in ``..fused``.

Everything is computed in float32 and rounded once, where the twins round at each operation. Nothing waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .launch import launch

_HEADS = 8  # of a program: 1024 numbers at 128 a head
_GELU_BLOCK = 1024
EIGHT_BITS = torch.float8_e4m3fn  # whose largest number is 448


def residual_norm(
    x: Tensor,
    residual: tuple[Tensor, Tensor] | None,
    modulation: tuple[Tensor, Tensor] | None,
    *,
    limit: float = 0,
    rows: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``x + gate * update``, and its layer norm modulated.

    Args:
        x: ``[B, S, D]``; its rows are contiguous.
        residual: (gate ``[B, 1, D]``, update ``[B, S, D]``); None for none.
        modulation: (shift, scale), parts of one tensor, each ``[B, 1, D]`` or, as the gate may be, one for all
            ``[1, 1, D]``; None for no norm.
        limit: that the sum is kept within; 0 for none.
        rows: what the norm is wanted in instead, with a scale for each row that makes its largest number 448.

    Returns:
        (total, normed, scales): ``[B, S, D]`` twice, and with ``rows`` float32 ``[B, S, 1]``; what was not asked for
        is ``x``.
    """
    from .streams import residual_norm as program

    batch, tokens, width = x.shape
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device) if residual else x
    normed = torch.empty(x.shape, dtype=rows or x.dtype, device=x.device) if modulation else x
    scales = torch.empty((batch, tokens, 1), dtype=torch.float32, device=x.device) if rows else x
    gate, update = residual or (x, x)
    shift, scale = modulation or (x, x)
    gate_step, step, scale_step = (vector.stride(0) if len(vector) > 1 else 0 for vector in (gate, shift, scale))
    if step != scale_step:
        raise ValueError("shift and scale must be parts of one modulation")
    block = 1 << (width - 1).bit_length()
    launch(
        program,
        (tokens, batch),
        *(x, gate, update, shift, scale, total, normed, scales, tokens, x.stride(0), x.stride(1)),
        *(update.stride(0), update.stride(1), gate_step, step),
        WIDTH=width,
        BLOCK=block,
        LIMIT=float(limit),
        RESIDUAL=residual is not None,
        NORM=modulation is not None,
        ROWS=rows is not None,
        num_warps=min(4, max(1, block // 512)),
    )
    return total, normed, scales


def in_rows(
    first: Tensor | None, second: Tensor | None = None, *, rows: torch.dtype = EIGHT_BITS
) -> tuple[Tensor, Tensor]:
    """One tensor, and GELU (the tanh form) of another, side by side, scaled so that the largest of each row is 448.

    Args:
        first: ``[B, S, F]``, its rows contiguous; None for none.
        second: ``[B, S, M]``, its rows contiguous; None for none.
        rows: what the values are wanted in.

    Returns:
        (values, scales): ``[B, S, F + M]`` and float32 ``[B, S, 1]``.
    """
    from .streams import in_rows as program

    plain, active = (first if first is not None else second), (second if second is not None else first)
    assert plain is not None and active is not None
    batch, tokens, _ = plain.shape
    widths = [0 if part is None else part.shape[-1] for part in (first, second)]
    pieces = 3 if all(width % 3 == 0 and not (part := width // 3) & (part - 1) for width in widths) else 1
    blocks = [1 << max(-(-width // pieces) - 1, 0).bit_length() for width in widths]
    values = torch.empty((batch, tokens, sum(widths)), dtype=rows, device=plain.device)
    scales = torch.empty((batch, tokens, 1), dtype=torch.float32, device=plain.device)
    launch(
        program,
        (tokens, batch),
        *(plain, active, values, scales, tokens, plain.stride(0), plain.stride(1), active.stride(0), active.stride(1)),
        FIRST=widths[0],
        SECOND=widths[1],
        FIRST_BLOCK=blocks[0],
        SECOND_BLOCK=blocks[1],
        PIECES=pieces,
        num_warps=8 if sum(widths) > 4096 else 4,  # measured on an H200: benchmarks/between.py
    )
    return values, scales


def heads(streams: Sequence[tuple[Tensor, Tensor, Tensor]], rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[B, N, S, K]`` of streams, one behind another, read by attention where they lie.

    Args:
        streams: of each the projection ``[B, S, 3*N*K]`` and the gains ``[K]`` of its queries and keys. A single one
            is worked on in place.
        rotary: complex64 ``[S, K/2]`` for all of them.
    """
    from .streams import heads as program

    first, gain, _ = streams[0]
    dim = gain.shape[0]
    together = first
    if len(streams) > 1:
        tokens = sum(qkv.shape[1] for qkv, _, _ in streams)
        together = torch.empty((len(first), tokens, first.shape[-1]), dtype=first.dtype, device=first.device)
    start = 0
    for qkv, query_gain, key_gain in streams:
        batch, tokens, width = qkv.shape
        out, angles = together[:, start : start + tokens], torch.view_as_real(rotary[start : start + tokens])
        launch(
            program,
            (batch * tokens, 2 if together is first else 3, -(-width // (3 * dim * _HEADS))),
            *(qkv, out, query_gain, key_gain, angles, width // (3 * dim), tokens),
            *(qkv.stride(0), qkv.stride(1), out.stride(0), out.stride(1)),
            HALF=dim // 2,
            HEADS=_HEADS,
        )
        start += tokens
    q, k, v = together.unflatten(-1, (3, -1, dim)).permute(2, 0, 3, 1, 4)
    return q, k, v


def gelu_beside(attended: Tensor, fused: Tensor) -> Tensor:
    """The attention's output beside the activated MLP half, in the place of the values, which are needed no more.

    Args:
        attended: ``[B, S, D]``.
        fused: ``[B, S, 3*D + M]``, contiguous; it is written to.

    Returns:
        ``[B, S, D + M]``, a view of ``fused``.
    """
    from .streams import gelu_beside as program

    width = attended.shape[-1]
    rows, beside = attended.reshape(-1, width), fused.shape[-1] - 2 * width
    launch(
        program,
        (len(rows), -(-beside // _GELU_BLOCK)),
        *(rows, fused, rows.stride(0), fused.shape[-1], beside),
        BLOCK=_GELU_BLOCK,
        WIDTH=width,
    )
    return fused[..., 2 * width :]
