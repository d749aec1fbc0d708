"""One prompt by every sampler on every scheduler: ``python -m tools.tiny.sampler_sheet``

Twenty steps each through the engine, all pairs that make sense for a flow model. Writes a contact sheet and the
classifier's score of each pair: the mean probability that it gives to the named attributes, over a few seeds.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

from PIL import Image, ImageDraw

from lightweight_engine import Config, LightweightEngine
from lightweight_engine.labels import AUTOMATIC, sampler_labels, scheduler_labels

from .classifier import WEIGHTS, load_classifier, probabilities
from .files import TINY

log = logging.getLogger("tiny")
PROMPT = "a smiling woman with long red hair, light skin, round glasses, green shirt, blue background, waving"
NAMED = {
    "expression": "smiling", "hair_style": "long", "hair_color": "red", "skin": "light", "glasses": "round",
    "shirt": "green", "background": "blue", "hands": "one",
}  # fmt: skip
CELL = 96
MARGIN = (150, 30)  # left of and above the pictures
COMPARED = ("Euler", "Heun", "DPM++ 2M", "DPM2", "LMS", "IPNDM", "DEIS", "HeunPP2")
"""Deterministic samplers that should agree on the Simple schedule."""


def draw_page(cells: dict[tuple[str, str], Image.Image], scores: dict[str, dict[str, float]]) -> Image.Image:
    samplers, schedulers = list(scores), list(next(iter(scores.values())))
    page = Image.new(
        "RGB", (MARGIN[0] + len(schedulers) * (CELL + 4), MARGIN[1] + len(samplers) * (CELL + 18)), "white"
    )
    pen = ImageDraw.Draw(page)
    for x, scheduler in enumerate(schedulers):
        pen.text((MARGIN[0] + x * (CELL + 4), 10), scheduler, fill="black")
    for y, sampler in enumerate(samplers):
        top = MARGIN[1] + y * (CELL + 18)
        pen.text((6, top + CELL // 2), sampler, fill="black")
        for x, scheduler in enumerate(schedulers):
            left = MARGIN[0] + x * (CELL + 4)
            page.paste(cells[sampler, scheduler].resize((CELL, CELL), Image.Resampling.LANCZOS), (left, top))
            pen.text((left + 2, top + CELL + 2), f"{100 * scores[sampler][scheduler]:.0f}", fill="black")
    return page


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=TINY)
    parser.add_argument("--classifier", type=Path, default=WEIGHTS)
    parser.add_argument("--out", type=Path, default=Path("docs/tiny"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1, help="pictures per pair; the sheet shows the first")
    parser.add_argument(
        "--compared-seeds", type=int, default=8, help="pictures per sampler that should agree, on Simple"
    )
    args = parser.parse_args()
    engine = LightweightEngine(Config(models_dir=args.models))
    engine.setup()
    classifier = load_classifier(args.classifier)

    def judged(sampler: str, scheduler: str, count: int) -> tuple[Image.Image, float]:
        images = engine.generate(
            prompt=PROMPT, sampler=sampler, scheduler=scheduler, steps=args.steps, seed=args.seed, num_outputs=count,
            width=256, height=256, distilled_cfg_scale=3.5,
        )  # fmt: skip
        found = probabilities(classifier, images)
        chances = [picture[name][value] for picture in found for name, value in NAMED.items()]
        return images[0], round(sum(chances) / len(chances), 4)

    schedulers = [label for label in scheduler_labels() if label != AUTOMATIC]
    cells, scores = {}, {}
    for sampler in sampler_labels():
        scores[sampler] = {}
        for scheduler in schedulers:
            cells[sampler, scheduler], scores[sampler][scheduler] = judged(sampler, scheduler, args.seeds)
        log.info("%s %s", sampler, scores[sampler])
    compared = {sampler: judged(sampler, "Simple", args.compared_seeds)[1] for sampler in COMPARED}
    args.out.mkdir(parents=True, exist_ok=True)
    draw_page(cells, scores).save(args.out / "samplers.png")
    report = {
        "prompt": PROMPT,
        "steps": args.steps,
        "scores": scores,
        "compared_on_simple": compared,
        "compared_seeds": args.compared_seeds,
    }
    report["spread"] = round(max(compared.values()) - min(compared.values()), 4)
    (args.out / "samplers.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    log.info("on Simple: %s, spread %.3f", compared, report["spread"])


if __name__ == "__main__":
    main()
