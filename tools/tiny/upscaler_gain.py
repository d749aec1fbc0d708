"""Does the upscaler beat Lanczos? ``python -m tools.tiny.upscaler_gain``

Held-out drawings are made four times smaller in the two usual ways and enlarged again, by the network and by Lanczos;
both are compared with the drawing.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .draw import sheet
from .train_autoencoder import to_images
from .train_classifier import with_any_extras
from .training import best_device
from .upscaler import SCALE, WEIGHTS, RRDBNet, load_upscaler

log = logging.getLogger("tiny")

WAYS = {"area": Image.Resampling.BOX, "Lanczos": Image.Resampling.LANCZOS}


def decibels(found: Image.Image, wanted: Image.Image) -> float:
    """The peak signal-to-noise ratio."""
    error = float(np.mean((np.asarray(found, np.float64) - np.asarray(wanted, np.float64)) ** 2))
    return 10 * math.log10(255**2 / max(error, 1e-9))


@torch.no_grad()
def upscaled(network: RRDBNet, image: Image.Image) -> Image.Image:
    device = network.conv_first.weight.device
    pixels = torch.from_numpy(np.asarray(image).copy()).to(device).permute(2, 0, 1)[None].float() / 255
    return to_images(network(pixels))[0]


def compare(network: RRDBNet, side: int, way: str, count: int, seed: int) -> tuple[dict[str, Any], list[Image.Image]]:
    """Mean figures over ``count`` drawings of one size, and the last of them: small, Lanczos, network, drawing."""
    rows, images = [], []
    for number in range(count):
        wanted = with_any_extras(seed, number, (side, side), held_out=True).image
        small = wanted.resize((side // SCALE, side // SCALE), WAYS[way])
        plain, found = small.resize((side, side), Image.Resampling.LANCZOS), upscaled(network, small)
        rows.append((decibels(plain, wanted), decibels(found, wanted)))
        images = [small.resize((side, side), Image.Resampling.NEAREST), plain, found, wanted]
    before, after = (float(np.mean(column)) for column in zip(*rows, strict=True))
    better = float(np.mean([b > a for a, b in rows]))
    figures = {
        "lanczos": round(before, 2),
        "network": round(after, 2),
        "gain": round(after - before, 2),
        "better": better,
    }
    return figures, images


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--out", type=Path, default=Path("docs/tiny"))
    parser.add_argument("--count", type=int, default=60, help="drawings of each size")
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--seed", type=int, default=131)
    args = parser.parse_args()
    compared = partial(compare, load_upscaler(args.weights, best_device()), count=args.count, seed=args.seed)
    report: dict[str, Any] = {"count": args.count, "seed": args.seed, "sizes": {}}
    shown: list[Image.Image] = []
    for side in args.sides:
        for way in WAYS:
            figures, images = compared(side, way)
            report["sizes"][f"{side // SCALE} to {side}, {way}"] = figures
            log.info("%d to %d, made small by %s: %s", side // SCALE, side, way, figures)
        shown += [image.resize((256, 256), Image.Resampling.LANCZOS) for image in images] if side == 256 else []
    args.out.mkdir(parents=True, exist_ok=True)
    if shown:
        sheet(shown, 4).save(args.out / "upscaler.png")
    (args.out / "upscaler.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
