"""Do the detectors find faces and hands? ``python -m tools.tiny.detector_accuracy``

On held-out drawings with true boxes: the average precision at an overlap of a half. On drawings of nobody: how often
they fire. On generated pictures, which show one face each: how often exactly one is found where faces are.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from lightweight_engine.extensions.detection import Detector
from lightweight_engine.extensions.detectors import DetectorLibrary

from .data import KINDS
from .detector import overlaps
from .draw import SIZES, Drawing, empty_drawing, sheet, training_drawing
from .evaluate import unseen_prompts
from .files import TINY
from .sampling import Family, loop_sampler
from .training import best_device

log = logging.getLogger("tiny")

CONFIDENCE = 0.3  # the detailer's own
LOWEST = 0.01  # from which precision and recall are counted
HIT = 0.5


def any_size(number: int, seed: int) -> tuple[int, int]:
    return list(SIZES)[np.random.default_rng([seed, number, 3]).choice(len(SIZES), p=list(SIZES.values()))]


def found_by(detector: Detector, image: Image.Image, confidence: float = CONFIDENCE) -> tuple[Tensor, Tensor]:
    """Boxes ``[n, 4]`` and scores ``[n]``, the surest first."""
    rows = detector.detect(image, confidence)
    return torch.tensor([row.box for row in rows]).view(-1, 4), torch.tensor([row.score for row in rows])


def average_precision(pictures: Sequence[tuple[Tensor, Tensor, Tensor]]) -> float:
    """The area under precision over recall, precision made falling.

    Args:
        pictures: boxes found ``[n, 4]``, their scores ``[n]``, the surest first, and the true boxes ``[m, 4]``.
    """
    rows: list[tuple[float, bool]] = []
    for boxes, scores, truth in pictures:
        left = torch.ones(len(truth), dtype=torch.bool)
        for box, score in zip(boxes, scores, strict=True):
            shared = overlaps(box, truth) * left
            hit = bool(len(truth)) and float(shared.max()) >= HIT
            if hit:
                left[shared.argmax()] = False
            rows.append((float(score), hit))
    hits = np.array([hit for _, hit in sorted(rows, key=lambda row: -row[0])], dtype=bool)
    true = sum(len(truth) for _, _, truth in pictures)
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    falling = np.maximum.accumulate(precision[::-1])[::-1]
    return float(falling[hits].sum() / max(true, 1))


def on_drawings(detector: Detector, kind: str, count: int, seed: int) -> dict[str, Any]:
    """Average precision, and recall and false alarms at the detailer's confidence."""
    pictures, sure, found, true = [], 0, 0, 0
    for number in range(count):
        drawing = training_drawing(seed, number, any_size(number, seed), held_out=True)
        boxes, scores = found_by(detector, drawing.image, LOWEST)
        truth = truth_of(drawing, kind)
        pictures.append((boxes, scores, truth))
        boxes = boxes[scores > CONFIDENCE]
        near = overlaps(truth[:, None], boxes[None]) >= HIT
        sure, found, true = sure + len(boxes), found + int(near.any(1).sum()), true + len(truth)
    return {
        "map50": round(average_precision(pictures), 4),
        "boxes": true,
        "recall": round(found / max(true, 1), 4),
        "precision": round(found / max(sure, 1), 4),
    }


def truth_of(drawing: Drawing, kind: str) -> Tensor:
    return torch.tensor([mark[1:] for mark in drawing.marks if mark.what == kind]).view(-1, 4)


def fires(detector: Detector, count: int, seed: int) -> float:
    """The share of drawings of nobody in which something is found."""
    pictures = (empty_drawing(seed, number, any_size(number, seed)).image for number in range(count))
    return sum(len(detector.detect(image, CONFIDENCE)) > 0 for image in pictures) / count


def faces_found(detector: Detector, images: Sequence[Image.Image]) -> float:
    """The share of pictures in which exactly one face is found, its middle in the upper two thirds."""
    hits = 0
    for image in images:
        boxes, _ = found_by(detector, image)
        hits += len(boxes) == 1 and float(boxes[0, 1] + boxes[0, 3]) / 2 < image.height * 2 / 3
    return hits / len(images)


def marked(image: Image.Image, detectors: dict[str, Detector]) -> Image.Image:
    """The picture with what was found in it."""
    image, colors = image.copy(), {"face": (220, 30, 60), "hand": (30, 80, 220)}
    pen = ImageDraw.Draw(image)
    for kind, detector in detectors.items():
        for row in detector.detect(image, CONFIDENCE):
            pen.rectangle(row.box, outline=colors[kind], width=2)
            pen.text((row.box[0] + 3, row.box[1] + 2), f"{row.score:.2f}", fill=colors[kind])
    return image


def generated(args: argparse.Namespace, device: torch.device) -> list[Image.Image]:
    """Pictures of unseen prompts, or those of a folder."""
    if args.pictures:
        return [Image.open(path).convert("RGB") for path in sorted(args.pictures.glob("*.png"))[: args.generated]]
    family = Family.load(args.models, device).to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    return loop_sampler(family)([prompt.text for prompt in unseen_prompts(args.generated, args.seed)], args.seed)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=TINY)
    parser.add_argument("--detectors", type=Path, default=TINY, help="the folder above adetailer/")
    parser.add_argument("--out", type=Path, default=Path("docs/tiny"))
    parser.add_argument("--count", type=int, default=500, help="held-out drawings, and drawings of nobody")
    parser.add_argument("--generated", type=int, default=100)
    parser.add_argument("--pictures", type=Path, help="a folder of generated pictures that are there already")
    parser.add_argument("--seed", type=int, default=141)
    args = parser.parse_args()
    device = best_device()
    library = DetectorLibrary([args.detectors], device)
    detectors = {kind: library.find(f"{kind}_tiny") for kind in KINDS}
    report: dict[str, Any] = {"count": args.count, "generated": args.generated, "seed": args.seed}
    for kind, detector in detectors.items():
        figures = on_drawings(detector, kind, args.count, args.seed)
        report[kind] = figures | {"fires_on_nobody": round(fires(detector, args.count, args.seed), 4)}
        log.info("%s: %s", kind, report[kind])
    images = generated(args, device)
    report["generated_faces_found"] = round(faces_found(detectors["face"], images), 4)
    log.info("faces found in generated pictures: %s", report["generated_faces_found"])
    args.out.mkdir(parents=True, exist_ok=True)
    shown = [image.resize((192, 192), Image.Resampling.LANCZOS) for image in images[:16]]
    drawings = [training_drawing(args.seed, n, (192, 192), True).image for n in range(8)]
    sheet([marked(image, detectors) for image in shown + drawings], 8).save(args.out / "detectors.png")
    (args.out / "detectors.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
