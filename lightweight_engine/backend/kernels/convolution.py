"""Convolutions of 3x3 in half precision, on the GPU: what follows one is done as it writes.

A program multiplies as an implicit matrix product: nothing is copied for it, and its sums are float32. Few channels
make it a matter of reading: each pixel is read for each tap. So one program goes down the lines and multiplies what it
reads for three of them (``Lines``). The other does patches, of maps that are doubled as well, and for very few channels
(``Shape``): there neighbours may share what they read, though their product then multiplies by zeros as well. Maps have
a border of zeros, so that no place is looked at twice. The twin in plain torch is in ``..convolutions``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .launch import launch

_EVEN = 4  # pixels that lines are filled up to, the largest group
_LEAST = 16  # columns of a product
_DEPTHS = (64, 32)


@dataclass(frozen=True)
class Shape:
    """How a convolution is cut into programs; every number is a power of two.

    Attributes:
        group: neighbours of a line that share what is read, 4 at most.
        rows, columns: of a program, in lines and groups.
        depth: channels of one product, at most.
        warps, stages: of Triton.
        copied: bytes of one copy to a program's own memory: 8 go through the first cache, where the next tap finds
            them, 16 go past it.
    """

    group: int = 2
    rows: int = 8
    columns: int = 16
    depth: int = 32
    warps: int = 4
    stages: int = 3
    copied: int = 8


@dataclass(frozen=True)
class Lines:
    """How a convolution is cut into programs that go down the lines.

    Attributes:
        segments: patches of a program, below one another; a power of two.
        columns: pixels of a line of a patch; a power of two.
        rows: lines of a patch, 2 or more. Two further ones are read.
        made: channels that a program makes, at most; a power of two.
        depth, warps, stages, copied: as of ``Shape``.
        weights_copied: bytes of one copy of weights, as ``copied``.
        held: pixels are multiplied from registers.
    """

    group: ClassVar[int] = 1

    segments: int = 2
    columns: int = 64
    rows: int = 9
    made: int = 32
    depth: int = 32
    warps: int = 4
    stages: int = 3
    copied: int = 8
    weights_copied: int = 8
    held: bool = True


# Measured on an H200 (``benchmarks.upscaler --shapes``).
NARROW = Shape()
WIDE = Shape(group=1, rows=16, warps=8)
LINES = Lines(stages=5, copied=16, weights_copied=16)
WIDE_LINES = Lines(segments=1, made=64, stages=5, copied=16, weights_copied=16)


def shape_of(made: int) -> Shape | Lines:
    """The shape for a convolution that makes so many channels."""
    return next((lines for lines in (WIDE_LINES, LINES) if made % lines.made == 0), NARROW)


def block_of(made: int, group: int) -> int:
    """Columns of a product for each of a group's neighbours: its channels, filled up."""
    return max(1 << (made - 1).bit_length(), _LEAST // group)


@dataclass(frozen=True)
class Maps:
    """Feature maps with a border of zeros, as convolutions read them.

    Attributes:
        whole: ``[B, H + 2, W + 2 or more, C]``, or some of the channels of such.
        height, width: of what is inside.
    """

    whole: Tensor
    height: int
    width: int

    @classmethod
    def empty(
        cls,
        size: tuple[int, int, int],
        channels: int,
        dtype: torch.dtype = torch.float16,
        device: torch.device | None = None,
    ) -> Maps:
        """Maps of zeros of a size (B, H, W)."""
        batch, height, width = size
        filled = -(-width // _EVEN) * _EVEN
        return cls(torch.zeros(batch, height + 2, filled + 2, channels, dtype=dtype, device=device), height, width)

    @property
    def inside(self) -> Tensor:
        """``[B, H, W, C]``, without the border."""
        return self.whole[:, 1 : self.height + 1, 1 : self.width + 1]

    def channels(self, first: int, end: int) -> Maps:
        """Some of the channels, in the same memory."""
        return Maps(self.whole[..., first:end], self.height, self.width)


@dataclass(frozen=True)
class Sums:
    """What a convolution is added to: ``trunk + factor * convolution``, or ``origin + factor * (that)``.

    Attributes:
        trunk, origin: float32 ``[B, H, W, C]``, contiguous.
        keep: where the sum goes in float32; it may be one of the others.
    """

    trunk: Tensor
    factor: float
    origin: Tensor | None = None
    keep: Tensor | None = None


def convolve(
    x: Maps,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    *,
    slope: float = 1.0,
    doubled: bool = False,
    sums: Sums | None = None,
    shape: Shape | Lines,
) -> None:
    """Write a convolution with its bias, leaky ReLU of it and a sum to ``out``, rounded once.

    Args:
        x: float16; its channels are a multiple of 32.
        weight: float16 ``[3, group + 2, C, group, block]``, as ``..convolutions`` packs it.
        bias: float32 ``[N]``.
        out: ``[B, H, W, N]``, contiguous but for what lies between its lines and pixels: other channels than ``x`` in
            the same memory, or memory of its own.
        slope: of negative numbers.
        doubled: each pixel of ``x`` stands for four. Patches are done then, whatever the shape.
        sums: added to after the activation.
    """
    if isinstance(shape, Lines) and doubled:
        shape = WIDE
    height, width = out.shape[1:3]
    trunk, origin, keep = (None, None, None) if sums is None else (sums.trunk, sums.origin, sums.keep)
    beside = (bias if each is None else each for each in (trunk, origin, keep))
    sizes = (height, width, x.whole.shape[1], x.whole.shape[2])
    others = (weight, bias, out, *beside, *sizes, out.stride(0) // out.stride(1), out.stride(1) // out.stride(2))
    constants = {
        "CHANNELS": x.whole.shape[3],
        "STRIDE": x.whole.stride(2),
        "MADE": out.shape[3],
        "MADE_STRIDE": out.stride(2),
        "DEPTH": next(each for each in _DEPTHS if each <= shape.depth and x.whole.shape[3] % each == 0),
        "COPIED": shape.copied,
        "SLOPE": slope,
        "FACTOR": 1.0 if sums is None else sums.factor,
        "SUMS": 0 if sums is None else 1 if origin is None else 2,
        "KEPT": keep is not None,
        "num_warps": shape.warps,
        "num_stages": shape.stages,
    }
    if isinstance(shape, Lines):
        _down_lines(x.whole, others, constants, out, shape)
    else:
        _in_patches(x.whole, others, constants, out, shape, doubled)


def _down_lines(x: Tensor, others: tuple[Any, ...], constants: dict[str, Any], out: Tensor, shape: Lines) -> None:
    from .lines import convolve as program

    batch, height, width, made = out.shape
    block = min(shape.made, made)
    launch(
        program,
        (-(-width // shape.columns) * (made // block), -(-height // (shape.segments * shape.rows)), batch),
        *(x.view(torch.int16) if shape.held else x, *others, 3 * constants["CHANNELS"] // constants["DEPTH"]),
        **constants,
        BLOCK=block,
        SEGMENTS=shape.segments,
        COLUMNS=shape.columns,
        ROWS=shape.rows,
        WEIGHTS_COPIED=shape.weights_copied,
        HELD=shape.held,
    )


def _in_patches(
    x: Tensor, others: tuple[Any, ...], constants: dict[str, Any], out: Tensor, shape: Shape, doubled: bool
) -> None:
    from .taps import convolve as program

    batch, height, width, made = out.shape
    launch(
        program,
        (-(-width // (shape.columns * shape.group)), -(-height // shape.rows), batch),
        *(x, *others),
        **constants,
        MADE_BLOCK=block_of(made, shape.group),
        GROUP=shape.group,
        ROWS=shape.rows,
        COLUMNS=shape.columns,
        DOUBLED=int(doubled),
    )
