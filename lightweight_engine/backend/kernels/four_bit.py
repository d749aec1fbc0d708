"""Triton programs for 4-bit codes (nf4, fp4); import this module inside functions only, as it imports triton.

Eight codes are one little-endian word, whose element ``j`` begins at bit ``4 * (j ^ 1)``: the first of two has the high
half of its byte. A word becomes 16 bytes of bf16, the widest a thread can write at once.
"""

# Triton's language is Python in form only: its loops are unrolled by the compiler, not iterated.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _nested(absmax, nested_absmax, nested_map, nested_offset, block, within, NESTED_BLOCK: tl.constexpr):
    """Scale of each block from its 8-bit code. Rounded twice, as the twin: launched without fused multiply-add."""
    code = tl.load(absmax + block, mask=within, other=0).to(tl.int32)
    outer = tl.load(nested_absmax + block // NESTED_BLOCK, mask=within, other=0.0)
    return tl.load(nested_map + code) * outer + tl.load(nested_offset)


@triton.jit
def dequantize(
    words,
    absmax,
    table,
    nested_absmax,
    nested_map,
    nested_offset,
    out,
    count,
    BLOCK_SIZE: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    WORDS: tl.constexpr,
    STEPS: tl.constexpr,
    LOOKUP: tl.constexpr,
):
    """``count`` values from int32 words of eight codes, ``STEPS`` times ``WORDS`` words a program.

    ``NESTED_BLOCK`` is 0 where ``absmax`` is float32. ``LOOKUP`` is where the table of 16 is read from: ``shared``
    memory (16 banks, so that no two lanes of a warp clash) or the first-level ``cache`` (one line of it).
    """
    tl.static_assert(WORDS * 8 % BLOCK_SIZE == 0, "a tile holds whole blocks")
    nibble = tl.arange(0, 8)
    index = tl.arange(0, WORDS)
    entries = tl.load(table + tl.arange(0, 16))
    for step in tl.static_range(STEPS):
        first = (tl.program_id(0).to(tl.int64) * STEPS + step) * WORDS
        left = tl.minimum(count - first * 8, WORDS * 8).to(tl.int32)
        within = index * 8 < left
        word = tl.load(words + first + index, mask=within, other=0)
        block = first * 8 // BLOCK_SIZE + index * 8 // BLOCK_SIZE
        if NESTED_BLOCK:
            scale = _nested(absmax, nested_absmax, nested_map, nested_offset, block, within, NESTED_BLOCK)
        else:
            scale = tl.load(absmax + block, mask=within, other=0.0)
        code = (word[:, None] >> ((nibble ^ 1) * 4)[None, :]) & 15
        if LOOKUP == "shared":
            value = tl.reshape(tl.gather(entries, tl.reshape(code, [WORDS * 8]), 0), [WORDS, 8])
        else:
            value = tl.load(table + code)
        value = value * scale[:, None]
        place = index[:, None] * 8 + nibble[None, :]
        tl.store(out + first * 8 + place, value.to(out.dtype.element_ty), mask=place < left)


@triton.jit(do_not_specialize=["rank"])
def dequantize_changed(
    words,
    absmax,
    table,
    nested_absmax,
    nested_map,
    nested_offset,
    up,
    down,
    out,
    rows,
    columns,
    rank,
    BLOCK_SIZE: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
):
    """A tile of a matrix ``[rows, columns]``, to which a change of low rank is added before it is rounded.

    ``up`` is ``[rank, rows]``, as ``down`` is ``[rank, columns]``: both are read along their rows, whatever the rank,
    of which ``RANK`` are summed at once. ``columns`` is a multiple of 8, so that no word goes on in the next row.
    """
    top, left = tl.program_id(1) * ROWS, tl.program_id(0) * COLUMNS
    row, column = top + tl.arange(0, ROWS), left + tl.arange(0, COLUMNS)
    tall, wide = row < rows, column < columns

    # What comes from far is asked for first, and arrives while the change is summed.
    entries = tl.load(table + tl.arange(0, 16))
    start = top.to(tl.int64) * columns
    eighth = left + tl.arange(0, COLUMNS // 8) * 8
    inside = tall[:, None] & (eighth < columns)[None, :]
    place = tl.arange(0, ROWS)[:, None] * columns + eighth[None, :]
    word = tl.load(words + start // 8 + place // 8, mask=inside, other=0)
    block = start // BLOCK_SIZE + ((start % BLOCK_SIZE).to(tl.int32) + place) // BLOCK_SIZE
    if NESTED_BLOCK:
        scale = _nested(absmax, nested_absmax, nested_map, nested_offset, block, inside, NESTED_BLOCK)
    else:
        scale = tl.load(absmax + block, mask=inside, other=0.0)

    change = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, rank, RANK):
        of = first + tl.arange(0, RANK)
        within = (of < rank)[:, None]
        high = tl.load(up + of[:, None] * rows + row[None, :], mask=within & tall[None, :], other=0.0)
        low = tl.load(down + of[:, None] * columns + column[None, :], mask=within & wide[None, :], other=0.0)
        change = tl.dot(tl.trans(high), low, change)

    code = (word[:, :, None] >> ((tl.arange(0, 8) ^ 1) * 4)[None, None, :]) & 15
    value = tl.gather(entries, tl.reshape(code, [ROWS * COLUMNS]), 0)
    value = tl.reshape(tl.reshape(value, [ROWS, COLUMNS // 8, 8]) * scale[:, :, None], [ROWS, COLUMNS])
    places = out + start + (tl.arange(0, ROWS)[:, None] * columns + column[None, :])
    tl.store(places, (value + change).to(out.dtype.element_ty), mask=tall[:, None] & wide[None, :])


@triton.jit
def quantize(
    matrix,
    bounds,
    order,
    codes,
    absmax,
    count,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Codes and scales of ``BLOCKS`` blocks a program, ``count`` values in all.

    The code is that of the nearest entry: its rank is the number of ``bounds`` (midpoints between neighbours) below the
    scaled value, ``order`` its code. Scaled by the reciprocal, as bitsandbytes does; a quotient would round otherwise.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    block = tl.arange(0, BLOCKS)
    place = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    left = count - first * BLOCK_SIZE
    value = tl.load(matrix + first * BLOCK_SIZE + place, mask=place < left, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(value), axis=1)
    tl.store(absmax + first + block, largest, mask=block * BLOCK_SIZE < left)
    # Written as full tensors: Triton takes 1e-38, subnormal in float32, for a float64.
    least, one = tl.full([BLOCKS], 1e-38, tl.float32), tl.full([BLOCKS], 1.0, tl.float32)
    value = value * tl.div_rn(one, tl.maximum(largest, least))[:, None]
    rank = tl.zeros([BLOCKS, BLOCK_SIZE], tl.int32)
    for entry in tl.static_range(15):
        rank += (value > tl.load(bounds + entry)).to(tl.int32)
    code = tl.reshape(tl.load(order + rank).to(tl.int32), [BLOCKS, BLOCK_SIZE // 2, 2])
    packed = tl.sum(code << ((1 - tl.arange(0, 2)) * 4)[None, None, :], axis=2)
    pair = block[:, None] * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2)[None, :]
    tl.store(codes + first * (BLOCK_SIZE // 2) + pair, packed.to(tl.uint8), mask=pair < tl.cdiv(left, 2))
