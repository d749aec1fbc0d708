"""Do pictures show what their prompts name? ``python -m tools.tiny.evaluate``

Two hundred prompts that training never saw (combinations and sentences kept from it), twenty steps of Euler on the
Simple schedule. The classifier looks for every named attribute; the same with prompts shuffled among the pictures and
with an untrained transformer shows what chance gives.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lightweight_engine.flux.transformer import Flux

from .captions import UNSEEN_FRAMES, Caption, caption
from .classifier import WEIGHTS, Classifier, attributes_in, load_classifier
from .draw import sheet
from .files import TINY
from .people import ATTRIBUTES, random_person
from .sampling import Family, Sample, engine_sampler, loop_sampler
from .training import best_device

log = logging.getLogger("tiny")


def unseen_prompts(count: int, seed: int) -> list[Caption]:
    """Prompts of held-out combinations in held-out sentences, each naming at least three groups of attributes."""
    rng = np.random.default_rng([seed, 99])
    return [caption(random_person(rng, held_out=True), rng, frames=UNSEEN_FRAMES, least=3) for _ in range(count)]


def score(named: Sequence[dict[str, str]], found: Sequence[dict[str, str]]) -> dict[str, Any]:
    """The share of named attributes that were found: in all, and for each attribute with how often it was named."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for wanted, seen in zip(named, found, strict=True):
        for name, value in wanted.items():
            hits[name].append(seen[name] == value)
    rows = {
        name: {"named": len(hits[name]), "found": round(float(np.mean(hits[name])), 4)}
        for name in ATTRIBUTES
        if hits[name]
    }
    every = [hit for row in hits.values() for hit in row]
    return {"all": round(float(np.mean(every)), 4), "named": len(every), "attributes": rows}


def shuffled(items: list[Any], seed: int) -> list[Any]:
    """The items in another order, none in its place."""
    turned = random.Random(seed).sample(items, len(items))
    while any(a is b for a, b in zip(turned, items, strict=True)):
        turned = random.Random(seed := seed + 1).sample(items, len(items))
    return turned


@torch.no_grad()
def untrained(family: Family, seed: int) -> Family:
    """The same family with a transformer of random weights."""
    torch.manual_seed(seed)
    weight = family.transformer.img_in.weight
    transformer = Flux(family.transformer.params).to(weight.device, weight.dtype).requires_grad_(False)
    return Family(transformer, family.clip, family.t5, family.autoencoder)


def evaluate(
    sample: Sample, random_sample: Sample, classifier: Classifier, prompts: list[Caption], seed: int
) -> tuple[dict[str, Any], list[Image.Image]]:
    """The three figures, and the pictures."""
    texts, named = [p.text for p in prompts], [p.named for p in prompts]
    images = sample(texts, seed)
    found = attributes_in(classifier, images)
    report = {"prompts": score(named, found), "shuffled": score(shuffled(named, seed), found)}
    report["untrained"] = score(named, attributes_in(classifier, random_sample(texts, seed)))
    return report, images


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=TINY)
    parser.add_argument("--classifier", type=Path, default=WEIGHTS)
    parser.add_argument("--out", type=Path, default=Path("docs/tiny"))
    parser.add_argument(
        "--by", choices=("engine", "loop"), default="engine", help="the engine's public face, or our own loop"
    )
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--guidance", type=float, nargs="+", default=[3.5], help="distilled guidance; the first is reported in full"
    )
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args()
    device = best_device()
    family = Family.load(args.models, device).to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    classifier = load_classifier(args.classifier, device)
    prompts = unseen_prompts(args.count, args.seed)

    def sampler(guidance: float) -> Sample:
        if args.by == "engine":
            return engine_sampler(args.models, guidance=guidance, steps=args.steps)
        return loop_sampler(family, guidance=guidance, steps=args.steps)

    random_sample = loop_sampler(untrained(family, args.seed), steps=args.steps)
    report, images = evaluate(sampler(args.guidance[0]), random_sample, classifier, prompts, args.seed)
    report |= {"by": args.by, "count": args.count, "steps": args.steps, "guidance": args.guidance[0], "seed": args.seed}
    texts, named = [p.text for p in prompts], [p.named for p in prompts]
    report["other_guidance"] = {
        str(g): score(named, attributes_in(classifier, sampler(g)(texts, args.seed)))["all"] for g in args.guidance[1:]
    }
    args.out.mkdir(parents=True, exist_ok=True)
    sheet([image.resize((128, 128), Image.Resampling.LANCZOS) for image in images[:80]], 10).save(
        args.out / "evaluation.png"
    )
    (args.out / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    log.info("%s", json.dumps(report))


if __name__ == "__main__":
    main()
