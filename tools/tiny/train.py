"""Train the whole family in one go: ``python -m tools.tiny.train``

Drawings are made once and serve all stages: text encoders, autoencoder, transformer, distillation, classifier. A
stage of 0 seconds is left out; the later stages then go on from the weights below ``--out``.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from . import distill, train_autoencoder, train_classifier, train_flow, train_texts
from .data import Drawings
from .files import load
from .training import best_device


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/tiny"))
    parser.add_argument("--texts", type=float, default=60, metavar="SECONDS")
    parser.add_argument("--autoencoder", type=float, default=210, metavar="SECONDS")
    parser.add_argument("--flow", type=float, default=540, metavar="SECONDS")
    parser.add_argument("--distill", type=float, default=120, metavar="SECONDS")
    parser.add_argument("--classifier", type=float, default=50, metavar="SECONDS")
    parser.add_argument("--flow-lr", type=float, default=1e-3)
    parser.add_argument("--distill-lr", type=float, default=3e-4)
    parser.add_argument("--freeze-texts", action="store_true", help="while the transformer is trained")
    parser.add_argument("--plain", action="store_true", help="compile nothing: for stages of a minute or two")
    parser.add_argument("--flow-lowest", type=float, default=0.01, help="last learning rate as a share of the highest")
    parser.add_argument("--batch", type=int, default=128, help="of the transformer; the autoencoder takes half")
    parser.add_argument("--drawings", type=int, default=64_000)
    parser.add_argument("--held-out", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--resume", action="store_true", help="go on from the weights of each stage")
    args = parser.parse_args()
    out, seed = args.out, args.seed
    unseen = Drawings(args.held_out if args.classifier else 8, seed + 1000, workers=2, held_out=True)
    drawings = Drawings(args.drawings, seed)
    if args.texts:
        train_texts.start(out, seconds=args.texts, seed=seed, resume=args.resume)
    if args.autoencoder:
        train_autoencoder.train(
            drawings,
            out,
            seconds=args.autoencoder,
            batch=max(6, args.batch * 3 // 8),
            lr=1e-3,
            seed=seed,
            resume=args.resume,
        )
    if args.flow:
        family = train_flow.train(
            drawings, out, seconds=args.flow, batch=args.batch, lr=args.flow_lr, seed=seed, resume=args.resume,
            lowest=args.flow_lowest, freeze_texts=args.freeze_texts, compiled=not args.plain,
        )  # fmt: skip
        train_flow.preview(family, out / "flow.png")
    if args.distill:
        family = distill.train(
            drawings,
            out,
            seconds=args.distill,
            batch=max(2, args.batch * 3 // 4),
            lr=args.distill_lr,
            seed=seed + 1,
            compiled=not args.plain,
        )
        train_flow.preview(family, out / "distilled.png", guidance=3.5)
    if args.classifier:
        autoencoder = load("autoencoder", out, best_device())
        network = train_classifier.train(
            drawings,
            out,
            out / "classifier.safetensors",
            seconds=args.classifier,
            batch=96,
            seed=seed,  # type: ignore[arg-type]
        )
        train_classifier.report(network, unseen, autoencoder, out / "classifier.json")  # type: ignore[arg-type]
    drawings.close()
    unseen.close()


if __name__ == "__main__":
    main()
