"""Triton programs for GGUF blocks; import this module inside functions only, as it imports triton.

One program (``dequantize``) stores tiles ``[blocks, runs, elements of a run]``, where a run is what shares a scale, so
that scales are read once a run and a thread writes neighbours. What differs between types is one function each: values
of a tile from ``data`` (the blocks as bytes), ``halves`` (the same memory as fp16), block number ``b``, run ``r`` and
element ``e``. Layouts: ``ggml-common.h`` of ggml (MIT). A block's size in bytes is even for every type.

Every product of an fp16 scale with the small integers here is exact in float32, so that fused multiply-add changes
nothing and the value is rounded once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _byte(data, place):
    return tl.load(data + place).to(tl.int32)


@triton.jit
def _signed_byte(data, place):
    return tl.load(data + place).to(tl.int8, bitcast=True).to(tl.float32)


@triton.jit
def _half(halves, place):
    return tl.load(halves + place).to(tl.float32)


@triton.jit
def q8_0(data, halves, b, r, e, table):
    """34 bytes: d, 32 signed bytes."""
    return _half(halves, b * 17) * _signed_byte(data, b * 34 + 2 + r * 16 + e)


@triton.jit
def q4_0(data, halves, b, r, e, table):
    """18 bytes: d, 16 bytes with elements 0-15 in the low halves and 16-31 in the high ones; less 8."""
    q = (_byte(data, b * 18 + 2 + e) >> (4 * r)) & 15
    return _half(halves, b * 9) * (q - 8).to(tl.float32)


@triton.jit
def q4_1(data, halves, b, r, e, table):
    """20 bytes: d, m, codes as in Q4_0."""
    q = (_byte(data, b * 20 + 4 + e) >> (4 * r)) & 15
    return _half(halves, b * 10) * q.to(tl.float32) + _half(halves, b * 10 + 1)


@triton.jit
def _fifth_bit(data, place, r, e):
    """Bit 4 of element ``16 r + e`` from 32 bits in a row, moved to its place."""
    return ((_byte(data, place + 2 * r + e // 8) >> (e % 8)) & 1) << 4


@triton.jit
def q5_0(data, halves, b, r, e, table):
    """22 bytes: d, 32 fifth bits, codes as in Q4_0; less 16."""
    q = ((_byte(data, b * 22 + 6 + e) >> (4 * r)) & 15) | _fifth_bit(data, b * 22 + 2, r, e)
    return _half(halves, b * 11) * (q - 16).to(tl.float32)


@triton.jit
def q5_1(data, halves, b, r, e, table):
    """24 bytes: d, m, 32 fifth bits, codes as in Q4_0."""
    q = ((_byte(data, b * 24 + 8 + e) >> (4 * r)) & 15) | _fifth_bit(data, b * 24 + 4, r, e)
    return _half(halves, b * 12) * q.to(tl.float32) + _half(halves, b * 12 + 1)


@triton.jit
def iq4_nl(data, halves, b, r, e, table):
    """18 bytes as Q4_0, whose codes number the entries of a table."""
    q = (_byte(data, b * 18 + 2 + e) >> (4 * r)) & 15
    return _half(halves, b * 9) * tl.load(table + q)


@triton.jit
def _scale_and_minimum(data, place, r):
    """Six bits each for run ``r`` of eight, from the 12 bytes at ``place`` that Q4_K and Q5_K share.

    Runs 0-3 have theirs in the low six bits of bytes ``r`` and ``r + 4``. Runs 4-7 have four bits in byte ``r + 4`` and
    the two above in the top of bytes ``r - 4`` and ``r``.
    """
    late = r >= 4
    own, next_ = _byte(data, place + r), _byte(data, place + r + 4)
    before = _byte(data, place + tl.maximum(r - 4, 0))
    scale = tl.where(late, (next_ & 15) | ((before >> 6) << 4), own & 63)
    minimum = tl.where(late, (next_ >> 4) | ((own >> 6) << 4), next_ & 63)
    return scale.to(tl.float32), minimum.to(tl.float32)


@triton.jit
def q4_k(data, halves, b, r, e, table):
    """144 bytes: d, dmin, 12 bytes of scales, 128 of codes: runs 2g and 2g+1 are the halves of 32 bytes."""
    scale, minimum = _scale_and_minimum(data, b * 144 + 4, r)
    q = (_byte(data, b * 144 + 16 + (r // 2) * 32 + e) >> (4 * (r % 2))) & 15
    return _half(halves, b * 72) * scale * q.to(tl.float32) - _half(halves, b * 72 + 1) * minimum


@triton.jit
def q5_k(data, halves, b, r, e, table):
    """176 bytes: as Q4_K with 32 bytes before the codes, whose bit ``r`` is bit 4 of the run's elements."""
    scale, minimum = _scale_and_minimum(data, b * 176 + 4, r)
    q = (_byte(data, b * 176 + 48 + (r // 2) * 32 + e) >> (4 * (r % 2))) & 15
    q |= ((_byte(data, b * 176 + 16 + e) >> r) & 1) << 4
    return _half(halves, b * 88) * scale * q.to(tl.float32) - _half(halves, b * 88 + 1) * minimum


@triton.jit
def q6_k(data, halves, b, r, e, table):
    """210 bytes: 128 of low four bits, 64 of high two, 16 signed scales, d; in halves of 128 elements; less 32."""
    half, group, odd = r // 8, (r % 8) // 2, r % 2
    low = _byte(data, b * 210 + half * 64 + (group % 2) * 32 + odd * 16 + e) >> (4 * (group // 2))
    high = _byte(data, b * 210 + 128 + half * 32 + odd * 16 + e) >> (2 * group)
    q = ((low & 15) | ((high & 3) << 4)) - 32
    return _half(halves, b * 105 + 104) * _signed_byte(data, b * 210 + 192 + r) * q.to(tl.float32)


@triton.jit
def q2_k(data, halves, b, r, e, table):
    """84 bytes: 16 of scale (low) and minimum (high), 64 of two-bit codes, d, dmin."""
    both = _byte(data, b * 84 + r)
    q = (_byte(data, b * 84 + 16 + (r // 8) * 32 + (r % 2) * 16 + e) >> ((r % 8) // 2 * 2)) & 3
    scale, minimum = (both & 15).to(tl.float32), (both >> 4).to(tl.float32)
    return _half(halves, b * 42 + 40) * scale * q.to(tl.float32) - _half(halves, b * 42 + 41) * minimum


@triton.jit
def q3_k(data, halves, b, r, e, table):
    """110 bytes: 32 of inverted third bits, 64 of two-bit codes, 12 of scales, d; scales less 32, codes less 4."""
    q = (_byte(data, b * 110 + 32 + (r // 8) * 32 + (r % 2) * 16 + e) >> ((r % 8) // 2 * 2)) & 3
    q += ((_byte(data, b * 110 + (r % 2) * 16 + e) >> (r // 2)) & 1) * 4 - 4
    low = (_byte(data, b * 110 + 96 + r % 8) >> (r // 8 * 4)) & 15
    high = (_byte(data, b * 110 + 104 + r % 4) >> (r // 4 * 2)) & 3
    scale = ((low | (high << 4)) - 32).to(tl.float32)
    return _half(halves, b * 55 + 54) * scale * q.to(tl.float32)


@triton.jit
def iq4_xs(data, halves, b, r, e, table):
    """136 bytes: d, 16 bits of high scales, 4 bytes of low ones, 128 of codes into a table; scales less 32."""
    part = r // 2
    low = (_byte(data, b * 136 + 4 + part // 2) >> (part % 2 * 4)) & 15
    high = (_byte(data, b * 136 + 2 + part // 4) >> (part % 4 * 2)) & 3
    q = (_byte(data, b * 136 + 8 + part * 16 + e) >> (r % 2 * 4)) & 15
    return _half(halves, b * 68) * ((low | (high << 4)) - 32).to(tl.float32) * tl.load(table + q)


@triton.jit
def dequantize(
    data,
    halves,
    table,
    out,
    count,
    DECODE: tl.constexpr,
    BLOCKS: tl.constexpr,
    RUNS: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    """Values of ``count`` blocks of ``RUNS`` times ``RUN`` elements, ``BLOCKS`` a program."""
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    b = tl.arange(0, BLOCKS)[:, None, None]
    r = tl.arange(0, RUNS)[None, :, None]
    e = tl.arange(0, RUN)[None, None, :]
    within = b < count - first
    # Blocks behind the last are read as block 0, which is there, and not stored: cheaper than a mask on every load.
    near = tl.where(within, b, 0)
    value = DECODE(data + first * BLOCK_BYTES, halves + first * (BLOCK_BYTES // 2), near, r, e, table)
    place = (b * RUNS + r) * RUN + e
    tl.store(out + first * (RUNS * RUN) + place, value.to(out.dtype.element_ty), mask=within)
