"""Float32 numbers as three 16-bit pieces, and their products as one, on the GPU in one pass each.

Nothing waits for the GPU. Every step is exact or rounds as the twins in ``..in_pieces`` do: the bits are theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import launch

_JOIN_BLOCK = 1024


def split(x: Tensor, dtype: torch.dtype, count: int, step: float) -> tuple[Tensor, Tensor]:
    """Pieces of rows.

    Args:
        x: float32 ``[rows, in]``, each row contiguous.
        count: of pieces; 3.
        step: what each piece is multiplied by beside the one before.

    Returns:
        (pieces, scales): ``[count, rows, in]`` in ``dtype``, and float32 ``[rows]`` that these were divided by, which
        is written where ``step`` is not 1.
    """
    from .splitting import split as program

    rows, width = x.shape
    made = torch.empty((count, rows, width), dtype=dtype, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = 1 << (width - 1).bit_length()
    warps = min(16, max(1, block // 1024))
    sizes = {"WIDTH": width, "BLOCK": block}
    launch(program, (rows,), x, made, scales, rows * width, x.stride(0), **sizes, STEP=step, num_warps=warps)
    return made, scales


def join(parts: Tensor, scales: Tensor, step: float) -> Tensor:
    """The sum ``[rows, out]`` of products with the pieces, float32 ``[count, rows, out]``; the rest is that of
    ``split``."""
    from .splitting import join as program

    _, rows, width = parts.shape
    made = torch.empty((rows, width), dtype=torch.float32, device=parts.device)
    grid = rows, -(-width // _JOIN_BLOCK)
    launch(program, grid, parts, scales, made, rows * width, width, BLOCK=_JOIN_BLOCK, STEP=step)
    return made
