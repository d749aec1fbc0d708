"""Triton programs for 8-bit floats; import this module inside functions only, as it imports triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _value(code, E5M2: tl.constexpr):
    """float32 of a byte, without 8-bit floats, which GPUs before Ada Lovelace do not have.

    e5m2 is the upper byte of an fp16. e4m3fn has a bias 120 smaller than float32: moved to where float32 has exponent
    and fraction, its bits are the value times 2**-120, subnormals included. 480 stands for NaN.
    """
    if E5M2:
        return (code.to(tl.int16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    bits = (code.to(tl.int8, bitcast=True).to(tl.int32) << 20) & -0x78100000
    value = bits.to(tl.float32, bitcast=True) * (2.0**120)
    return tl.where(tl.abs(value) > 448.0, float("nan"), value)


@triton.jit
def dequantize(
    codes,
    scale,
    out,
    rows,
    columns,
    SCALED: tl.constexpr,
    PER_ROW: tl.constexpr,
    E5M2: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``out [rows, columns]``: value of each code times the scale of the matrix or of its row."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    within = (row < rows) & (column < columns)
    place = row.to(tl.int64) * columns + column
    value = _value(tl.load(codes + place, mask=within, other=0), E5M2)
    if SCALED:
        value *= tl.load(scale + row * PER_ROW, mask=row < rows, other=0.0)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=within)
