"""Train the 4x upscaler on drawings: ``python -m tools.tiny.train_upscaler --seconds 150``.

Cuts of large drawings are made small in several ways, and the network learns to undo it: the mean absolute difference,
of which the slopes are a part so that lines come out sharp. No adversary: nothing is made up.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import Bucket, Drawings
from .train_autoencoder import slopes
from .train_classifier import with_any_extras
from .training import Course, best_device, save_history
from .upscaler import SCALE, RRDBNet, load_upscaler, save_upscaler

# (width, height) -> share. Large ones are what comes of upscaling a finished picture; they cost the most to draw.
SIZES: dict[tuple[int, int], float] = {
    (1024, 1024): 0.2,
    (768, 768): 0.15,
    (512, 512): 0.3,
    (384, 384): 0.2,
    (256, 256): 0.15,
}
CROP = 128  # pixels of the large side
SLOPE_WEIGHT = 0.5
AVERAGE = 0.999


class Cuts:
    """Cuts of pictures of all sizes, each at a place of its own; bare background comes seldom."""

    def __init__(self, drawings: Drawings, seed: int) -> None:
        self._buckets = list(drawings.buckets.values())
        self._rng = np.random.default_rng(seed)

    def __call__(self, count: int, device: torch.device) -> Tensor:
        """Pixels ``[B, 3, CROP, CROP]`` in 0..1."""
        cuts = np.stack([self._cut(self._buckets[i]) for i in self._rng.integers(len(self._buckets), size=count)])
        return torch.from_numpy(cuts).to(device).permute(0, 3, 1, 2).float() / 255

    def _cut(self, bucket: Bucket) -> np.ndarray:
        cut = np.empty(0)
        for _ in range(4):
            picture = bucket.images[self._rng.integers(bucket.ready)]
            top, left = (self._rng.integers(side - CROP + 1) for side in picture.shape[:2])
            cut = picture[top : top + CROP, left : left + CROP]
            if np.ptp(cut[::16, ::16], axis=(0, 1)).max() > 40:
                break
        return cut


def made_small(pixels: Tensor) -> Tensor:
    """A quarter of the size, by area, bicubic or bilinear with antialiasing, rounded to bytes as files are."""
    way = int(torch.randint(3, ()))
    if way == 0:
        small = F.avg_pool2d(pixels, SCALE)
    else:
        mode = ("bicubic", "bilinear")[way - 1]
        small = F.interpolate(pixels, scale_factor=1 / SCALE, mode=mode, antialias=True, align_corners=False)
    return (small.clamp(0, 1) * 255).round() / 255


def turned(pixels: Tensor) -> Tensor:
    """Mirrored and turned by lot."""
    if torch.rand(()) < 0.5:
        pixels = pixels.flip(-1)
    return pixels.transpose(-1, -2) if torch.rand(()) < 0.5 else pixels


def difference(out: Tensor, wanted: Tensor) -> Tensor:
    edges = sum(
        ((a - b).abs().mean() for a, b in zip(slopes(out), slopes(wanted), strict=True)),
        torch.zeros((), device=out.device),
    )
    return (out - wanted).abs().mean() + SLOPE_WEIGHT * edges


def train(drawings: Drawings, out: Path, *, seconds: float, batch: int, lr: float, seed: int, resume: bool) -> RRDBNet:
    device = best_device()
    torch.manual_seed(seed)
    path = out / "ESRGAN" / "4x_tiny.safetensors"
    network = (load_upscaler(path) if resume else RRDBNet()).requires_grad_(True)
    network = network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    averaged = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(AVERAGE)
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    drawings.wait(min(drawings.count, 256))
    cuts, course = Cuts(drawings, seed), Course(seconds, lr=lr)
    while course.progress < 1:
        wanted = turned(cuts(batch, device))
        small = made_small(wanted).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            found = network(small)
        loss = difference(found.float(), wanted)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = course.rate()
        optimizer.step()
        averaged.update_parameters(network)
        course.count(loss=loss, mse=F.mse_loss(found.detach().float(), wanted))
        course.note("upscaler", 200)
    course.note("upscaler")
    result: RRDBNet = averaged.module.eval().requires_grad_(False)  # type: ignore[assignment]
    save_upscaler(result, path)
    save_history(out / "history.json", "upscaler", course)
    return result


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/tiny"))
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--drawings", type=int, default=3_000)
    parser.add_argument("--workers", type=int, help="processes that draw")
    parser.add_argument("--seed", type=int, default=31)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    drawings = Drawings(args.drawings, args.seed, workers=args.workers, draw=with_any_extras, sizes=SIZES, texts=False)
    train(drawings, args.out, seconds=args.seconds, batch=args.batch, lr=args.lr, seed=args.seed, resume=args.resume)
    drawings.close()


if __name__ == "__main__":
    main()
