"""Teach both text encoders what captions say, before the transformer reads them: ``python -m tools.tiny.train_texts``

From pictures alone two small encoders learn only slowly which colour belongs to which noun. Here heads that are thrown
away afterwards must tell every attribute (or that it is not named): from CLIP's pooled vector by one linear layer,
from T5's states by attention of one query per attribute. Minutes on a CPU.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightweight_engine.flux.clip import CLIPText
from lightweight_engine.flux.t5 import T5Encoder

from .captions import FRAMES, UNSEEN_FRAMES, caption
from .data import T5_KEPT
from .files import CLIP, T5, load, save
from .people import ATTRIBUTES, random_person, values
from .tokens import T5_LENGTH, Tokens
from .train_flow import initialise_texts
from .training import Course, best_device, save_history

log = logging.getLogger("tiny")


class Readers(nn.Module):
    """The heads: one per attribute for the pooled vector, and a query and a head for the states."""

    def __init__(self, pooled: int, states: int) -> None:
        super().__init__()
        sizes = [len(values(name)) + 1 for name in ATTRIBUTES]
        self.pooled = nn.ModuleList(nn.Linear(pooled, size) for size in sizes)
        self.queries = nn.Parameter(torch.randn(len(sizes), states) * states**-0.5)
        self.states = nn.ModuleList(nn.Linear(states, size) for size in sizes)

    def forward(self, pooled: Tensor, states: Tensor, padding: Tensor) -> list[tuple[Tensor, Tensor]]:
        scores = (states @ self.queries.T).masked_fill(padding[..., None], -torch.inf)
        share = scores.softmax(1)  # [B, T, attributes]
        read = torch.einsum("bta,btd->abd", share, states)
        return [
            (head(pooled), reader(read[i]))
            for i, (head, reader) in enumerate(zip(self.pooled, self.states, strict=True))
        ]


def examples(
    count: int, rng: np.random.Generator, frames: tuple[str, ...], held_out: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """CLIP ids, T5 ids, and the named values ``[N, attributes]``, 0 where an attribute is not named."""
    tokens, clip, t5, named = Tokens.shipped(), [], [], []
    for i in range(count):
        view = "bust" if i % 10 else ("face", "hand")[i // 10 % 2]
        found = caption(random_person(rng, held_out=held_out), rng, view, frames=frames)
        clip.append(tokens.clip_ids(found.text))
        t5.append(tokens.t5_ids(found.text, T5_KEPT))
        named.append([values(name).index(found.named[name]) + 1 if name in found.named else 0 for name in ATTRIBUTES])
    return torch.tensor(clip), torch.tensor(t5), torch.tensor(named)


def read(
    clip: CLIPText, t5: T5Encoder, readers: Readers, clip_ids: Tensor, t5_ids: Tensor
) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
    pooled, states = clip(clip_ids, Tokens.shipped().clip.end_id), t5(t5_ids)
    return readers(pooled, states, t5_ids == 0), pooled, states


@torch.no_grad()
def accuracy(
    clip: CLIPText, t5: T5Encoder, readers: Readers, seed: int, device: torch.device
) -> dict[str, list[float]]:
    """For unseen captions, per attribute: the share read rightly from the pooled vector and from the states."""
    clip_ids, t5_ids, named = (
        x.to(device) for x in examples(1000, np.random.default_rng([seed, 1]), UNSEEN_FRAMES, True)
    )
    scores, _, _ = read(clip, t5, readers, clip_ids, t5_ids)
    return {
        name: [round(float((s.argmax(-1) == named[:, i]).float().mean()), 3) for s in scores[i]]
        for i, name in enumerate(ATTRIBUTES)
    }


def train(
    clip: CLIPText, t5: T5Encoder, out: Path, *, seconds: float, batch: int, lr: float, keep: float, seed: int
) -> None:
    """Args: keep: weight of staying near the outputs so far, for a transformer that reads them already."""
    device = best_device()
    torch.manual_seed(seed)
    clip, t5 = clip.to(device), t5.to(device)
    old_clip, old_t5 = (type(n)(n.params).to(device).requires_grad_(False) for n in (clip, t5))
    old_clip.load_state_dict(clip.state_dict())
    old_t5.load_state_dict(t5.state_dict())
    readers = Readers(clip.params.hidden_size, t5.params.hidden_size).to(device)
    groups = [{"params": [*clip.parameters(), *t5.parameters()]}, {"params": list(readers.parameters())}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    rng, course = np.random.default_rng(seed), Course(seconds, lr=lr)
    while course.progress < 1:
        clip_ids, t5_ids, named = (x.to(device) for x in examples(batch, rng, FRAMES, False))
        if course.steps % 4 == 0:  # at the engine's length
            t5_ids = F.pad(t5_ids, (0, T5_LENGTH - T5_KEPT))
        scores, pooled, states = read(clip, t5, readers, clip_ids, t5_ids)
        loss = sum(F.cross_entropy(s, named[:, i]) for i, pair in enumerate(scores) for s in pair)
        kept = torch.zeros(())
        if keep:
            kept = F.mse_loss(pooled, old_clip(clip_ids, Tokens.shipped().clip.end_id)) + F.mse_loss(
                states, old_t5(t5_ids)
            )
        optimizer.zero_grad()
        (loss + keep * kept).backward()
        nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
        for group, factor in zip(optimizer.param_groups, (1, 3), strict=True):
            group["lr"] = course.rate() * factor
        optimizer.step()
        course.count(loss=loss, kept=kept)
        if course.note("texts", 100):
            log.info("%s", accuracy(clip, t5, readers, seed, device))
    course.note("texts")
    log.info("read from unseen captions (pooled, states): %s", accuracy(clip, t5, readers, seed, device))
    save("clip", clip, out)
    save("t5", t5, out)
    save_history(out / "history.json", "texts", course)


def start(
    out: Path, *, seconds: float, seed: int, resume: bool, batch: int = 64, lr: float = 1.5e-3, keep: float = 0.0
) -> None:
    """Train from the beginning, or from the encoders below ``out``."""
    if resume:
        clip, t5 = load("clip", out), load("t5", out)
    else:
        clip, t5 = CLIPText(CLIP), T5Encoder(T5)
        initialise_texts(t5, clip)
    train(clip, t5, out, seconds=seconds, batch=batch, lr=lr, keep=keep, seed=seed)  # type: ignore[arg-type]


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/tiny"))
    parser.add_argument("--seconds", type=float, default=400)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--keep", type=float, default=0.0, help="weight of staying near the outputs as they are")
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    start(
        args.out, seconds=args.seconds, seed=args.seed, resume=args.resume, batch=args.batch, lr=args.lr, keep=args.keep
    )


if __name__ == "__main__":
    main()
