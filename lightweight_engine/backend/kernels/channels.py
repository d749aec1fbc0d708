"""Triton programs for feature maps with their channels last; import inside functions only, as it imports triton.

A map is ``[B, P, C]`` in memory, P its pixels. All compute in float32 and round where they write. One build serves all
sizes of pictures.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["pixels", "steps"])
def moments(
    x,
    means,
    squares,
    pixels,
    steps,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Of each channel the mean, and the sum of squared distances from it, over ``steps`` times ``ROWS`` pixels.

    ``means`` and ``squares`` are float32 ``[B, parts, C]``; a program does one part. Each lane follows the mean of its
    own numbers (Welford), so that nothing large is subtracted from anything large, and all meet at the end.
    """
    part = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    first = part.to(tl.int64) * ROWS * steps
    place = x + (batch * pixels + first) * CHANNELS + row[:, None] * CHANNELS + channel[None, :]
    inside = channel[None, :] < CHANNELS
    left = pixels - first
    mean = tl.zeros((ROWS, BLOCK), tl.float32)
    square = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in range(steps):
        there = row + step * ROWS < left
        value = tl.load(place, mask=there[:, None] & inside, other=0.0).to(tl.float32)
        off = tl.where(there[:, None], value - mean, 0.0)
        mean += off * (1.0 / (step + 1))  # lanes behind the last pixel have stopped
        square += off * (value - mean)
        place += ROWS * CHANNELS
    count = tl.minimum(tl.maximum((left - row + ROWS - 1) // ROWS, 0), steps).to(tl.float32)[:, None]
    middle = tl.sum(mean * count, 0) / tl.minimum(left, steps * ROWS).to(tl.float32)
    off = mean - middle[None, :]
    square = tl.sum(square + off * off * count, 0)
    out = (batch * tl.num_programs(0) + part) * CHANNELS + channel
    tl.store(means + out, middle, mask=channel < CHANNELS)
    tl.store(squares + out, square, mask=channel < CHANNELS)


@triton.jit(do_not_specialize=["pixels", "parts", "part_pixels"])
def merge(
    means,
    squares,
    shift,
    mean,
    unit,
    pixels,
    parts,
    part_pixels,
    CHANNELS: tl.constexpr,
    EACH: tl.constexpr,
    EACH_BLOCK: tl.constexpr,
    PARTS_BLOCK: tl.constexpr,
    EPS: tl.constexpr,
    SHIFTED: tl.constexpr,
):
    """What ``moments`` wrote, to the mean of a group of ``EACH`` channels and the inverse of its deviation.

    ``mean`` and ``unit`` are float32 ``[B, groups]``; a program does one group. The last part may be short. Where
    SHIFTED, they are of numbers to which ``shift`` ``[C]`` is added.
    """
    group = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    part = tl.arange(0, PARTS_BLOCK)[:, None]
    channel = tl.arange(0, EACH_BLOCK)[None, :]
    start = batch * parts * CHANNELS + group * EACH
    place = start + part * CHANNELS + channel
    there = (part < parts) & (channel < EACH)
    count = tl.where(there, tl.minimum(pixels - part * part_pixels, part_pixels), 0).to(tl.float32)
    number = pixels * (EACH * 1.0)
    origin = tl.load(means + start)
    off = tl.load(means + place, mask=there, other=0.0) - origin
    if SHIFTED:
        off += tl.load(shift + group * EACH + channel, mask=channel < EACH, other=0.0).to(tl.float32)
    middle = tl.sum(tl.sum(off * count, 1), 0) / number
    off = off - middle
    square = tl.load(squares + place, mask=there, other=0.0) + off * off * count
    variance = tl.sum(tl.sum(square, 1), 0) / number
    out = batch * tl.num_programs(0) + group
    tl.store(mean + out, origin + middle)
    tl.store(unit + out, tl.rsqrt(variance + EPS))


@triton.jit(do_not_specialize=["pixels"])
def normalise(
    x,
    out,
    shift,
    mean,
    unit,
    weight,
    bias,
    pixels,
    CHANNELS: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    SILU: tl.constexpr,
    SHIFTED: tl.constexpr,
):
    """``(x + shift - mean) * unit * weight + bias``, and SiLU of it where asked; ``shift`` where SHIFTED.

    A program does ``STEPS * ROWS`` pixels.
    """
    batch = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, BLOCK)
    inside = channel < CHANNELS
    group = batch * (CHANNELS // EACH) + channel // EACH
    middle = tl.load(mean + group, mask=inside, other=0.0)
    if SHIFTED:
        middle -= tl.load(shift + channel, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    factor = (factor * tl.load(unit + group, mask=inside, other=0.0))[None, :]
    offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    first = tl.program_id(0).to(tl.int64) * (ROWS * STEPS)
    place = (batch * pixels + first) * CHANNELS + row * CHANNELS + channel[None, :]
    left = pixels - first
    for step in range(STEPS):
        there = (row + step * ROWS < left) & inside[None, :]
        value = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
        value = (value - middle[None, :]) * factor + offset
        if SILU:
            value = value * tl.sigmoid(value)
        tl.store(out + place, value.to(out.dtype.element_ty), mask=there)
        place += ROWS * CHANNELS


@triton.jit(do_not_specialize=["pixels"])
def add(
    x,
    update,
    shift,
    pixels,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """``update = x + update + shift``, for the ``pixels`` of all pictures; a program does ``STEPS * ROWS`` of them."""
    row = tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, BLOCK)
    inside = channel < CHANNELS
    each = tl.load(shift + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    first = tl.program_id(0).to(tl.int64) * (ROWS * STEPS)
    place = first * CHANNELS + row * CHANNELS + channel[None, :]
    left = pixels - first
    for step in range(STEPS):
        there = (row + step * ROWS < left) & inside[None, :]
        value = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
        value += tl.load(update + place, mask=there, other=0.0).to(tl.float32)
        tl.store(update + place, (value + each).to(update.dtype.element_ty), mask=there)
        place += ROWS * CHANNELS
