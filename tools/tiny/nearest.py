"""Is a picture the copy of a training drawing? ``python -m tools.tiny.nearest`` shows the nearest drawing of some.

The drawings of every training set are made again from their seeds. Candidates are found on pictures of 32 x 32 and
compared in full. As a yardstick, the same distance is given for drawings of a set that training never saw.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .data import Drawings
from .draw import sheet, training_drawing
from .evaluate import unseen_prompts
from .files import TINY
from .sampling import engine_sampler

log = logging.getLogger("tiny")
SIDE = (256, 256)

TRAINING_SETS = ("11:64000", "3:40000")
"""Seed and size of the sets that the shipped transformer learned from."""


def _small(images: Sequence[Image.Image]) -> torch.Tensor:
    return torch.stack(
        [
            torch.from_numpy(np.asarray(i.resize((32, 32), Image.Resampling.BOX)).copy()).float().flatten()
            for i in images
        ]
    )


def nearest_drawings(
    images: Sequence[Image.Image], drawings: Drawings, keep: int = 24
) -> list[tuple[Image.Image, float]]:
    """For each picture the nearest training drawing of its size, and the mean difference per pixel and channel, 0..255.

    Candidates are found on pictures of 32 x 32 and compared in full.
    """
    bucket = drawings.buckets[images[0].size]
    wanted = _small(images)
    parts = (torch.from_numpy(bucket.images[i : i + 256]).permute(0, 3, 1, 2) for i in range(0, bucket.ready, 256))
    small = torch.cat([F.adaptive_avg_pool2d(part.float(), 32).permute(0, 2, 3, 1).flatten(1) for part in parts])
    found = []
    for image, near in zip(
        images, torch.cdist(wanted, small, p=1).topk(min(keep, len(small)), largest=False).indices, strict=True
    ):
        pixels = np.asarray(image).astype(np.int16)
        distances = {int(i): float(np.abs(bucket.images[int(i)].astype(np.int16) - pixels).mean()) for i in near}
        best = min(distances, key=lambda i: distances[i])
        found.append((Image.fromarray(bucket.images[best].copy()), round(distances[best], 2)))
    return found


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=TINY)
    parser.add_argument("--out", type=Path, default=Path("docs/tiny"))
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument(
        "--sets", nargs="+", default=list(TRAINING_SETS), metavar="SEED:COUNT", help="drawings of all sizes in training"
    )
    parser.add_argument("--search", type=int, help="stop drawing after so many of a set; left out, all of this size")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=5, help="of the prompts, as in evaluate")
    args = parser.parse_args()
    sets = [(int(seed), int(count)) for seed, _, count in (each.partition(":") for each in args.sets)]
    drawings = Drawings(sets[0][1], sets[0][0], workers=args.workers, only=SIDE)  # draws while the engine does
    prompts = [prompt.text for prompt in unseen_prompts(args.count, args.seed)]
    images = engine_sampler(args.models)(prompts, args.seed)
    fresh_seed = 1 + max(seed for seed, _ in sets)
    fresh = [training_drawing(fresh_seed, i, SIDE, held_out=True).image for i in range(args.count)]
    found, searched = [], {}
    for i, (seed, count) in enumerate(sets):
        drawings = drawings if i == 0 else Drawings(count, seed, workers=args.workers, only=SIDE)
        drawings.wait(args.search)
        found.append(nearest_drawings([*images, *fresh], drawings))
        searched[str(seed)] = drawings.ready
        drawings.close()
    best = [min(rows, key=lambda row: row[1]) for rows in zip(*found, strict=True)]
    near, usual = best[: args.count], best[args.count :]
    report = {
        "searched_by_seed": searched,
        "mean_difference": [distance for _, distance in near],
        "of_fresh_drawings": [distance for _, distance in usual],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    page = sheet([*images, *(drawing for drawing, _ in near)], args.count)
    page.resize((page.width // 2, page.height // 2), Image.Resampling.LANCZOS).save(args.out / "nearest.png")
    (args.out / "nearest.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    log.info("%s", report)


if __name__ == "__main__":
    main()
