"""What low-bit storage costs tiny: ``python -m tools.tiny.storage`` scores its pictures for every storage format.

The prompts, steps and classifier are those of ``evaluate``. The transformer is kept in the format, then the text
encoders too. (tiny is a harsh case: with a width of 256 it has little to average errors over.)
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import torch

from lightweight_engine import Config, LightweightEngine

from .classifier import WEIGHTS, Classifier, attributes_in, load_classifier
from .evaluate import Caption, score, unseen_prompts
from .files import TINY
from .sampler_sheet import draw_prompts

log = logging.getLogger("tiny")

FORMATS = ("bf16", "fp8_e4m3", "fp8_e5m2", "nf4", "fp4",
           "gguf:Q8_0", "gguf:Q5_1", "gguf:Q5_0", "gguf:Q4_1", "gguf:Q4_0")  # fmt: skip


def scored(settings: dict[str, Any], prompts: list[Caption], classifier: Classifier, args: Any) -> tuple[float, int]:
    """The share of named attributes that was found, and the bytes of the networks that were kept in the format."""
    engine = LightweightEngine(Config(models_dir=args.models, tokenizer_dirs=(TINY,), compute_dtype="bf16", **settings))
    engine.setup()
    images = draw_prompts(engine, [p.text for p in prompts], sampler="Euler", scheduler="Simple", steps=args.steps,
                          seed=args.seed, batch=args.batch, side=256)  # fmt: skip
    roles = ("transformer", "t5", "clip") if "text_storage_dtype" in settings else ("transformer",)
    nbytes = sum(engine.networks.known[role].inventory.nbytes for role in roles)
    engine.close()
    return score([p.named for p in prompts], attributes_in(classifier, images))["all"], nbytes


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=TINY)
    parser.add_argument("--classifier", type=Path, default=WEIGHTS)
    parser.add_argument("--out", type=Path, default=Path("docs/tiny"))
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args()
    classifier = load_classifier(args.classifier, torch.device("cpu"))
    prompts = unseen_prompts(args.count, args.seed)
    rows = {}
    for format in FORMATS:
        found, nbytes = scored({"storage_dtype": format}, prompts, classifier, args)
        with_text, all_bytes = scored(
            {"storage_dtype": format, "text_storage_dtype": format}, prompts, classifier, args
        )
        rows[format] = {"found": found, "bytes": nbytes, "found_with_text": with_text, "bytes_with_text": all_bytes}
        log.info(
            "| %s | %.1f MB | %.1f%% | %.1f MB | %.1f%% |",
            *(format, nbytes / 1e6, 100 * found, all_bytes / 1e6, 100 * with_text),
        )
    report = {"count": args.count, "steps": args.steps, "seed": args.seed, "formats": rows}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "storage.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
