"""What do the LoRAs do? ``python -m tools.tiny.lora_effect``

Unseen prompts at several strengths of each LoRA, and of both together. A hat is found by the classifier that knows
hats; night is dark upper corners, where a picture shows its backdrop. The same classifier says whether the attributes
that the prompts name are still there; the colour of the backdrop does not count, which night replaces.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .captions import Caption
from .classifier import EXTRAS_WEIGHTS, Classifier, attributes_in, load_classifier
from .draw import sheet
from .evaluate import score, unseen_prompts
from .extras import HAT, NIGHT
from .files import TINY
from .lora import with_loras
from .sampling import Family, Sample, engine_sampler, loop_sampler
from .training import best_device

log = logging.getLogger("tiny")

STRENGTHS = (0.5, 1.0)
DARK = 90
"""Mean of 0..255 below which an upper corner is night; the darkest backdrop by day has 160."""

Mix = dict[str, float]
SHOWN: tuple[Mix, ...] = ({}, {NIGHT: 0.5}, {NIGHT: 1.0}, {HAT: 0.5}, {HAT: 1.0}, {NIGHT: 1.0, HAT: 1.0})


def backdrop_light(image: Image.Image) -> float:
    """The median of the upper corners, 0..255: less than stars, moon or hair that reaches in can change."""
    grey = np.asarray(image.convert("L"))
    height, width = (side // 6 for side in grey.shape)
    return float(np.median(np.concatenate((grey[:height, :width], grey[:height, -width:]))))


def mixes(strengths: Sequence[float]) -> list[Mix]:
    alone = [{name: strength} for name in (NIGHT, HAT) for strength in strengths]
    return [{}, *alone, {NIGHT: 1.0, HAT: 1.0}]


def label(mix: Mix) -> str:
    return " + ".join(f"{name} {strength:g}" for name, strength in mix.items()) or "without"


def measured(images: Sequence[Image.Image], prompts: Sequence[Caption], classifier: Classifier) -> dict[str, Any]:
    """Shares of pictures at night and with a hat, light of the backdrop, share of named attributes that were found."""
    found, light = attributes_in(classifier, images), [backdrop_light(image) for image in images]
    kept = score([{k: v for k, v in p.named.items() if k != "background"} for p in prompts], found)
    return {
        NIGHT: round(float(np.mean([value < DARK for value in light])), 4),
        HAT: round(float(np.mean([row[HAT] == "yes" for row in found])), 4),
        "night_by_classifier": round(float(np.mean([row[NIGHT] == "yes" for row in found])), 4),
        "light": round(float(np.mean(light)), 1),
        "kept": kept["all"],
        "attributes": {name: row["found"] for name, row in kept["attributes"].items()},
    }


def sampler(family: Family, mix: Mix, args: argparse.Namespace) -> Sample:
    """The engine with its LoRAs, or our own loop with the files merged into the transformer."""
    if args.by == "engine":
        named = [f"{name}:{strength:g}" for name, strength in mix.items()]
        return engine_sampler(args.models, guidance=args.guidance, steps=args.steps, loras=named)
    files = {args.loras / f"{name}.safetensors": strength for name, strength in mix.items()}
    transformer = with_loras(family.transformer, files).to(next(family.t5.parameters()).dtype)
    changed = replace(family, transformer=transformer)
    return loop_sampler(changed, guidance=args.guidance, steps=args.steps, batch=args.batch)


def drawn(family: Family, mix: Mix, prompts: Sequence[Caption], args: argparse.Namespace) -> list[Image.Image]:
    """One picture for each prompt; those that ``args.pictures`` has are not drawn again."""
    folder = args.pictures and args.pictures / label(mix).replace(" ", "_")
    if folder and len(kept := sorted(folder.glob("*.png"))) >= len(prompts):
        return [Image.open(path).convert("RGB") for path in kept[: len(prompts)]]
    images = sampler(family, mix, args)([p.text for p in prompts], args.seed)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(images):
            image.save(folder / f"{i:04}.png")
    return images


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=TINY)
    parser.add_argument("--by", choices=("engine", "loop"), default="loop", help="who draws; the loop draws in batches")
    parser.add_argument("--loras", type=Path, default=TINY / "Lora", help="where the loop takes them from")
    parser.add_argument("--classifier", type=Path, default=EXTRAS_WEIGHTS)
    parser.add_argument("--out", type=Path, default=Path("docs/tiny"))
    parser.add_argument("--pictures", type=Path, help="a folder that keeps every picture, and is drawn from")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--strengths", type=float, nargs="+", default=STRENGTHS, help="of each alone")
    parser.add_argument("--shown", type=int, default=8, help="prompts on the contact sheet")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--seed", type=int, default=6)
    args = parser.parse_args()
    device = best_device()
    family, classifier = Family.load(args.models, device), load_classifier(args.classifier, device)
    if device.type == "cuda":
        for network in (family.clip, family.t5, family.autoencoder):  # the transformer once it is merged
            network.to(torch.bfloat16)
    prompts, rows, shown = unseen_prompts(args.count, args.seed), {}, []
    for mix in mixes(args.strengths):
        images = drawn(family, mix, prompts, args)
        rows[label(mix)] = measured(images, prompts, classifier)
        log.info("%s: %s", label(mix), rows[label(mix)])
        if mix in SHOWN:
            shown += [image.resize((160, 160), Image.Resampling.LANCZOS) for image in images[: args.shown]]
    args.out.mkdir(parents=True, exist_ok=True)
    sheet(shown, args.shown).save(args.out / "loras.png")
    report = {"count": args.count, "steps": args.steps, "guidance": args.guidance, "seed": args.seed, "mixes": rows}
    (args.out / "loras.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
