"""Train the LoRAs of tiny: ``python -m tools.tiny.train_lora`` (four minutes each on a GPU).

As the model itself was made: first flow matching at a distilled guidance of 1 on drawings that have the extra whatever
their caption says, then distillation, in which the factors learn for every guidance what true CFG makes of the model
that the first stage left. The base weights stay as they are.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lightweight_engine.flux.velocity import predict_velocity

from .data import Drawings, Latents
from .distill import HIGHEST, LOWEST
from .draw import training_drawing
from .extras import HAT, NIGHT
from .files import TINY
from .fused import use_compiled
from .lora import DIALECTS, LowRank, attach, frozen_copy, save_lora
from .sampling import Family
from .train_flow import AT_FIRST, EMPTY_SHARE, Source, preview, without_text
from .training import Course, best_device, save_history


@dataclass(frozen=True)
class Recipe:
    """How one LoRA is made; ``scale`` is what of the trained change the strength 1 shall be."""

    dialect: str
    rank: int
    seed: int
    description: str
    lr: float = 4e-3
    scale: float = 1.0


RECIPES = {
    NIGHT: Recipe("kohya", 6, 21, "tiny at night: a dark sky with stars and a moon, colours by moonlight"),
    HAT: Recipe("diffusers", 8, 22, "everybody wears a party hat", scale=1.45),
}


class Factors:
    """Trains factors down the gradient of a loss."""

    def __init__(self, factors: Mapping[str, LowRank], course: Course) -> None:
        self._values = [p for low_rank in factors.values() for p in low_rank.parameters()]
        self._optimizer = torch.optim.AdamW(self._values, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)
        self._course = course

    def step(self, loss: Tensor) -> None:
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._values, 1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = self._course.rate()
        self._optimizer.step()
        self._course.count(loss=loss)


def flow(family: Family, source: Source, factors: Mapping[str, LowRank], *, seconds: float, lr: float) -> Course:
    """Flow matching at a guidance of 1."""
    course = Course(seconds, lr=lr)
    trainer = Factors(factors, course)
    while course.progress < 1:
        latent, clip_ids, t5_ids = source()
        x, sigma, velocity = source.noised(latent)
        with torch.no_grad():
            context, pooled = family.encode(clip_ids, t5_ids)
        one = torch.ones(len(x), device=x.device)
        out = predict_velocity(family.transformer, x.to(pooled.dtype), sigma, context, pooled, one).float()
        trainer.step(F.mse_loss(out, velocity))
        course.note("flow", 100)
    course.note("flow")
    return course


def distil(family: Family, source: Source, factors: Mapping[str, LowRank], *, seconds: float, lr: float) -> Course:
    """For every guidance, in one evaluation, what the model of the first stage gives with CFG in two."""
    teacher, course = frozen_copy(family.transformer), Course(seconds, lr=lr)
    trainer = Factors(factors, course)
    while course.progress < 1:
        latent, clip_ids, t5_ids = source(EMPTY_SHARE)
        x, sigma, _ = source.noised(latent)
        everywhere = torch.ones(len(x), dtype=torch.bool, device=x.device)
        guidance = LOWEST + (HIGHEST - LOWEST) * torch.rand(len(x), generator=source.generator, device=x.device)
        with torch.no_grad():
            context, pooled = family.encode(clip_ids, t5_ids)
            nothing = family.encode(*without_text(clip_ids, t5_ids, everywhere))
            x, one = x.to(pooled.dtype), torch.ones_like(guidance)
            with_text = predict_velocity(teacher, x, sigma, context, pooled, one).float()
            without = predict_velocity(teacher, x, sigma, *nothing, one).float()
            target = without + guidance[:, None, None, None] * (with_text - without)
        # The factor 1000 rounds where the engine computes in bfloat16: learn both readings.
        told = guidance.to(torch.bfloat16) if course.steps % 2 else guidance
        out = predict_velocity(family.transformer, x, sigma, context, pooled, told).float()
        trainer.step(F.mse_loss(out, target))
        course.note("distill", 100)
    course.note("distill")
    return course


def train(
    name: str, recipe: Recipe, drawings: Drawings, models: Path, out: Path, *, seconds: float, batch: int,
    compiled: bool = True,
) -> Family:  # fmt: skip
    """Train one LoRA on the family below ``models``; writes ``Lora/<name>.safetensors`` below ``out``."""
    device = best_device()
    torch.manual_seed(recipe.seed)
    family = Family.load(models, device).to(torch.bfloat16)
    latents = Latents(drawings, family.autoencoder, device)
    drawings.wait(min(drawings.count, 2048))
    latents.update(AT_FIRST)
    source = Source(drawings, latents, recipe.seed, batch)
    if compiled:
        use_compiled(device)
    dialect = DIALECTS[recipe.dialect]
    targets = dialect.targets(family.transformer.params)
    factors = attach(family.transformer, targets, recipe.rank, recipe.seed)
    courses = [
        flow(family, source, factors, seconds=0.6 * seconds, lr=recipe.lr),
        distil(family, source, factors, seconds=0.4 * seconds, lr=recipe.lr / 2),
    ]
    save_lora(
        out / "Lora" / f"{name}.safetensors", dialect, targets, factors, description=recipe.description,
        scale=recipe.scale, notes=asdict(recipe) | {"steps": [course.steps for course in courses]},
    )  # fmt: skip
    for course in courses:
        save_history(out / "history.json", f"lora {name}", course)
    return replace(family, transformer=frozen_copy(family.transformer))


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(RECIPES), metavar="NAME", help=", ".join(RECIPES))
    parser.add_argument("--models", type=Path, default=TINY)
    parser.add_argument("--out", type=Path, default=Path("outputs/tiny"))
    parser.add_argument("--seconds", type=float, default=240, help="for each")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--drawings", type=int, default=12_000, help="for each")
    parser.add_argument("--workers", type=int, help="processes that draw, for each")
    parser.add_argument("--plain", action="store_true", help="compile nothing")
    args = parser.parse_args()
    sets = {
        name: Drawings(args.drawings, RECIPES[name].seed, workers=args.workers,
                       draw=partial(training_drawing, extras=(name,)))
        for name in args.names
    }  # fmt: skip
    for name, drawings in sets.items():
        family = train(name, RECIPES[name], drawings, args.models, args.out, seconds=args.seconds, batch=args.batch,
                       compiled=not args.plain)  # fmt: skip
        drawings.close()
        preview(family, args.out / f"{name}.png", guidance=3.5)


if __name__ == "__main__":
    main()
