"""Triton's program for convolutions of 3x3 that goes down the lines; import inside functions only: it imports triton.

What a program reads of a line it multiplies by the weights of all three lines of a tap: that ends one line of the
result, goes on with the next, and begins another. So it reads pixels three times, in place of nine.
"""

# Triton's language is Python in form only: loops are unrolled, and what is constant is typed, by the compiler.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_line(
    x,
    weight,
    first,
    across,
    within,
    factors,
    steps,
    ending,
    middle,
    beginning,
    ENDS: tl.constexpr,
    GOES_ON: tl.constexpr,
    BEGINS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STRIDE: tl.constexpr,
    MADE: tl.constexpr,
    DEPTH: tl.constexpr,
    COPIED: tl.constexpr,
    WEIGHTS_COPIED: tl.constexpr,
    HELD: tl.constexpr,
):
    """What the pixels of a line, which begins at ``first``, add to three lines of the result."""
    TAP: tl.constexpr = 3 * CHANNELS * MADE
    place = first[:, None] + across
    # A count that is known would have LLVM write the loop out, with all its addresses in registers; of one that may be
    # zero ptxas makes products that wait for one another.
    for step in range(tl.maximum(steps, 1)):
        # All columns of some channels, then the next channels: columns read the same pixels.
        chunk = step // 3
        depth, column = chunk * DEPTH, step % 3
        pixels = tl.multiple_of(x + (column * STRIDE + depth) + place, [1, COPIED])
        # A change of type, even to the same bits, is done in registers: there the three products share what they read.
        numbers = tl.load(pixels, mask=within[:, None])
        if HELD:
            numbers = numbers.to(tl.float16, bitcast=True)
        tap = tl.multiple_of(weight + (column * CHANNELS + depth) * MADE + factors, [1, WEIGHTS_COPIED])
        if ENDS:
            ending = tl.dot(numbers, tl.load(tl.multiple_of(tap + 2 * TAP, [1, WEIGHTS_COPIED])), ending)
        if GOES_ON:
            middle = tl.dot(numbers, tl.load(tl.multiple_of(tap + TAP, [1, WEIGHTS_COPIED])), middle)
        if BEGINS:
            beginning = tl.dot(numbers, tl.load(tap), beginning)
        # What is done with the last has the program wait for all three: the next step's numbers take their registers.
        if BEGINS:
            beginning = beginning.to(tl.int32, bitcast=True).to(tl.float32, bitcast=True)
        elif GOES_ON:
            middle = middle.to(tl.int32, bitcast=True).to(tl.float32, bitcast=True)
        else:
            ending = ending.to(tl.int32, bitcast=True).to(tl.float32, bitcast=True)
    return ending, middle, beginning


@triton.jit
def write_line(
    total,
    bias,
    out,
    trunk,
    origin,
    keep,
    place,
    out_place,
    within,
    SLOPE: tl.constexpr,
    FACTOR: tl.constexpr,
    SUMS: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write leaky ReLU of a line and its bias, or a sum, to ``out_place`` of ``out``, and to ``place`` of others."""
    number = tl.arange(0, BLOCK)
    inside = within[:, None]
    total += tl.load(bias + number)[None, :]
    if SLOPE != 1.0:
        total = tl.where(total >= 0, total, total * SLOPE)
    if SUMS > 0:
        beside = place[:, None] + number[None, :]
        total = tl.load(trunk + beside, mask=inside, other=0.0) + FACTOR * total
        if SUMS == 2:
            total = tl.load(origin + beside, mask=inside, other=0.0) + FACTOR * total
        if KEPT:
            tl.store(keep + beside, total, mask=inside)
    tl.store(out + (out_place[:, None] + number[None, :]), total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["height", "width", "lines", "line", "out_lines", "out_line", "steps"])
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
    steps,
    CHANNELS: tl.constexpr,
    STRIDE: tl.constexpr,
    MADE: tl.constexpr,
    BLOCK: tl.constexpr,
    MADE_STRIDE: tl.constexpr,
    SEGMENTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    COPIED: tl.constexpr,
    WEIGHTS_COPIED: tl.constexpr,
    HELD: tl.constexpr,
    SLOPE: tl.constexpr,
    FACTOR: tl.constexpr,
    SUMS: tl.constexpr,
    KEPT: tl.constexpr,
):
    """As ``.taps.convolve``, by weights ``[3, 3, CHANNELS, 1, MADE]``; nothing is doubled.

    ``x`` is given as int16, of the same bits; ``steps`` are ``3 * CHANNELS / DEPTH``. A program does BLOCK channels of
    SEGMENTS patches below one another, each of ROWS lines of COLUMNS pixels, 2 lines at least: the first line of each
    patch, then the second of each, and so on.
    """
    PARTS: tl.constexpr = MADE // BLOCK
    picture = tl.program_id(2).to(tl.int64)
    top = tl.program_id(1) * (SEGMENTS * ROWS)
    left = tl.program_id(0) // PARTS * COLUMNS
    part = tl.program_id(0) % PARTS * BLOCK
    pixel = tl.arange(0, SEGMENTS * COLUMNS)
    row, column = pixel // COLUMNS * ROWS, pixel % COLUMNS
    # What reaches over the border to the right is not read; what reaches over that below reads the last line of the
    # border, and writes nothing. Places count from the first pixel of the patches, so that 32 bits hold them whatever
    # the size.
    channel = tl.arange(0, DEPTH)
    within = column < width - left
    across = column[:, None] * STRIDE + channel[None, :]
    factors = channel[:, None] * MADE + tl.arange(0, BLOCK)[None, :]
    below, last = height - top, height + 1 - top
    x += ((picture * lines + top) * line + left) * STRIDE
    weight, bias = weight + part, bias + part
    first = ((picture * height + top) * width + left) * MADE + part
    trunk, origin, keep = trunk + first, origin + first, keep + first
    out += ((picture * out_lines + top) * out_line + left) * MADE_STRIDE + part
    none = tl.zeros((SEGMENTS * COLUMNS, BLOCK), tl.float32)
    _, _, middle = add_line(
        x, weight, tl.minimum(row, last) * (line * STRIDE), across, within, factors, steps, none, none, none,
        False, False, True, CHANNELS, STRIDE, MADE, DEPTH, COPIED, WEIGHTS_COPIED, HELD,
    )  # fmt: skip
    _, ending, middle = add_line(
        x, weight, tl.minimum(row + 1, last) * (line * STRIDE), across, within, factors, steps, none, middle, none,
        False, True, True, CHANNELS, STRIDE, MADE, DEPTH, COPIED, WEIGHTS_COPIED, HELD,
    )  # fmt: skip
    for done in range(ROWS - 2):
        here = row + done
        total, ending, middle = add_line(
            x, weight, tl.minimum(here + 2, last) * (line * STRIDE), across, within, factors, steps,
            ending, middle, none, True, True, True, CHANNELS, STRIDE, MADE, DEPTH, COPIED, WEIGHTS_COPIED, HELD,
        )  # fmt: skip
        write_line(
            total, bias, out, trunk, origin, keep,
            (here * width + column) * MADE, (here * out_line + column) * MADE_STRIDE, within & (here < below),
            SLOPE, FACTOR, SUMS, KEPT, BLOCK,
        )  # fmt: skip
    for done in tl.static_range(ROWS - 2, ROWS):
        end = row + done
        total, ending, _ = add_line(
            x, weight, tl.minimum(end + 2, last) * (line * STRIDE), across, within, factors, steps,
            ending, middle, none, True, done < ROWS - 1, False,
            CHANNELS, STRIDE, MADE, DEPTH, COPIED, WEIGHTS_COPIED, HELD,
        )  # fmt: skip
        write_line(
            total, bias, out, trunk, origin, keep,
            (end * width + column) * MADE, (end * out_line + column) * MADE_STRIDE, within & (end < below),
            SLOPE, FACTOR, SUMS, KEPT, BLOCK,
        )  # fmt: skip
