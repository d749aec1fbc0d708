"""Triton's program for convolutions of 3x3 that does patches; import inside functions only, as it imports triton.

Each program multiplies a patch of pixels: in its matrix product a row is GROUP neighbours of one line, and a column one
channel of one of them, so that they share what is read of the ``GROUP + 2`` pixels around them. A neighbour multiplies
a pixel that is none of its taps by zero.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["height", "width", "lines", "line", "out_lines", "out_line"])
def convolve(
    x,
    weight,
    bias,
    out,
    trunk,
    origin,
    keep,
    height,
    width,
    lines,
    line,
    out_lines,
    out_line,
    CHANNELS: tl.constexpr,
    STRIDE: tl.constexpr,
    MADE: tl.constexpr,
    MADE_BLOCK: tl.constexpr,
    MADE_STRIDE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    COPIED: tl.constexpr,
    DOUBLED: tl.constexpr,
    SLOPE: tl.constexpr,
    FACTOR: tl.constexpr,
    SUMS: tl.constexpr,
    KEPT: tl.constexpr,
):
    """``out`` is leaky ReLU of the convolution and its bias; with SUMS a sum, in float32 until it is written.

    SUMS is 1 for ``trunk + FACTOR * convolution``, and 2 for ``origin + FACTOR * (that)``; KEPT writes the sum to
    ``keep`` in float32 as well. These three are ``[B, H, W, MADE]``, and may be one another, as each number is read and
    written by one program.

    ``x`` begins with the border of zeros around its first picture: ``lines`` lines of ``line`` pixels, STRIDE numbers
    apart; where DOUBLED each pixel inside stands for four. ``out`` begins with its first pixel, ``height`` by ``width``
    of ``out_lines`` by ``out_line``, MADE_STRIDE apart. ``weight`` is ``[3, GROUP + 2, CHANNELS, GROUP, MADE_BLOCK]``.
    A program does ROWS lines of COLUMNS groups, of the picture ``program_id(2)``.
    """
    SPAN: tl.constexpr = GROUP + 2
    TAPS: tl.constexpr = 3 * SPAN
    picture = tl.program_id(2).to(tl.int64)
    top = tl.program_id(1) * ROWS
    left = tl.program_id(0) * (COLUMNS * GROUP)
    pixel = tl.arange(0, ROWS * COLUMNS)
    channel = tl.arange(0, DEPTH)
    made = tl.arange(0, GROUP * MADE_BLOCK)
    row = pixel // COLUMNS
    column = (pixel % COLUMNS) * GROUP
    # What reaches over the border reads the last group there is, and writes nothing. Places count from the first pixel
    # of the patch, so that 32 bits hold them whatever the size.
    read_row = tl.minimum(row, height - 1 - top)
    read_column = tl.minimum(column, (width - 1) // GROUP * GROUP - left)
    first_row = top >> DOUBLED
    first_column = left >> DOUBLED
    source = x + ((picture * lines + first_row) * line + first_column) * STRIDE
    source = source + ((read_row * line + read_column) * STRIDE)[:, None] * (1 - DOUBLED) + channel[None, :]
    factors = weight + channel[:, None] * (GROUP * MADE_BLOCK) + made[None, :]
    total = tl.zeros((ROWS * COLUMNS, GROUP * MADE_BLOCK), tl.float32)
    for step in range(TAPS * (CHANNELS // DEPTH)):
        # All taps of some channels, then the next channels: taps read the same pixels.
        chunk = step // TAPS
        depth, tap = chunk * DEPTH, step - chunk * TAPS
        if DOUBLED:
            tap_row = ((top + read_row + tap // SPAN + 1) >> 1) - first_row
            tap_column = ((left + read_column + tap % SPAN + 1) >> 1) - first_column
            place = ((tap_row * line + tap_column) * STRIDE)[:, None] + depth
        else:
            place = (tap // SPAN * line + tap % SPAN) * STRIDE + depth
        numbers = tl.load(tl.multiple_of(source + place, [1, COPIED]))
        factor = factors + (tap * CHANNELS + depth) * (GROUP * MADE_BLOCK)
        total = tl.dot(numbers, tl.load(tl.multiple_of(factor, [1, COPIED])), total)
    number = made % MADE_BLOCK
    neighbour = made // MADE_BLOCK
    inside = (top + row[:, None] < height) & (left + column[:, None] + neighbour[None, :] < width)
    inside = inside & (number[None, :] < MADE)
    total += tl.load(bias + number, mask=number < MADE, other=0.0)[None, :]
    if SLOPE != 1.0:
        total = tl.where(total >= 0, total, total * SLOPE)
    across = column[:, None] + neighbour[None, :]
    if SUMS > 0:
        first = ((picture * height + top) * width + left) * MADE
        place = (row[:, None] * width + across) * MADE + number[None, :]
        total = tl.load(trunk + first + place, mask=inside, other=0.0) + FACTOR * total
        if SUMS == 2:
            total = tl.load(origin + first + place, mask=inside, other=0.0) + FACTOR * total
        if KEPT:
            tl.store(keep + first + place, total, mask=inside)
    out += ((picture * out_lines + top) * out_line + left) * MADE_STRIDE
    place = (row[:, None] * out_line + across) * MADE_STRIDE + number[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)
