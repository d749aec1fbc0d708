"""Train the autoencoder on drawings: ``python -m tools.tiny.train_autoencoder --seconds 210``.

Goes on from the saved weights if ``--resume`` is given. Writes ``VAE/ae.safetensors`` below ``--out``, the history, and
a contact sheet of drawings above what comes out.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lightweight_engine.flux.autoencoder import Autoencoder

from .data import Batches, Drawings
from .draw import sheet
from .files import AUTOENCODER, load, save
from .training import Course, Trainer, best_device, save_history

KL_WEIGHT = 1e-3
EDGE_WEIGHT = 4.0  # how much more a pixel near an edge counts
SLOPE_WEIGHT = 1.0
CROP = 128  # pixels; most of the time goes to many steps on cuts, the rest to whole pictures
CROPS_UNTIL = 0.65


def slopes(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., :, 1:] - x[..., :, :-1], x[..., 1:, :] - x[..., :-1, :]


def near_edges(target: Tensor) -> Tensor:
    """Weights ``[B, 1, H, W]`` with mean 1: larger near lines, which is where eyes, mouths and fingers are."""
    across, down = slopes(target)
    strength = F.pad(across, (0, 1)).abs().amax(1, True) + F.pad(down, (0, 0, 0, 1)).abs().amax(1, True)
    spread = F.avg_pool2d(F.max_pool2d(strength.clamp(max=1), 5, 1, 2), 5, 1, 2)
    weight = 1 + EDGE_WEIGHT * spread
    return weight / weight.mean()


def losses(autoencoder: Autoencoder, pixels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    target = 2 * pixels - 1
    mean, logvar = autoencoder.encoder(target.to(torch.bfloat16)).float().chunk(2, dim=1)
    logvar = logvar.clamp(-20, 10)
    z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
    out = autoencoder.decoder(z.to(torch.bfloat16)).float()
    weight = near_edges(target)
    pixel = (weight * (out - target).abs()).mean()
    slope = sum((a - b).abs().mean() for a, b in zip(slopes(out), slopes(target), strict=True))
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    figures = {
        "pixel": pixel,
        "slope": slope,
        "kl": kl,
        "mse": F.mse_loss(out.clamp(-1, 1), target),
        "sigma": logvar.exp().mean().sqrt(),
    }
    return pixel + SLOPE_WEIGHT * slope + KL_WEIGHT * kl, figures


@torch.no_grad()
def normalise(autoencoder: Autoencoder, batches: Batches, device: torch.device, rounds: int = 24) -> None:
    """Set scale and shift so that latents have mean 0 and variance 1."""
    autoencoder.params = replace(autoencoder.params, scale=1.0, shift=0.0)
    found = []
    for _ in range(rounds):
        pixels, _ = batches.block(32, device)
        found.append(autoencoder.encoder(2 * pixels - 1).chunk(2, dim=1)[0].flatten())
    latents = torch.cat(found)
    scale, shift = round(1 / float(latents.std()), 4), round(float(latents.mean()), 4)
    autoencoder.params = replace(autoencoder.params, scale=scale, shift=shift)


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Pixels ``[B, 3, H, W]`` in 0..1."""
    arrays = (pixels.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(array)) for array in arrays]


@torch.no_grad()
def contact_sheet(
    autoencoder: Autoencoder, drawings: Drawings, path: Path, device: torch.device, count: int = 8
) -> float:
    """Drawings above their reconstructions; returns the signal-to-noise ratio in dB over them."""
    rows, error = [], 0.0
    bucket = drawings.buckets.get((256, 256)) or next(iter(drawings.buckets.values()))
    for first in range(0, min(bucket.ready, 3 * count), count):
        pixels = torch.from_numpy(bucket.images[first : first + count]).to(device).permute(0, 3, 1, 2).float() / 255
        latent = autoencoder.encode(
            pixels, torch.zeros(len(pixels), 16, pixels.shape[2] // 8, pixels.shape[3] // 8, device=device)
        )
        out = autoencoder.decode(latent)
        error += float(F.mse_loss(out, pixels)) / 3
        rows += to_images(pixels) + to_images(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet(rows, count).save(path)
    return -10 * float(np.log10(max(error, 1e-9)))


def train(
    drawings: Drawings, out: Path, *, seconds: float, batch: int, lr: float, seed: int, resume: bool
) -> Autoencoder:
    device = best_device()
    torch.manual_seed(seed)
    autoencoder = load("autoencoder", out) if resume else Autoencoder(AUTOENCODER)
    autoencoder = autoencoder.to(device, memory_format=torch.channels_last)
    drawings.wait(min(drawings.count, 2048))
    batches = Batches(drawings, seed)
    course = Course(seconds, lr=lr)
    trainer = Trainer([autoencoder], course)
    while course.progress < 1:
        whole = course.progress > CROPS_UNTIL
        pixels, _ = batches.block(batch // 3, device) if whole else batches.block(batch, device, CROP)
        loss, figures = losses(autoencoder, pixels.contiguous(memory_format=torch.channels_last))
        trainer.step(loss, **figures)
        course.note("autoencoder", 200)
    course.note("autoencoder")
    trainer.use_averages()
    normalise(autoencoder, batches, device)
    save("autoencoder", autoencoder, out)
    save_history(out / "history.json", "autoencoder", course)
    quality = contact_sheet(autoencoder, drawings, out / "autoencoder.png", device)
    logging.getLogger("tiny").info(
        "autoencoder: %.2f dB, scale %s, shift %s", quality, autoencoder.params.scale, autoencoder.params.shift
    )
    return autoencoder


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/tiny"))
    parser.add_argument("--seconds", type=float, default=210)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--drawings", type=int, default=48_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    drawings = Drawings(args.drawings, args.seed)
    train(drawings, args.out, seconds=args.seconds, batch=args.batch, lr=args.lr, seed=args.seed, resume=args.resume)
    drawings.close()


if __name__ == "__main__":
    main()
