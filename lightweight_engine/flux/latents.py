"""Latents ``[B, 16, h, w]`` (h = H/8, w = W/8) and the tokens ``[B, L, 64]`` that the transformer reads."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def token_count(height: int, width: int) -> int:
    """Tokens of a latent of these cells, each of 2 x 2; ``pack`` pads odd sides to make them whole."""
    return -(-height // 2) * -(-width // 2)


def pack(latent: Tensor) -> Tensor:
    """``[B, C, h, w]`` to ``[B, ceil(h/2)*ceil(w/2), 4*C]``, channels slowest inside a token.

    Odd sizes are padded circularly on the right and bottom, as the reference does.
    """
    height, width = latent.shape[-2:]
    if height % 2 or width % 2:
        latent = F.pad(latent, (0, width % 2, 0, height % 2), mode="circular")
    patches = F.pixel_unshuffle(latent, 2)
    return patches.flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of ``pack`` for a latent of ``height`` x ``width``; padding is cropped."""
    rows, columns = (height + 1) // 2, (width + 1) // 2
    patches = tokens.transpose(1, 2).unflatten(2, (rows, columns))
    return F.pixel_shuffle(patches, 2)[..., :height, :width]
