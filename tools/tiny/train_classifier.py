"""Train the attribute classifier: ``python -m tools.tiny.train_classifier --seconds 50``.

A part of the pictures it learns from went through the autoencoder, with a little noise on the latent, so that it judges
what is drawn and not how crisply. Reports its accuracy on drawings of combinations that were kept from training.
"""

from __future__ import annotations

import argparse
import json
import logging
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lightweight_engine.flux.autoencoder import Autoencoder

from .classifier import EXTRAS_WEIGHTS, PEOPLE, SIDE, WEIGHTS, WITH_EXTRAS, Classifier, Heads, resized, save_classifier
from .data import Batches, Drawings
from .draw import Drawing, training_drawing
from .extras import HAT, NIGHT
from .files import load
from .training import Course, best_device, save_history

log = logging.getLogger("tiny")


@torch.no_grad()
def softened(pixels: Tensor, autoencoder: Autoencoder) -> Tensor:
    """Through the autoencoder, with a little noise on the latent."""
    dtype = autoencoder.decoder.conv_in.weight.dtype
    shape = (len(pixels), autoencoder.params.z_channels, pixels.shape[2] // 8, pixels.shape[3] // 8)
    latent = autoencoder.encode(pixels.to(dtype), torch.zeros(shape, device=pixels.device, dtype=dtype))
    return autoencoder.decode(latent + 0.1 * torch.randn_like(latent)).float().clamp(0, 1)


@torch.no_grad()
def varied(pixels: Tensor) -> Tensor:
    """To the classifier's size by way of a smaller one, as crispness must tell nothing; mirrored, moved, lit by lot."""
    side = int(torch.randint(SIDE * 3 // 4, SIDE + 1, ()))
    small = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
    pixels = F.interpolate(small, (SIDE + 8, SIDE + 8), mode="bilinear")
    top, left = (int(place) for place in torch.randint(0, 9, (2,)))
    pixels = pixels[..., top : top + SIDE, left : left + SIDE]
    if torch.rand(()) < 0.5:
        pixels = pixels.flip(-1)
    rows = (len(pixels), 1, 1, 1)
    light = 1 + 0.06 * torch.randn(rows, device=pixels.device)
    shift = 0.02 * torch.randn(rows, device=pixels.device)
    noise = torch.rand(rows, device=pixels.device) * 0.04 * torch.randn_like(pixels)
    return (pixels * light + shift + noise).clamp(0, 1)


def train(drawings: Drawings, out: Path, path: Path, *, seconds: float, batch: int, seed: int,
          told: Heads = PEOPLE, autoencoder: Autoencoder | None = None) -> Classifier:  # fmt: skip
    """Train on drawings, a part of them through the autoencoder if there is one."""
    device = best_device()
    torch.manual_seed(seed)
    network = Classifier(told).to(device, memory_format=torch.channels_last)
    batches = Batches(drawings, seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.02)
    course = Course(seconds, lr=2e-3)
    while course.progress < 1:
        pixels, labels = batches.block(batch, device)
        if autoencoder is not None and course.steps % 2:
            pixels = softened(pixels, autoencoder)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            scores = network(varied(pixels).contiguous(memory_format=torch.channels_last))
        loss = sum(F.cross_entropy(scores[name].float(), labels[:, i], ignore_index=-1) for i, name in enumerate(told))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 2.0)
        for group in optimizer.param_groups:
            group["lr"] = course.rate()
        optimizer.step()
        course.count(loss=loss)
        course.note("classifier", 100)
    course.note("classifier")
    save_classifier(network, path)
    save_history(out / "history.json", "classifier", course)
    return network.eval()


@torch.no_grad()
def accuracy(network: Classifier, drawings: Drawings, autoencoder: Autoencoder | None = None) -> dict[str, float]:
    """The share of held-out drawings in which each attribute is found; through the autoencoder if one is given."""
    device = next(network.parameters()).device
    right: dict[str, list[float]] = {name: [] for name in network.told}
    for bucket in drawings.buckets.values():
        for first in range(0, bucket.ready, 64):
            pixels = torch.from_numpy(bucket.images[first : first + 64]).to(device).permute(0, 3, 1, 2).float() / 255
            if autoencoder is not None:
                dtype = autoencoder.decoder.conv_in.weight.dtype
                noise = torch.zeros(
                    len(pixels), 16, pixels.shape[2] // 8, pixels.shape[3] // 8, device=device, dtype=dtype
                )
                pixels = autoencoder.decode(autoencoder.encode(pixels.to(dtype), noise)).float()
            labels = torch.from_numpy(bucket.labels[first : first + 64]).to(device).long()
            scores = network(resized(pixels))
            for i, name in enumerate(network.told):
                shown = labels[:, i] >= 0
                right[name] += (scores[name].argmax(-1) == labels[:, i])[shown].float().tolist()
    return {name: round(sum(rows) / max(1, len(rows)), 4) for name, rows in right.items()}


def with_any_extras(seed: int, number: int, size: tuple[int, int], *, held_out: bool = False) -> Drawing:
    """As many without extras as with a hat, at night, and both."""
    return training_drawing(seed, number, size, held_out, ((), (HAT,), (NIGHT,), (HAT, NIGHT))[number % 4])


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("outputs/tiny"), help="where the autoencoder lies")
    parser.add_argument("--out", type=Path, default=Path("outputs/tiny"))
    parser.add_argument("--weights", type=Path, help="where to write; otherwise beside the classifier")
    parser.add_argument("--extras", action="store_true", help="train the one that knows hats and nights")
    parser.add_argument("--seconds", type=float, default=50)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--drawings", type=int, default=24_000)
    parser.add_argument("--held-out", type=int, default=2_000)
    parser.add_argument("--workers", type=int, help="processes that draw")
    parser.add_argument("--seed", type=int, default=2)
    args = parser.parse_args()
    draw, told, weights = None, PEOPLE, WEIGHTS
    if args.extras:
        draw, told, weights = with_any_extras, WITH_EXTRAS, EXTRAS_WEIGHTS
    unseen = Drawings(args.held_out, args.seed + 1000, held_out=True, workers=args.workers, texts=False,
                      draw=draw and partial(draw, held_out=True))  # fmt: skip
    drawings = Drawings(args.drawings, args.seed, workers=args.workers, texts=False, draw=draw)
    drawings.wait(min(drawings.count, 4096))
    autoencoder: Autoencoder = load("autoencoder", args.models, best_device()).to(torch.bfloat16)  # type: ignore[assignment]
    network = train(drawings, args.out, args.weights or weights, seconds=args.seconds, batch=args.batch, seed=args.seed,
                    told=told, autoencoder=autoencoder if args.extras else None)  # fmt: skip
    unseen.wait()
    report(network, unseen, autoencoder, (args.weights or weights).with_suffix(".json"))  # type: ignore[arg-type]
    drawings.close()
    unseen.close()


def report(network: Classifier, unseen: Drawings, autoencoder: Autoencoder, path: Path) -> None:
    """Write and log the accuracy on held-out drawings, as drawn and through the autoencoder."""
    figures = {
        "drawings": accuracy(network, unseen),
        "reconstructed": accuracy(network, unseen, autoencoder),
        "count": unseen.ready,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    log.info("classifier on held-out drawings: %s", figures)


if __name__ == "__main__":
    main()
