"""The autoencoder that stands in for the real one in goldens of pictures: means of 8x8 pixels, repeated."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def fake_encode(pixels: Tensor) -> Tensor:
    """Pixels ``[B, 3, H, W]`` in 0..1 to ``[B, 16, H//8, W//8]``."""
    means = F.avg_pool2d(pixels * 2 - 1, 8)
    return torch.cat([means] * 5 + [means[:, :1]], dim=1)
