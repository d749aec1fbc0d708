"""Triton programs for what a block does between its products; import inside functions only, as it imports triton.

All compute in float32 and round where they write. A program reads a row once and keeps it in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

EPS = tl.constexpr(1e-6)
LARGEST = tl.constexpr(448.0)  # of float8_e4m3fn
# Of GELU's tanh form, which is x / (1 + 2 ** (x * (LINEAR + CUBIC * x * x))).
LINEAR = tl.constexpr(-2.302208198144325)  # -2 sqrt(2 / pi) / ln 2
CUBIC = tl.constexpr(-0.10294323958002349)  # 0.044715 of it


@triton.jit
def residual_norm(
    x,
    gate,
    update,
    shift,
    scale,
    total,
    normed,
    scales,
    tokens,
    x_batch,
    x_row,
    update_batch,
    update_row,
    gate_batch,
    modulation_batch,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    LIMIT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``total = x + gate * update`` where RESIDUAL, and ``normed = norm(total) * (1 + scale) + shift`` where NORM.

    With LIMIT above 0, ``total`` is kept within it. With ROWS, ``normed`` is in 8-bit floats with a scale for each
    token in ``scales``. A program does one token, of ``WIDTH`` numbers. ``total`` and ``normed`` are contiguous, as are
    vectors of a modulation, which lie ``gate_batch`` and ``modulation_batch`` apart. ``total`` is normed as it was
    rounded, as a norm by itself reads it.
    """
    token = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    within = column < WIDTH
    place = (batch * tokens + token) * WIDTH + column
    modulation = batch * modulation_batch + column
    row = tl.load(x + batch * x_batch + token * x_row + column, mask=within, other=0.0).to(tl.float32)
    if RESIDUAL:
        added = tl.load(update + batch * update_batch + token * update_row + column, mask=within, other=0.0)
        factor = tl.load(gate + batch * gate_batch + column, mask=within, other=0.0).to(tl.float32)
        row += factor * added.to(tl.float32)
        if LIMIT > 0:  # what is no number stays none
            row = tl.where(row > LIMIT, LIMIT, tl.where(row < -LIMIT, -LIMIT, row))
        rounded = row.to(total.dtype.element_ty)
        tl.store(total + place, rounded, mask=within)
        row = rounded.to(tl.float32)
    if NORM:
        centred = tl.where(within, row - tl.sum(row, 0) / WIDTH, 0.0)
        unit = centred * tl.rsqrt(tl.sum(centred * centred, 0) / WIDTH + EPS)
        factor = 1.0 + tl.load(scale + modulation, mask=within, other=0.0).to(tl.float32)
        moved = unit * factor + tl.load(shift + modulation, mask=within, other=0.0).to(tl.float32)
        if ROWS:
            moved = tl.where(within, moved, 0.0)
            unit = _row_scale(tl.max(tl.abs(moved), 0))
            tl.store(scales + batch * tokens + token, unit)
            moved = moved * (1.0 / unit)
        tl.store(normed + place, moved.to(normed.dtype.element_ty), mask=within)


@triton.jit
def _row_scale(largest):
    """What brings the largest number of a row to the largest 8-bit float."""
    return tl.where(largest > 0, largest / LARGEST, 1.0)


@triton.jit
def _gelu(x):
    """The tanh form. Arithmetic takes longer here than memory does, and a root less of it than a division."""
    root = tl.rsqrt(1.0 + tl.exp2(x * (LINEAR + CUBIC * (x * x))))
    return x * root * root


@triton.jit
def _piece(source, number, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A piece of a row in float32, zeros behind its end."""
    column = number * BLOCK + tl.arange(0, BLOCK)
    return tl.load(source + column, mask=column < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def _put(target, numbers, number, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A piece of a row to its place."""
    column = number * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + column, numbers.to(target.dtype.element_ty), mask=column < WIDTH)


@triton.jit
def _largest(plain, active):
    return tl.maximum(tl.max(tl.abs(plain), 0), tl.max(tl.abs(active), 0))


@triton.jit
def in_rows(
    first,
    second,
    values,
    scales,
    tokens,
    first_batch,
    first_row,
    second_batch,
    second_row,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    FIRST_BLOCK: tl.constexpr,
    SECOND_BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
):
    """``FIRST`` numbers of ``first`` and GELU of ``SECOND`` of ``second``, side by side in 8-bit floats.

    A program does one token, in one piece or in three: Flux is three times a power of two wide. Either part may be left
    out by a width of 0. ``values`` is contiguous.
    """
    token = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    row = batch * tokens + token
    plain = first + batch * first_batch + token * first_row
    active = second + batch * second_batch + token * second_row
    out = values + row * (FIRST + SECOND)
    plain0, active0 = _piece(plain, 0, FIRST, FIRST_BLOCK), _gelu(_piece(active, 0, SECOND, SECOND_BLOCK))
    largest = _largest(plain0, active0)
    plain1, active1, plain2, active2 = plain0, active0, plain0, active0
    if PIECES == 3:
        plain1, active1 = _piece(plain, 1, FIRST, FIRST_BLOCK), _gelu(_piece(active, 1, SECOND, SECOND_BLOCK))
        plain2, active2 = _piece(plain, 2, FIRST, FIRST_BLOCK), _gelu(_piece(active, 2, SECOND, SECOND_BLOCK))
        largest = tl.maximum(largest, tl.maximum(_largest(plain1, active1), _largest(plain2, active2)))
    scale = _row_scale(largest)
    tl.store(scales + row, scale)
    inverse = 1.0 / scale
    _put(out, plain0 * inverse, 0, FIRST, FIRST_BLOCK)
    _put(out + FIRST, active0 * inverse, 0, SECOND, SECOND_BLOCK)
    if PIECES == 3:
        _put(out, plain1 * inverse, 1, FIRST, FIRST_BLOCK)
        _put(out + FIRST, active1 * inverse, 1, SECOND, SECOND_BLOCK)
        _put(out, plain2 * inverse, 2, FIRST, FIRST_BLOCK)
        _put(out + FIRST, active2 * inverse, 2, SECOND, SECOND_BLOCK)


@triton.jit
def heads(
    fused,
    out,
    query_gain,
    key_gain,
    rotary,
    count,
    tokens,
    fused_batch,
    fused_row,
    out_batch,
    out_row,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Queries and keys of ``fused`` ``[B, S, 3, N, K]`` normed by head and rotated, into ``out``; values copied.

    A program does ``HEADS`` heads of one token and one of the three. ``rotary`` is ``[S, K/2, 2]``, cosines and sines;
    K is twice ``HALF``. ``out`` may be ``fused`` itself.
    """
    token = tl.program_id(0).to(tl.int64) % tokens
    batch = tl.program_id(0).to(tl.int64) // tokens
    kind = tl.program_id(1)
    head = tl.program_id(2) * HEADS + tl.arange(0, HEADS)[:, None]
    dim = tl.arange(0, 2 * HALF)[None, :]
    within = (head < count) & (dim >= 0)
    place = (kind * count + head) * (2 * HALF) + dim
    row = tl.load(fused + batch * fused_batch + token * fused_row + place, mask=within, other=0.0)
    target = out + batch * out_batch + token * out_row + place
    if kind == 2:
        tl.store(target, row, mask=within)
    else:
        wide = row.to(tl.float32)
        spread = tl.rsqrt(tl.sum(wide * wide, 1) / (2 * HALF) + EPS)
        if kind == 0:
            gain = tl.load(query_gain + dim).to(tl.float32)
        else:
            gain = tl.load(key_gain + dim).to(tl.float32)
        even, odd = tl.split(tl.reshape(wide * spread[:, None] * gain, (HEADS, HALF, 2)))
        angle = rotary + token * (2 * HALF) + 2 * tl.arange(0, HALF)[None, :]
        cosine, sine = tl.load(angle), tl.load(angle + 1)
        turned = tl.join(even * cosine - odd * sine, even * sine + odd * cosine)
        tl.store(target, tl.reshape(turned, (HEADS, 2 * HALF)).to(out.dtype.element_ty), mask=within)


@triton.jit
def gelu_beside(
    attended,
    fused,
    attended_row,
    fused_row,
    width,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The attention's output into columns ``2 WIDTH`` to ``3 WIDTH`` of ``fused``, where the values were, and GELU
    (the tanh form) of the columns behind it, in place. ``width`` is that of both together."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = fused + row * fused_row + 2 * WIDTH + column
    first = column < WIDTH
    rest = (column >= WIDTH) & (column < width)
    x = tl.load(place, mask=rest, other=0.0).to(tl.float32)
    active = _gelu(x)
    copied = tl.load(attended + row * attended_row + column, mask=first, other=0.0)
    tl.store(place, tl.where(first, copied.to(tl.float32), active).to(fused.dtype.element_ty), mask=first | rest)
