"""Shapes of networks, and LoRA files for them, without any weights of the networks themselves."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from factories import CLIP, FLUX, T5
from safetensors.torch import save_file
from torch import Tensor, nn

from lightweight_engine.backend.checkpoint import Checkpoint, open_checkpoint
from lightweight_engine.flux.clip import CLIPText
from lightweight_engine.flux.layouts import Role
from lightweight_engine.flux.params import Shapes
from lightweight_engine.flux.t5 import T5Encoder
from lightweight_engine.flux.transformer import Flux


def shapes_of(kind: type[nn.Module], params: object) -> Shapes:
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in kind(params).state_dict().items()}  # type: ignore[call-arg]


@cache
def small_shapes() -> dict[Role, Shapes]:
    """One double and one single block of width 64; text encoders of widths 32 and 48."""
    return {"transformer": shapes_of(Flux, FLUX), "clip": shapes_of(CLIPText, CLIP), "t5": shapes_of(T5Encoder, T5)}


@cache
def deep_shapes() -> dict[Role, Shapes]:
    """As many blocks as the published transformer has, of width 64."""
    return {"transformer": shapes_of(Flux, replace(FLUX, depth=19, depth_single_blocks=38))}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def pair(alias: str, rows: int, width: int, rank: int = 2, names: str = "lora_A.weight lora_B.weight") -> dict:
    """The two factors of a module."""
    down, up = names.split()
    return {f"{alias}.{down}": numbers(rank, width), f"{alias}.{up}": numbers(rows, rank, seed=1)}


def lora_file(
    folder: Path, tensors: dict[str, Tensor], *, name: str = "style.safetensors", metadata: dict | None = None
) -> Checkpoint:
    save_file(tensors, folder / name, metadata=metadata)
    return open_checkpoint(folder / name)


def random_lora(
    shapes: dict[Role, Shapes], *, seed: int, rank: int = 2, text: bool = False, scale: float = 0.2
) -> dict:
    """Factors in kohya's names for every linear of the transformer; with ``text``, for CLIP's attention too."""
    draw = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for role, prefix in (("transformer", "lora_unet_"), *([("clip", "lora_te1_")] if text else [])):
        for name, shape in shapes[role].items():  # type: ignore[index]
            linear = name.endswith(".weight") and len(shape) == 2 and (role == "transformer" or "self_attn" in name)
            if linear:
                alias = prefix + name.removesuffix(".weight").replace(".", "_")
                tensors[f"{alias}.lora_down.weight"] = torch.randn(rank, shape[1], generator=draw)
                tensors[f"{alias}.lora_up.weight"] = (
                    torch.randn(shape[0], rank, generator=draw) * scale / shape[1] ** 0.5
                )
    return tensors
