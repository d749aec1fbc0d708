"""Does a hires pass keep what prompts name? ``python -m tools.tiny.hires_accuracy``

Unseen prompts drawn through the engine as they are, and with a hires pass of 1.5 by the family's own upscaler; the
classifier looks for every named attribute in both.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from PIL import Image

from .classifier import WEIGHTS, attributes_in, load_classifier
from .draw import sheet
from .evaluate import score, unseen_prompts
from .files import TINY
from .training import best_device

log = logging.getLogger("tiny")

HIRES: dict[str, Any] = {"hr_scale": 1.5, "hr_steps": 10, "hr_upscaler": "4x_tiny", "denoising_strength": 0.3}
SHOWN = 8


def drawn(texts: list[str], seed: int, steps: int, batch: int, **fields: Any) -> list[Image.Image]:
    """A picture of each text, whose seeds count up."""
    from lightweight_engine import Config, GenerationRequest, LightweightEngine
    from lightweight_engine.core.images import to_images

    engine = LightweightEngine(Config(models_dir=TINY, offline=True))
    images: list[Image.Image] = []
    for start in range(0, len(texts), batch):
        part = texts[start : start + batch]
        request = GenerationRequest(
            width=256, height=256, steps=steps, distilled_cfg_scale=3.5, seed=seed + start,
            num_outputs=len(part), batch_size=min(len(part), 64), **fields,
        )  # fmt: skip
        images += to_images(engine.draw(request, part).pixels)
        log.info("%d of %d pictures", len(images), len(texts))
    engine.close()
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("docs/tiny"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    prompts = unseen_prompts(args.count, args.seed)
    texts, named = [prompt.text for prompt in prompts], [prompt.named for prompt in prompts]
    classifier = load_classifier(WEIGHTS, best_device())
    base = drawn(texts, args.seed, args.steps, args.batch)
    refined = drawn(texts, args.seed, args.steps, args.batch, **HIRES)
    figures = {
        name: score(named, attributes_in(classifier, images)) for name, images in (("base", base), ("hires", refined))
    }
    figures["hires"]["change"] = round(figures["hires"]["all"] - figures["base"]["all"], 4)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "hires.json").write_text(json.dumps({**HIRES, "prompts": args.count, **figures}, indent=1) + "\n")
    pairs = [image.resize((384, 384)) for pair in zip(base[:SHOWN], refined[:SHOWN], strict=True) for image in pair]
    sheet(pairs, columns=4).save(args.out / "hires.png")
    log.info("base %.2f%%, hires %.2f%%", 100 * figures["base"]["all"], 100 * figures["hires"]["all"])


if __name__ == "__main__":
    main()
