"""Distil guidance into the transformer: ``python -m tools.tiny.distill --seconds 100``.

The teacher is the transformer as trained, evaluated with and without text; the student learns to give
``without + g * (with - without)`` in one evaluation when it is told ``g``. The text encoders stay as they are.
"""

from __future__ import annotations

import argparse
import copy
import logging
from pathlib import Path

import torch
import torch.nn.functional as F

from lightweight_engine.flux.velocity import predict_velocity

from .data import Drawings, Latents
from .files import save
from .fused import use_compiled
from .sampling import Family
from .train_flow import AT_FIRST, EMPTY_SHARE, Source, preview, without_text
from .training import Course, Trainer, best_device, save_history

LOWEST, HIGHEST = 1.0, 6.0


def train(
    drawings: Drawings, root: Path, *, seconds: float, batch: int, lr: float, seed: int, compiled: bool = True
) -> Family:
    device = best_device()
    torch.manual_seed(seed)
    family = Family.load(root, device).to(torch.bfloat16)
    student = family.transformer
    teacher = copy.deepcopy(student)
    latents = Latents(drawings, family.autoencoder, device)
    drawings.wait(min(drawings.count, 4096))
    latents.update(AT_FIRST)
    source = Source(drawings, latents, seed, batch)
    if compiled:
        use_compiled(device)
    course = Course(seconds, lr=lr)
    trainer = Trainer([student], course)
    while course.progress < 1:
        latent, clip_ids, t5_ids = source(EMPTY_SHARE)
        x, sigma, _ = source.noised(latent)
        x, count = x.to(torch.bfloat16), len(x)
        one = torch.ones(count, device=device)
        guidance = LOWEST + (HIGHEST - LOWEST) * torch.rand(count, device=device)
        # The factor 1000 rounds where the engine computes in bfloat16: learn both readings.
        told = guidance.to(torch.bfloat16) if course.steps % 2 else guidance
        with torch.no_grad():
            context, pooled = family.encode(clip_ids, t5_ids)
            nothing = family.encode(*without_text(clip_ids, t5_ids, torch.ones(count, dtype=torch.bool, device=device)))
            with_text = predict_velocity(teacher, x, sigma, context, pooled, one).float()
            without = predict_velocity(teacher, x, sigma, *nothing, one).float()
            target = without + guidance[:, None, None, None] * (with_text - without)
        out = predict_velocity(student, x, sigma, context, pooled, told).float()
        trainer.step(F.mse_loss(out, target))
        course.note("distill", 100)
    course.note("distill")
    trainer.use_averages()
    save("transformer", student, root)
    save_history(root / "history.json", "distill", course)
    return family.to(torch.bfloat16)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/tiny"))
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--drawings", type=int, default=24_000)
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--plain", action="store_true", help="compile nothing")
    args = parser.parse_args()
    drawings = Drawings(args.drawings, args.seed)
    family = train(
        drawings, args.out, seconds=args.seconds, batch=args.batch, lr=args.lr, seed=args.seed, compiled=not args.plain
    )
    drawings.close()
    preview(family, args.out / "distilled.png", guidance=3.5)


if __name__ == "__main__":
    main()
