"""The autoencoder in tiles, for pictures whose features do not fit: the mean of three tilings, as the reference has it.

Tiles of three shapes put the seams in different places; inside one tiling, neighbours are blended linearly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .autoencoder import Autoencoder

Tile = tuple[int, int]


def _spans(size: int, tile: int, overlap: int) -> Iterator[tuple[int, int]]:
    """(start, length) of the tiles along one side."""
    for start in range(0, size, tile - overlap):
        start = max(0, min(size - overlap, start))
        yield start, min(tile, size - start)


def _feather(size: int, ramp: int) -> Tensor:
    """Weights ``[size]``: 1 inside, (t+1)/ramp towards both ends, the picture's own borders included."""
    weight = torch.ones(size)
    for t in range(min(ramp, size)):
        weight[t] *= (t + 1) / ramp
        weight[size - 1 - t] *= (t + 1) / ramp
    return weight


def _tiling(function: Callable[[Tensor], Tensor], x: Tensor, tile: Tile, overlap: int, scale: float) -> Tensor:
    """``function`` over one picture ``[1, C, H, W]`` in tiles; its output is ``scale`` times as large."""
    height, width = (round(side * scale) for side in x.shape[-2:])
    ramp = round(overlap * scale)
    total, weights = None, torch.zeros(1, 1, height, width, device=x.device)
    for top, rows in _spans(x.shape[-2], tile[0], overlap):
        for left, columns in _spans(x.shape[-1], tile[1], overlap):
            out = function(x[..., top : top + rows, left : left + columns]).float()
            weight = (_feather(out.shape[-2], ramp)[:, None] * _feather(out.shape[-1], ramp)).to(out.device)
            if total is None:
                total = torch.zeros(1, out.shape[1], height, width, device=out.device)
            y, x_ = round(top * scale), round(left * scale)
            place = (..., slice(y, y + out.shape[-2]), slice(x_, x_ + out.shape[-1]))
            total[place] += out * weight
            weights[place] += weight
    assert total is not None
    return total / weights


def _mean_of_three(
    function: Callable[[Tensor], Tensor], x: Tensor, shapes: tuple[Tile, Tile, Tile], overlap: int, scale: float
) -> Tensor:
    pictures = []
    for picture in x.split(1):
        first, second, third = (_tiling(function, picture, shape, overlap, scale) for shape in shapes)
        pictures.append((first + second + third) / 3.0)
    return torch.cat(pictures)


def decode_tiled(model: Autoencoder, latent: Tensor, tile: Tile = (64, 64), overlap: int = 16) -> Tensor:
    """Latents ``[B, 16, h, w]`` to pixels in 0..1, in tiles of ``tile`` (h, w) latent cells."""
    dtype = model.decoder.conv_in.weight.dtype
    rows, columns = tile
    shapes = ((rows * 2, columns // 2), (rows // 2, columns * 2), (rows, columns))
    z = model.to_decoder(latent).to(dtype)
    mean = _mean_of_three(lambda part: model.decoder(part).float() + 1.0, z, shapes, overlap, model.params.factor)
    return (mean / 2.0).clamp(0.0, 1.0)


def encode_tiled(
    model: Autoencoder,
    pixels: Tensor,
    draw: Callable[[tuple[int, ...]], Tensor],
    tile: Tile = (512, 512),
    overlap: int = 64,
) -> Tensor:
    """Pixels ``[B, 3, H, W]`` in 0..1 to latents, in tiles of ``tile`` pixels; ``draw(shape)`` is called per tile."""
    rows, columns = tile
    shapes = ((rows, columns), (rows // 2, columns * 2), (rows * 2, columns // 2))

    def encode(part: Tensor) -> Tensor:
        moments = model.moments(part)
        return model.sample(moments, draw((len(part), moments.shape[1] // 2, *moments.shape[2:])).to(moments))

    return _mean_of_three(encode, pixels, shapes, overlap, 1 / model.params.factor)
