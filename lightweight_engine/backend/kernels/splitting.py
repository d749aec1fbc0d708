"""Triton programs that take float32 numbers apart into 16-bit pieces, and put products with them together.

Import inside functions only, as it imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def split(x, pieces, scales, apart, x_row, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """A row of ``x`` into three of ``pieces`` ``[3, rows, WIDTH]``: what each rounds off is 1 / STEP times the next.

    A piece is ``apart`` numbers behind the one before. With a STEP other than 1, a row is first divided by the power of
    two in ``scales`` that brings it below 1.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    within = column < WIDTH
    numbers = tl.load(x + row * x_row + column, mask=within, other=0.0)
    if STEP != 1:
        # The exponent's bits; those of the largest numbers, and of what is none, leave room for the inverse's.
        largest = tl.max(tl.abs(numbers), 0)
        bits = tl.minimum(tl.cast(largest, tl.int32, bitcast=True) >> 23, 252)
        tl.store(scales + row, ((bits + 1) << 23).to(tl.float32, bitcast=True))
        numbers = numbers * ((253 - bits) << 23).to(tl.float32, bitcast=True)
    place = pieces + row * WIDTH + column
    first = numbers.to(pieces.dtype.element_ty)
    tl.store(place, first, mask=within)
    rest = (numbers - first.to(tl.float32)) * STEP
    second = rest.to(pieces.dtype.element_ty)
    tl.store(place + apart, second, mask=within)
    third = (rest - second.to(tl.float32)) * STEP
    tl.store(place + 2 * apart, third.to(pieces.dtype.element_ty), mask=within)


@triton.jit
def join(parts, scales, out, apart, width, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """Products ``[3, rows, width]`` with the pieces into their sum ``[rows, width]``, the smallest first."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = column < width
    place = row * width + column
    total = tl.load(parts + place + 2 * apart, mask=within, other=0.0)
    total = tl.load(parts + place + apart, mask=within, other=0.0) + total * (1 / STEP)
    total = tl.load(parts + place, mask=within, other=0.0) + total * (1 / STEP)
    if STEP != 1:
        total = total * tl.load(scales + row)
    tl.store(out + place, total, mask=within)
