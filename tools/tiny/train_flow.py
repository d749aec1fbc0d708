"""Train the transformer: ``python -m tools.tiny.train_flow --seconds 260``.

Flow matching exactly as the engine samples: ``x = sigma * noise + (1 - sigma) * latent``, the velocity is
``noise - latent``, and the distilled guidance is 1 throughout. A tenth of the captions is empty, so that true CFG
works and can be distilled. The text encoders are those of ``train_texts``, trained further unless they are
frozen. Goes on from the saved weights with ``--resume``.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightweight_engine.flux.clip import CLIPText
from lightweight_engine.flux.t5 import T5Encoder
from lightweight_engine.flux.transformer import Flux
from lightweight_engine.flux.velocity import predict_velocity

from .data import T5_KEPT, Batches, Drawings, Latents
from .draw import sheet
from .files import FLUX, load, save
from .fused import use_compiled
from .sampling import MU, Family, euler
from .tokens import Tokens
from .training import Course, Trainer, best_device, save_history

EMPTY_SHARE = 0.1
AT_FIRST = 80  # chunks of drawings encoded before training begins; then one every second step
PROMPTS = (
    "a smiling woman with long red hair, round glasses, green shirt, blue background",
    "an angry man with spiky blue hair, dark skin, yellow shirt, white background",
    "a surprised girl with a pink bun, light skin, purple shirt, both hands raised, green background",
    "portrait of a sad boy, curly black hair, brown skin, orange shirt, grey background",
    "a bald man with sunglasses, white shirt, waving, orange background",
    "blonde ponytail, tan skin, black shirt, square glasses, pink background",
    "a calm person with short grey hair, red shirt, two hands up, purple background",
    "green curly hair, happy, blue shirt, one hand raised, yellow background",
)


@torch.no_grad()
def initialise(transformer: Flux) -> None:
    """Every block begins as the identity."""
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                module.bias.zero_()
            if name.endswith(("_mod.lin", "modulation.lin", "adaLN_modulation.1", "final_layer.linear")):
                module.weight.zero_()


@torch.no_grad()
def initialise_texts(t5: T5Encoder, clip: CLIPText) -> None:
    """T5 divides no scores by the root of the head width, so its queries are small."""
    for name, module in t5.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if name.endswith(".q"):
                module.weight.mul_(t5.params.head_dim**-0.5)
        elif isinstance(module, nn.Embedding) and name.endswith("relative_attention_bias"):
            module.weight.normal_(std=0.1)
    for module in clip.modules():
        if isinstance(module, nn.Embedding):
            module.weight.normal_(std=0.3 if module.num_embeddings > 77 else 0.1)


def random_sigmas(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Most where sampling spends its steps (the time shift ``MU``), some everywhere."""
    shifted = torch.sigmoid(MU + torch.randn(count, generator=generator, device=device))
    even = torch.rand(count, generator=generator, device=device)
    return torch.where(torch.rand(count, generator=generator, device=device) < 0.6, shifted, even).clamp(1e-3, 1)


def without_text(clip_ids: Tensor, t5_ids: Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
    """The ids with the rows ``empty`` ``[B]`` replaced by those of the empty prompt."""
    tokens = Tokens.shipped()
    no_clip = torch.tensor(tokens.clip_ids(""), device=clip_ids.device)
    no_t5 = torch.tensor(tokens.t5_ids("", T5_KEPT), device=t5_ids.device)
    return torch.where(empty[:, None], no_clip, clip_ids), torch.where(empty[:, None], no_t5, t5_ids)


class Source:
    """Batches of latents and ids, drawn and encoded while training runs."""

    def __init__(self, drawings: Drawings, latents: Latents, seed: int, batch: int) -> None:
        self.sizes, self.latents, self.count = Batches(drawings, seed), latents, batch
        self.device = latents.device
        self._calls = 0
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def __call__(self, empty_share: float = EMPTY_SHARE) -> tuple[Tensor, Tensor, Tensor]:
        self._calls += 1
        self.latents.update(self._calls % 2)
        size = self.sizes.size()
        tokens = size[0] * size[1] // 256 + 256  # of picture and text: a batch has about as many whatever the size
        count = max(2, round(self.count * 512 / tokens))
        latent, clip_ids, t5_ids = self.latents.batch(size, count, self.generator)
        empty = torch.rand(count, generator=self.generator, device=self.device) < empty_share
        return latent, *without_text(clip_ids, t5_ids, empty)

    def noised(self, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The noisy latent, its sigma, and the true velocity."""
        sigma = random_sigmas(len(latent), self.generator, self.device)
        noise = torch.randn(latent.shape, generator=self.generator, device=self.device)
        share = sigma[:, None, None, None]
        return share * noise + (1 - share) * latent, sigma, noise - latent


def train(
    drawings: Drawings,
    root: Path,
    *,
    seconds: float,
    batch: int,
    lr: float,
    seed: int,
    resume: bool,
    lowest: float = 0.01,
    freeze_texts: bool = False,
    compiled: bool = True,
) -> Family:
    """Args: freeze_texts: the text encoders stay as they are; compiled: worth its start from a few minutes on."""
    device = best_device()
    torch.manual_seed(seed)
    t5, clip = load("t5", root, device), load("clip", root, device)
    if resume:
        transformer = load("transformer", root)
    else:
        transformer = Flux(FLUX)
        initialise(transformer)
    family = Family(transformer.to(device), clip, t5, load("autoencoder", root))  # type: ignore[arg-type]
    for network in (t5, clip):
        network.requires_grad_(False).to(torch.bfloat16)
    trained = {"transformer": transformer} if freeze_texts else {"transformer": transformer, "t5": t5, "clip": clip}
    latents = Latents(drawings, family.autoencoder, device)
    drawings.wait(min(drawings.count, 4096))
    latents.update(AT_FIRST)
    source = Source(drawings, latents, seed, batch)
    if compiled:
        use_compiled(device)
    course = Course(seconds, lr=lr, lowest=lowest)
    trainer = Trainer(list(trained.values()), course)
    saved = 0.0
    while course.progress < 1:
        latent, clip_ids, t5_ids = source()
        x, sigma, velocity = source.noised(latent)
        context, pooled = family.encode(clip_ids, t5_ids)
        one = torch.ones(len(x), device=device, dtype=x.dtype)
        out = predict_velocity(transformer, x.to(torch.bfloat16), sigma, context, pooled, one).float()  # type: ignore[arg-type]
        trainer.step(F.mse_loss(out, velocity))
        course.note("flow", 100)
        if course.elapsed - saved > 60:
            saved = course.elapsed
            for (role, network), weights in zip(trained.items(), trainer.averages(), strict=True):
                save(role, network, root, weights)
    course.note("flow")
    trainer.use_averages()
    for role, network in trained.items():
        save(role, network, root)
    save_history(root / "history.json", "flow", course)
    return family.to(torch.bfloat16)


def preview(family: Family, path: Path, *, guidance: float = 1.0, cfg: float = 1.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet(euler(family, PROMPTS * 2, guidance=guidance, cfg=cfg, seed=1), 8).save(path)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("outputs/tiny"),
        help="holds the autoencoder and the text encoders; gets the transformer",
    )
    parser.add_argument("--seconds", type=float, default=260)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--lowest", type=float, default=0.01, help="the last learning rate, as a share of the highest")
    parser.add_argument("--drawings", type=int, default=48_000)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--freeze-texts", action="store_true")
    parser.add_argument("--plain", action="store_true", help="compile nothing")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    drawings = Drawings(args.drawings, args.seed)
    family = train(
        drawings, args.out, seconds=args.seconds, batch=args.batch, lr=args.lr, seed=args.seed, resume=args.resume,
        lowest=args.lowest, freeze_texts=args.freeze_texts, compiled=not args.plain,
    )  # fmt: skip
    drawings.close()
    preview(family, args.out / "flow.png")


if __name__ == "__main__":
    main()
