"""One prompt's walk: how often control moves from one project file to another in one step.

    python -m benchmarks.walk

A step of Euler on a model with one double and one single block, from the sampler's loop through guidance and network
and back. Python calls are followed with ``sys.setprofile``; frames outside the project are passed over, so what is
counted are the changes in the sequence of project files, calls and returns alike.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import lightweight_engine
from benchmarks.report import publish
from lightweight_engine.flux.conditioning import Composition, Conditioning, Scheduled
from lightweight_engine.flux.guidance import Guided
from lightweight_engine.flux.noise import ImageNoise
from lightweight_engine.flux.params import FluxParams
from lightweight_engine.flux.sampling import plan, run
from lightweight_engine.flux.transformer import Flux
from lightweight_engine.flux.velocity import Velocity

PACKAGE = Path(lightweight_engine.__file__).parent


def project_file(frame: FrameType | None) -> str | None:
    """The project file that a frame, or the nearest one that called it, runs in."""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if PACKAGE in path.parents:
            return str(path.relative_to(PACKAGE))
        frame = frame.f_back
    return None


def walk(function: Callable[[], Any]) -> list[tuple[str, str]]:
    """Every move from one project file to another while ``function`` runs."""
    moves: list[tuple[str, str]] = []
    current: str | None = None

    def follow(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal current
        if event not in ("call", "return"):
            return
        now = project_file(frame if event == "call" else frame.f_back)
        if now is not None and current is not None and now != current:
            moves.append((current, now))
        current = now or current

    sys.setprofile(follow)
    try:
        function()
    finally:
        sys.setprofile(None)
    return moves


def one_step() -> Callable[[], Any]:
    """A function that makes one step; what does not depend on the latent has been computed."""
    params = FluxParams(
        vec_in_dim=32, context_in_dim=48, hidden_size=64, mlp_hidden=128, num_heads=2, depth=1, depth_single_blocks=1,
        axes_dim=(8, 12, 12),
    )  # fmt: skip
    cond = Conditioning(torch.randn(8, 48), torch.randn(32), 3.5)
    velocity = Velocity(Flux(params).eval().requires_grad_(False))
    velocity.precompute([1.0], [cond])
    schedule = plan("Euler", "Simple", 1, params.mu)
    noise = ImageNoise((16, 8, 8), [0], source="CPU")
    x = schedule.start(noise.first())
    denoise = Guided(velocity, [Composition(((1.0, Scheduled(((1, cond),))),))])
    velocity(x, 1.0, [cond])
    return lambda: run(schedule, denoise, x, noise, lambda step, latent, denoised: None)


@torch.inference_mode()
def main() -> None:
    moves = walk(one_step())
    rows = [{"from": a, "to": b, "moves": count} for (a, b), count in Counter(moves).most_common()]
    publish("walk", rows, total=len(moves), aim="at most 60")


if __name__ == "__main__":
    main()
