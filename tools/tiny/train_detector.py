"""Train a detector: ``python -m tools.tiny.train_detector face`` (or ``hand``; two minutes on a GPU).

Drawings of people, with hats and at night too, and of nobody, at many sizes in the frame; some of them softened by the
autoencoder, as generated pictures are.
"""

from __future__ import annotations

import argparse
import logging
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightweight_engine.extensions.yolov8 import NORM_MOMENTUM, YOLOv8
from lightweight_engine.flux.autoencoder import Autoencoder

from .data import KINDS, Batches, Drawings
from .detector import SIDE, SIZES, load_detector, loss_of, save_detector
from .draw import Drawing, empty_drawing, training_drawing
from .extras import HAT, NIGHT
from .files import TINY, load
from .train_classifier import softened
from .training import Course, best_device, save_history

PADDING = 114 / 255  # what detectors fill the rest of their square with
SMALLEST, LARGEST = 0.35, 1.3  # the longer side of a picture, as a share of the square
SOFTENED = 0.4
SEEN = 1 / 3  # of a box, for it to count
AVERAGE = 0.998


def detector_drawing(seed: int, number: int, size: tuple[int, int], *, nobody: int = 7) -> Drawing:
    """Half as people are without LoRAs, the rest with extras; one in ``nobody`` shows none."""
    if number % nobody == 0:
        return empty_drawing(seed, number, size)
    return training_drawing(seed, number, size, extras=((), (), (), (HAT,), (NIGHT,), (HAT, NIGHT))[number % 6])


class Source:
    """Batches of pictures in the detector's square, with their boxes."""

    def __init__(
        self, drawings: Drawings, kind: str, autoencoder: Autoencoder, seed: int, softened: float = SOFTENED
    ) -> None:
        self._drawings, self._sizes, self._softened = drawings, Batches(drawings, seed), softened
        self._kind, self._autoencoder = KINDS.index(kind), autoencoder
        self._rng = np.random.default_rng(seed)

    def __call__(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels ``[B, 3, SIDE, SIDE]``, boxes ``[B, G, 4]`` and whether each is there."""
        bucket = self._drawings.buckets[self._sizes.size()]
        rows = np.sort(self._rng.integers(bucket.ready, size=batch))
        pixels = torch.from_numpy(bucket.images[rows]).to(device).permute(0, 3, 1, 2).float() / 255
        marks = torch.from_numpy(bucket.marks[rows]).to(device)
        if self._rng.random() < self._softened:
            pixels = softened(pixels, self._autoencoder)
        pixels, boxes = placed(varied(pixels), marks[..., 1:])
        boxes, there = cut(boxes)
        return pixels, boxes, there & (marks[..., 0] == self._kind)


def varied(pixels: Tensor) -> Tensor:
    """Blurred, lit and noisy by lot."""
    if torch.rand(()) < 0.4:
        share, size = 0.4 + 0.6 * float(torch.rand(())), pixels.shape[-2:]
        pixels = F.interpolate(pixels, scale_factor=share, mode="bilinear", antialias=True)
        pixels = F.interpolate(pixels, size, mode="bilinear")
    rows = (len(pixels), 3, 1, 1)
    light = 1 + 0.08 * torch.randn(rows, device=pixels.device)
    noise = torch.rand(rows, device=pixels.device) * 0.03 * torch.randn_like(pixels)
    return (pixels * light + noise).clamp(0, 1)


def placed(pixels: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Each picture somewhere in the square, larger or smaller, mirrored by lot; and its boxes ``[B, G, 4]`` there."""
    count, _, height, width = pixels.shape
    device, longer = pixels.device, max(height, width)
    scale = SIDE / longer * (SMALLEST + (LARGEST - SMALLEST) * torch.rand(count, 1, device=device))
    size = torch.tensor([[width, height]], device=device)
    room = SIDE - size * scale
    offset = room * torch.rand(count, 2, device=device)
    mirrored = torch.rand(count, device=device) < 0.5
    sign = torch.where(mirrored, -1.0, 1.0)
    # From places in the square, -1..1, to places in the picture: how much larger, and where the middle goes.
    larger = SIDE / (size * scale)
    middle = 2 * (SIDE / 2 - offset - size * scale / 2) / (size * scale)
    theta = torch.zeros(count, 2, 3, device=device)
    theta[:, 0, 0], theta[:, 1, 1] = sign * larger[:, 0], larger[:, 1]
    theta[:, 0, 2], theta[:, 1, 2] = sign * middle[:, 0], middle[:, 1]
    grid = F.affine_grid(theta, [count, 3, SIDE, SIDE], align_corners=False)
    out = F.grid_sample(pixels - PADDING, grid, mode="bilinear", align_corners=False) + PADDING
    left, top, right, bottom = boxes.unbind(-1)
    left, right = (torch.where(mirrored[:, None], width - b, a) for a, b in ((left, right), (right, left)))
    boxes = torch.stack((left, top, right, bottom), dim=-1) * scale[..., None] + offset.repeat(1, 2)[:, None]
    return out, boxes


def cut(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes cut to the square, and whether enough of each is left."""
    inside = boxes.clamp(0, SIDE)
    before, after = ((b[..., 2:] - b[..., :2]).prod(-1) for b in (boxes, inside))
    return inside, after > SEEN * before


@torch.no_grad()
def measure_norms(network: YOLOv8, source: Source, batch: int, device: torch.device, rounds: int = 60) -> None:
    """Take the statistics of the norms anew: those of training belong to other weights than their average."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over all batches
    network.train()
    for _ in range(rounds):
        network(source(batch, device)[0])
    for norm in norms:
        norm.momentum = NORM_MOMENTUM
    network.eval()


@torch.no_grad()
def running_average(averages: list[Tensor], current: list[Tensor], steps: Tensor | int) -> None:
    """Follows quickly at first, so that a short training leaves nothing of its beginning."""
    torch._foreach_lerp_(averages, current, 1 - min(AVERAGE, (1 + int(steps)) / (10 + int(steps))))  # type: ignore[attr-defined]


def train(
    kind: str, source: Source, out: Path, *, seconds: float, batch: int, lr: float, resume: bool = False
) -> YOLOv8:
    """Train from the beginning, or go on from the weights below ``out`` with the norms as they are."""
    device = best_device()
    network = (load_detector(kind, out) if resume else YOLOv8(SIZES)).to(device).train(not resume)
    averaged = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=running_average)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=lr, weight_decay=0.02)
    course = Course(seconds, lr=lr)
    while course.progress < 1:
        pixels, boxes, there = source(batch, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            raw = network(pixels)
        loss, parts = loss_of(network, raw, boxes, there)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 10.0)
        for group in optimizer.param_groups:
            group["lr"] = course.rate()
        optimizer.step()
        averaged.update_parameters(network)
        course.count(loss=loss, **parts)
        course.note(kind, 100)
    course.note(kind)
    result: YOLOv8 = averaged.module.requires_grad_(False)  # type: ignore[assignment]
    if not resume:
        measure_norms(result, source, batch, device)
    save_detector(result, kind, out)
    save_history(out / "history.json", f"{kind} detector", course)
    return result


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--models", type=Path, default=TINY, help="where the autoencoder lies")
    parser.add_argument("--out", type=Path, default=Path("outputs/tiny"))
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--drawings", type=int, default=7_000)
    parser.add_argument("--nobody", type=int, default=7, metavar="N", help="one drawing in N shows nobody")
    parser.add_argument("--softened", type=float, default=SOFTENED, help="share that goes through the autoencoder")
    parser.add_argument("--workers", type=int, help="processes that draw")
    parser.add_argument("--seed", type=int, default=41)
    parser.add_argument("--resume", action="store_true", help="go on from saved weights")
    args = parser.parse_args()
    draw = partial(detector_drawing, nobody=args.nobody)
    drawings = Drawings(args.drawings, args.seed, workers=args.workers, draw=draw, texts=False)
    device = best_device()
    torch.manual_seed(args.seed)
    autoencoder: Autoencoder = load("autoencoder", args.models, device).requires_grad_(False)  # type: ignore[assignment]
    if device.type == "cuda":
        autoencoder.to(torch.bfloat16)
    drawings.wait(min(drawings.count, 1024))
    source = Source(drawings, args.kind, autoencoder, args.seed, args.softened)
    train(args.kind, source, args.out, seconds=args.seconds, batch=args.batch, lr=args.lr, resume=args.resume)
    drawings.close()


if __name__ == "__main__":
    main()
