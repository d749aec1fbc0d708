"""Matrices to packed ones on the GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import ROUNDED_EACH, launch

_ELEMENTS = 4096  # of a program


def four_bit(matrix: Tensor, book: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """The nearest of 16 entries for each number of a matrix ``[out, in]``; ties and rounding as in bitsandbytes.

    Args:
        matrix: finite numbers of any float dtype.
        book: float32 ``[16]``, the values of the codes in the order of the codes.
        block_size: a power of two from 32 to 4096.

    Returns:
        codes uint8 ``[ceil(n / 2)]`` and absmax float32 ``[ceil(n / block_size)]``.
    """
    from .four_bit import quantize

    matrix, count = matrix.contiguous(), matrix.numel()
    sorted_book, order = book.sort(stable=True)
    bounds = (sorted_book[:-1] + sorted_book[1:]) / 2
    codes = torch.empty(-(-count // 2), dtype=torch.uint8, device=matrix.device)
    absmax = torch.empty(-(-count // block_size), dtype=torch.float32, device=matrix.device)
    several = max(1, _ELEMENTS // block_size)
    launch(
        quantize,
        (-(-len(absmax) // several),),
        *(matrix, bounds, order.to(torch.int32), codes, absmax, count),
        BLOCK_SIZE=block_size,
        BLOCKS=several,
        **ROUNDED_EACH,
    )
    return codes, absmax
