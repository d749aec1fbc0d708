"""Between pictures and latents: start pictures encoded, finished latents decoded, in tiles where the plan says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend.devices import sent
from ..extensions.inpainting import ORIGINAL, latent_mask
from ..flux.autoencoder import Autoencoder
from ..flux.noise import TorchStream, side_seed
from ..flux.tiling import decode_tiled, encode_tiled
from ..upscalers.resampling import to_numbers
from .finite import check_finite

if TYPE_CHECKING:
    from .processing import Batch, Job


@dataclass(frozen=True)
class Start:
    """What a pass starts from beside noise: a latent, and where it is painted (1) or kept (0), ``[B, 1, h, w]``."""

    latent: Tensor | None = None
    mask: Tensor | None = None
    content: int = ORIGINAL


def start_of(job: Job, batch: Batch) -> Start:
    """What a pass starts from: the latents of its pictures, one draw from the posterior for each seed."""
    if job.begin is None:
        return Start()
    job.networks.enter("decode", job.attempt.plan)
    begin, rows = job.begin, range(batch.first, batch.first + len(batch.seeds))
    pictures = [begin.of(row) for row in rows]
    pixels = [to_numbers(each.levels)[None] for each in pictures]
    latents = [
        job.attempt("decode", lambda one=one, seed=seed: encode_pixels(job, one, [seed]))
        for one, seed in zip(pixels, batch.seeds, strict=True)
    ]
    latent = torch.cat([fitted(each, job.cells) for each in latents])
    masks = [
        latent_mask(each.mask, job.cells, round=begin.masking.round, device=job.networks.device)
        for each in pictures
        if each.mask is not None
    ]
    if not masks:
        return Start(latent)
    return Start(latent, torch.stack(masks)[:, None].to(latent), begin.masking.content)


def fitted(latent: Tensor, cells: tuple[int, int]) -> Tensor:
    """A latent at the size of the pass: bilinear, where its picture came at another (resize mode 3)."""
    return latent if tuple(latent.shape[2:]) == cells else F.interpolate(latent, size=cells, mode="bilinear")


def encode_pixels(job: Job, pixels: Tensor, seeds: Sequence[int]) -> Tensor:
    """Latents of pictures ``[B, 3, H, W]`` in 0..1, one after another, each drawn from its posterior by its seed."""
    autoencoder = job.networks.load("autoencoder")
    weight = autoencoder.encoder.conv_in.weight
    latents = []
    for picture, seed in zip(pixels.split(1), seeds, strict=True):
        stream = TorchStream(side_seed(seed), "cpu")
        # The reference draws on the global generator; a stream of the seed makes the picture repeatable.
        draw = torch.randn if job.request.compat == "forge" else stream.randn
        if job.attempt.plan.stage("decode").tiled:
            latents.append(encode_tiled(autoencoder, picture.to(weight), draw).float())
        else:
            moments = autoencoder.moments(picture.to(weight))
            cells = [side // job.networks.autoencoder_factor for side in picture.shape[2:]]
            noise = draw((1, autoencoder.params.z_channels, *cells))  # by the host, while a GPU encodes
            latents.append(autoencoder.sample(moments, sent(noise.to(weight.dtype), weight.device)).float())
    return torch.cat(latents)


def decode_latent(job: Job, latent: Tensor) -> Tensor:
    """Pixels of latents, one picture after another: in tiles where the plan says so."""
    decode = decode_tiled if job.attempt.plan.stage("decode").tiled else Autoencoder.decode
    autoencoder = job.networks.load("autoencoder")
    pixels = torch.cat([decode(autoencoder, picture) for picture in latent.split(1)])
    check_finite(job.networks, "autoencoder", [pixels])
    return pixels
