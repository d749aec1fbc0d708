"""Every sampler on every schedule: ``python -m tools.tiny.sampler_sheet`` draws one prompt with each valid pair.

A cell shows the first of the unseen prompts at twenty steps; its score is the classifier's over all prompts of the
pair, which are drawn in one batch. A second table scores the samplers of ``CLOSE`` on Simple over many more prompts.
Everything goes through the engine.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from lightweight_engine import Config, LightweightEngine
from lightweight_engine.core.images import to_images
from lightweight_engine.labels import AUTOMATIC, sampler_labels, scheduler_labels

from .captions import Caption
from .classifier import WEIGHTS, Classifier, attributes_in, load_classifier
from .evaluate import score, unseen_prompts
from .files import TINY

log = logging.getLogger("tiny")

CLOSE = ("Euler", "Heun", "DPM++ 2M", "DPM2", "LMS", "IPNDM", "DEIS", "HeunPP2")
CELL, MARGIN, HEAD = 96, 130, 34


def draw_prompts(
    engine: LightweightEngine,
    prompts: Sequence[str],
    *,
    sampler: str,
    scheduler: str,
    steps: int,
    seed: int,
    batch: int,
    side: int,
) -> list[Image.Image]:
    """One picture for each prompt, with seeds counting up."""
    images: list[Image.Image] = []
    for first in range(0, len(prompts), batch):
        part = prompts[first : first + batch]
        request = engine.request(
            sampler=sampler,
            scheduler=scheduler,
            steps=steps,
            seed=seed + first,
            distilled_cfg_scale=3.5,
            width=side,
            height=side,
            num_outputs=len(part),
            batch_size=len(part),
            noise_source="CPU",
        )
        images += to_images(engine.draw(request, part).pixels)
    return images


def contact_sheet(
    cells: dict[tuple[str, str], tuple[Image.Image, float]], rows: Sequence[str], columns: Sequence[str]
) -> Image.Image:
    """Samplers down, schedules across, each picture with its score."""
    page = Image.new("RGB", (MARGIN + CELL * len(columns), HEAD + (CELL + 14) * len(rows)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for x, scheduler in enumerate(columns):
        pen.text((MARGIN + CELL * x + 4, 12), scheduler, fill="black", font=font)
    for y, sampler in enumerate(rows):
        top = HEAD + (CELL + 14) * y
        pen.text((4, top + CELL // 2 - 6), sampler, fill="black", font=font)
        for x, scheduler in enumerate(columns):
            image, value = cells[sampler, scheduler]
            page.paste(image.resize((CELL - 2, CELL - 2), Image.Resampling.LANCZOS), (MARGIN + CELL * x, top))
            pen.text((MARGIN + CELL * x + 34, top + CELL - 1), f"{value:.0%}", fill="black", font=font)
    return page


def table(cells: dict[tuple[str, str], tuple[Image.Image, float]], rows: Sequence[str], columns: Sequence[str]) -> str:
    """The scores as a Markdown table."""
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for sampler in rows:
        values = (f"{cells[sampler, scheduler][1]:.0%}" for scheduler in columns)
        lines.append(f"| {sampler} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def scored(images: Sequence[Image.Image], prompts: Sequence[Caption], classifier: Classifier) -> float:
    return score([p.named for p in prompts], attributes_in(classifier, images))["all"]


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=TINY)
    parser.add_argument("--classifier", type=Path, default=WEIGHTS)
    parser.add_argument("--out", type=Path, default=Path("docs/tiny"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=16, help="prompts that score a cell")
    parser.add_argument(
        "--close-prompts", type=int, default=200, help="prompts that score the samplers of the second table"
    )
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--side", type=int, default=256, help="of the pictures, in pixels")
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args()
    engine = LightweightEngine(Config(models_dir=args.models, tokenizer_dirs=(TINY,)))
    engine.setup()
    classifier = load_classifier(args.classifier, torch.device("cpu"))
    prompts = unseen_prompts(max(args.prompts, args.close_prompts), args.seed)
    rows = sampler_labels()
    columns = [label for label in scheduler_labels() if label != AUTOMATIC]

    def measure(sampler: str, scheduler: str, count: int) -> tuple[Image.Image, float]:
        part = prompts[:count]
        images = draw_prompts(
            engine,
            [p.text for p in part],
            sampler=sampler,
            scheduler=scheduler,
            steps=args.steps,
            seed=args.seed,
            batch=args.batch,
            side=args.side,
        )
        return images[0], scored(images, part, classifier)

    cells = {
        (sampler, scheduler): measure(sampler, scheduler, args.prompts) for sampler in rows for scheduler in columns
    }
    close: dict[str, Any] = {sampler: measure(sampler, "Simple", args.close_prompts)[1] for sampler in CLOSE}
    args.out.mkdir(parents=True, exist_ok=True)
    contact_sheet(cells, rows, columns).save(args.out / "samplers.png")
    report = {
        "prompt": prompts[0].text,
        "steps": args.steps,
        "side": args.side,
        "prompts_per_cell": args.prompts,
        "cells": {f"{sampler} / {scheduler}": value for (sampler, scheduler), (_, value) in cells.items()},
        "close_prompts": args.close_prompts,
        "close_on_simple": close,
        "close_spread": round(max(close.values()) - min(close.values()), 4),
    }
    (args.out / "samplers.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    log.info("%s\n\n%s", table(cells, rows, columns), json.dumps(close | {"spread": report["close_spread"]}))


if __name__ == "__main__":
    main()
