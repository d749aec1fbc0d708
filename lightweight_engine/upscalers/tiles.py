"""Tiles that overlap, and how the reference puts them together again.

All tiles have one size. They are spread evenly; the last ones end at the border, so that a picture smaller than a tile
lies at the right and bottom of it, with black before it. Neighbours are blended along a linear ramp of whole levels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .resampling import Size


@dataclass(frozen=True)
class Grid:
    """Where tiles lie on a picture of ``size`` (width, height); starts may be negative."""

    size: Size
    tile: int
    overlap: int
    lefts: tuple[int, ...]
    tops: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.lefts) * len(self.tops)


def split(size: Size, tile: int, overlap: int) -> Grid:
    """The tiles of a picture."""
    lefts, tops = (_starts(side, tile, overlap) for side in size)
    return Grid(size, tile, overlap, lefts, tops)


def _starts(side: int, tile: int, overlap: int) -> tuple[int, ...]:
    # A side within the overlap would have no tile, and the reference gives a black picture.
    count = max(math.ceil((side - overlap) / (tile - overlap)), 1)
    step = (side - tile) / (count - 1) if count > 1 else 0
    starts = (int(i * step) for i in range(count))
    return tuple(side - tile if start + tile >= side else start for start in starts)


def cut(levels: Tensor, grid: Grid) -> list[Tensor]:
    """The tiles of levels ``[C, H, W]``, row by row, each ``[C, tile, tile]``; what lies outside is black."""
    return [_part(levels, left, top, grid.tile) for top in grid.tops for left in grid.lefts]


def _part(levels: Tensor, left: int, top: int, tile: int) -> Tensor:
    inside = levels[:, max(top, 0) : top + tile, max(left, 0) : left + tile]
    if inside.shape[1:] == (tile, tile):
        return inside
    part = levels.new_zeros(len(levels), tile, tile)
    part[:, tile - inside.shape[1] :, tile - inside.shape[2] :] = inside
    return part


def combine(tiles: Iterable[Tensor], grid: Grid, scale: int) -> Tensor:
    """The picture ``[C, H, W]`` of tiles that a network made ``scale`` times as large, in the order of ``cut``."""
    width, height = (side * scale for side in grid.size)
    tile, overlap = grid.tile * scale, grid.overlap * scale
    picture: Tensor | None = None
    each = iter(tiles)
    for top in grid.tops:
        row: Tensor | None = None
        for left in grid.lefts:
            made = next(each)
            row = made.new_zeros(len(made), tile, width) if row is None else row
            _lay(row.transpose(1, 2), made.transpose(1, 2), left * scale, overlap)
        assert row is not None
        picture = row.new_zeros(len(row), height, width) if picture is None else picture
        _lay(picture, row, top * scale, overlap)
    assert picture is not None
    return picture


def _lay(canvas: Tensor, strip: Tensor, start: int, overlap: int) -> None:
    """Put ``strip`` into ``canvas`` along their second axis; from the second strip on, its beginning is a ramp.

    Only a start of 0 is the first: one before the border is blended with the black that it lies on.
    """
    ramp = overlap if start else 0
    first, last = max(start, 0), min(start + strip.shape[1], canvas.shape[1])
    body = max(start + ramp, 0)
    canvas_before = canvas[:, first:body].clone()
    canvas[:, first:last] = strip[:, first - start : last - start]
    if body > first:
        weights = torch.arange(first - start, body - start, device=strip.device, dtype=torch.int32) * 255 // ramp
        canvas[:, first:body] = _blend(canvas_before, strip[:, first - start : body - start], weights[None, :, None])


def _blend(below: Tensor, above: Tensor, weights: Tensor) -> Tensor:
    """Bytes mixed by weights of 0..255 as Pillow does: the sum over 255, rounded by its shifts."""
    mixed = below.int() * (255 - weights) + above.int() * weights + 128
    return (((mixed >> 8) + mixed) >> 8).byte()
