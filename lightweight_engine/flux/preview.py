"""A quick look at a latent: a linear map from its 16 channels to colour, at one pixel a cell.

The map is fitted once to whichever autoencoder is loaded, on colour fields drawn here, so that no table of another
model is needed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .autoencoder import Autoencoder


def colour_fields(count: int, size: int, seed: int = 0) -> Tensor:
    """Pictures ``[count, 3, size, size]`` in 0..1: blends of random colours, from broad to fine."""
    generator = torch.Generator().manual_seed(seed)
    fields = []
    for index in range(count):
        cells = 2 ** (1 + index % 4)
        colours = torch.rand(1, 3, cells, cells, generator=generator)
        fields.append(F.interpolate(colours, size=(size, size), mode="bilinear", align_corners=True))
    return torch.cat(fields)


class Preview:
    """The map of one autoencoder: ``rgb = latent @ weight + bias``."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight = weight
        self.bias = bias

    @classmethod
    @torch.inference_mode()
    def fit(cls, autoencoder: Autoencoder, count: int = 8, size: int = 128) -> Preview:
        """Least squares from latents to the mean colour of the pixels that each cell stands for."""
        reference = autoencoder.encoder.conv_in.weight
        pixels = colour_fields(count, size)
        moments = autoencoder.encoder(2 * pixels.to(reference) - 1)
        latents = autoencoder.sample(moments, torch.zeros_like(moments[:, : moments.shape[1] // 2])).float().cpu()
        colours = F.avg_pool2d(pixels, autoencoder.params.factor)
        rows = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
        rows = torch.cat((rows, torch.ones(len(rows), 1)), dim=1)
        solution = torch.linalg.lstsq(rows, colours.permute(0, 2, 3, 1).reshape(-1, 3)).solution
        return cls(solution[:-1].to(reference.device), solution[-1].to(reference.device))

    def __call__(self, latent: Tensor) -> Tensor:
        """Latents ``[B, 16, h, w]`` to pixels ``[B, 3, h, w]`` in 0..1."""
        rgb = latent.float().permute(0, 2, 3, 1) @ self.weight + self.bias
        return rgb.permute(0, 3, 1, 2).clamp(0, 1)
