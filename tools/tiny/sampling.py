"""Pictures from prompts: by the engine's public face, or by twenty lines of our own while networks are in training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lightweight_engine.flux.autoencoder import Autoencoder
from lightweight_engine.flux.clip import CLIPText
from lightweight_engine.flux.t5 import T5Encoder
from lightweight_engine.flux.transformer import Flux
from lightweight_engine.flux.velocity import predict_velocity

from .files import TINY, load
from .tokens import T5_LENGTH, Tokens

MU = 1.15

Sample = Callable[[Sequence[str], int], list[Image.Image]]
"""Prompts and the seed of the first to one picture each, with seeds counting up."""


@dataclass
class Family:
    """The four networks."""

    transformer: Flux
    clip: CLIPText
    t5: T5Encoder
    autoencoder: Autoencoder

    @classmethod
    def load(cls, root: Path = TINY, device: str | torch.device = "cpu") -> Family:
        return cls(
            *(
                load(role, root, device).eval().requires_grad_(False)
                for role in ("transformer", "clip", "t5", "autoencoder")
            )
        )  # type: ignore[arg-type]

    def encode(self, clip_ids: Tensor, t5_ids: Tensor) -> tuple[Tensor, Tensor]:
        """CLIP ids ``[B, 77]`` and T5 ids ``[B, T]``, padded here to 256, to context and pooled vector."""
        end_id = Tokens.shipped().clip.end_id
        return self.t5(F.pad(t5_ids, (0, T5_LENGTH - t5_ids.shape[1]))), self.clip(clip_ids, end_id)

    def encode_texts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        device, tokens = self.transformer.img_in.weight.device, Tokens.shipped()
        clip_ids = torch.tensor([tokens.clip_ids(text) for text in texts], device=device)
        return self.encode(clip_ids, torch.tensor([tokens.t5_ids(text) for text in texts], device=device))

    def to(self, *args: torch.device | torch.dtype) -> Family:
        for network in (self.transformer, self.clip, self.t5, self.autoencoder):
            network.to(*args)
        return self


def simple_sigmas(steps: int, mu: float = MU) -> list[float]:
    """The Simple schedule."""
    times = [(10_000 - math.floor(i * 10_000 / steps)) / 10_000 for i in range(steps)]
    return [*(math.exp(mu) / (math.exp(mu) + (1 / t - 1)) for t in times), 0.0]


@torch.inference_mode()
def euler(
    family: Family,
    texts: Sequence[str],
    *,
    width: int = 256,
    height: int = 256,
    steps: int = 20,
    guidance: float = 1.0,
    cfg: float = 1.0,
    seed: int = 0,
) -> list[Image.Image]:
    """Euler on the Simple schedule; ``guidance`` is distilled, ``cfg`` the true one against the empty prompt."""
    from .train_autoencoder import to_images

    weight = family.transformer.img_in.weight
    context, pooled = family.encode_texts([*texts, *([""] * len(texts) if cfg != 1.0 else [])])
    noise = [
        torch.randn(16, height // 8, width // 8, generator=torch.Generator().manual_seed(seed + i))
        for i in range(len(texts))
    ]
    x = torch.stack(noise).to(weight.device)
    scale = torch.full((len(context),), guidance, device=weight.device, dtype=weight.dtype)
    sigmas = simple_sigmas(steps)
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        twice = x.repeat(len(context) // len(x), 1, 1, 1).to(weight.dtype)
        timestep = torch.full((len(context),), sigma, device=weight.device)
        velocity = predict_velocity(family.transformer, twice, timestep, context, pooled, scale).float()
        if cfg != 1.0:
            with_text, without = velocity.chunk(2)
            velocity = without + cfg * (with_text - without)
        x = x + (following - sigma) * velocity
    return [image for part in x.split(32) for image in to_images(family.autoencoder.decode(part))]


def loop_sampler(
    family: Family, *, guidance: float = 3.5, steps: int = 20, batch: int = 50, width: int = 256, height: int = 256
) -> Sample:
    """Sampling with the loop above."""

    def sample(prompts: Sequence[str], seed: int) -> list[Image.Image]:
        images = []
        for first in range(0, len(prompts), batch):
            part = prompts[first : first + batch]
            images += euler(family, part, steps=steps, guidance=guidance, seed=seed + first, width=width, height=height)
        return images

    return sample


def engine_sampler(root: Path = TINY, *, guidance: float = 3.5, steps: int = 20, loras: Sequence[str] = ()) -> Sample:
    """Sampling through the engine's public face, one request per prompt; LoRAs as ``NAME:STRENGTH``."""
    from lightweight_engine import Config, LightweightEngine

    engine = LightweightEngine(Config(models_dir=root))
    engine.setup()

    def sample(prompts: Sequence[str], seed: int) -> list[Image.Image]:
        fields = {"steps": steps, "distilled_cfg_scale": guidance, "cfg_scale": 1.0, "width": 256, "height": 256}
        fields["loras"] = tuple(loras)
        return [engine.generate(prompt=prompt, seed=seed + i, **fields)[0] for i, prompt in enumerate(prompts)]

    return sample
