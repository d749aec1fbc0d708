"""Low-rank changes of the transformer while they are trained, and as files in two dialects."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightweight_engine.backend.lora import merged
from lightweight_engine.backend.model_files import open_model
from lightweight_engine.flux.lora_files import LoraFile, read_lora
from lightweight_engine.flux.params import FluxParams
from lightweight_engine.flux.transformer import Flux


@dataclass(frozen=True)
class Part:
    """Rows of a linear that have factors of their own; ``name`` is the module's in the file."""

    name: str
    rows: int


Targets = Mapping[str, tuple[Part, ...]]
"""Path of a linear in the network -> its parts, which together are all of its rows."""


class LowRank(nn.Module):
    """``W`` becomes ``W + up down``, with one pair of factors for each part of its rows."""

    def __init__(self, weight: Tensor, rows: tuple[int, ...], rank: int, generator: torch.Generator) -> None:
        super().__init__()
        bound = weight.shape[1] ** -0.5
        downs = (torch.empty(rank, weight.shape[1]).uniform_(-bound, bound, generator=generator) for _ in rows)
        self.down = nn.ParameterList(down.to(weight.device) for down in downs)
        self.up = nn.ParameterList(torch.zeros(count, rank, device=weight.device) for count in rows)

    def forward(self, weight: Tensor) -> Tensor:
        change = torch.cat([up @ down for up, down in zip(self.up, self.down, strict=True)])
        return (weight.float() + change).to(weight.dtype)


# --- dialects ----------------------------------------------------------------------------------------------------


def kohya_targets(params: FluxParams) -> Targets:
    """Every linear of every block, modulation included, whole."""
    with torch.device("meta"):
        modules = Flux(params).named_modules()
    return {
        path: (Part("lora_unet_" + path.replace(".", "_"), module.out_features),)
        for path, module in modules
        if isinstance(module, nn.Linear) and path.startswith(("double_blocks", "single_blocks"))
    }


_DOUBLE: dict[str, tuple[str, ...]] = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_SINGLE: dict[str, tuple[str, ...]] = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
}
_MLP_INPUTS = ("ff.net.0.proj", "ff_context.net.0.proj", "proj_mlp")


def diffusers_targets(params: FluxParams) -> Targets:
    """Attention and MLPs of every block, queries, keys and values apart."""
    blocks = (
        ("double_blocks", "transformer_blocks", params.depth, _DOUBLE),
        ("single_blocks", "single_transformer_blocks", params.depth_single_blocks, _SINGLE),
    )
    targets = {}
    for ours, theirs, depth, names in blocks:
        for i in range(depth):
            for path, parts in names.items():
                rows = (params.mlp_hidden if name in _MLP_INPUTS else params.hidden_size for name in parts)
                named = (f"transformer.{theirs}.{i}.{name}" for name in parts)
                targets[f"{ours}.{i}.{path}"] = tuple(map(Part, named, rows))
    return targets


def _kohya_tensors(name: str, down: Tensor, up: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield f"{name}.lora_down.weight", down
    yield f"{name}.lora_up.weight", up
    yield f"{name}.alpha", torch.tensor(float(len(down)), dtype=down.dtype)


def _diffusers_tensors(name: str, down: Tensor, up: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield f"{name}.lora_A.weight", down
    yield f"{name}.lora_B.weight", up


def _kohya_metadata(name: str, rank: int) -> dict[str, str]:
    return {
        "ss_output_name": name,
        "ss_network_module": "networks.lora_flux",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
        "ss_base_model_version": "flux1",
        "ss_sd_model_name": "tiny.safetensors",
        "modelspec.title": name,
        "modelspec.architecture": "flux-1-dev/lora",
    }


def _diffusers_metadata(name: str, rank: int) -> dict[str, str]:
    return {"format": "pt", "name": name, "rank": str(rank), "base_model": "tiny.safetensors"}


@dataclass(frozen=True)
class Dialect:
    targets: Callable[[FluxParams], Targets]
    tensors: Callable[[str, Tensor, Tensor], Iterator[tuple[str, Tensor]]]
    metadata: Callable[[str, int], dict[str, str]]


DIALECTS = {
    "kohya": Dialect(kohya_targets, _kohya_tensors, _kohya_metadata),
    "diffusers": Dialect(diffusers_targets, _diffusers_tensors, _diffusers_metadata),
}


# --- training ----------------------------------------------------------------------------------------------------


def attach(transformer: Flux, targets: Targets, rank: int, seed: int) -> dict[str, LowRank]:
    """Put factors beside the linears of ``targets``; they change nothing yet."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for path, parts in targets.items():
        module = transformer.get_submodule(path)
        weight = module.weight
        assert isinstance(weight, Tensor) and sum(part.rows for part in parts) == len(weight)
        found[path] = LowRank(weight, tuple(part.rows for part in parts), rank, generator)
        parametrize.register_parametrization(module, "weight", found[path])
    return found


@torch.no_grad()
def frozen_copy(transformer: Flux) -> Flux:
    """The network as it is now, its factors merged."""
    weight = transformer.img_in.weight
    copied = Flux(transformer.params).to(weight.device, weight.dtype).requires_grad_(False)
    for path, module in copied.named_modules():
        for name, value in module.named_parameters(recurse=False):
            value.copy_(getattr(transformer.get_submodule(path), name))
    return copied


# --- files -------------------------------------------------------------------------------------------------------


def save_lora(
    path: Path,
    dialect: Dialect,
    targets: Targets,
    factors: Mapping[str, LowRank],
    *,
    description: str,
    scale: float = 1.0,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write factors in bfloat16; ``scale`` is what of the trained change the strength 1 shall be."""
    tensors: dict[str, Tensor] = {}
    rank = 0
    for at, low_rank in factors.items():
        for part, down, up in zip(targets[at], low_rank.down, low_rank.up, strict=True):
            pair = (x.detach().to("cpu", torch.bfloat16).contiguous() for x in (down, up * scale))
            tensors |= dict(dialect.tensors(part.name, *pair))
            rank = len(down)
    metadata = dialect.metadata(path.stem, rank) | {"description": description, "license": "Apache-2.0"}
    if notes:
        metadata["training"] = json.dumps(notes)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata)


def shapes_of(transformer: Flux) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in transformer.state_dict().items()}


@torch.no_grad()
def with_loras(transformer: Flux, loras: Mapping[Path, float]) -> Flux:
    """A copy of the network with LoRA files merged into it at their strengths, in float32."""
    shapes, changed = shapes_of(transformer), copy.deepcopy(transformer)
    files: list[tuple[LoraFile, float]] = [
        (read_lora(open_model(path), {"transformer": shapes}), strength) for path, strength in loras.items()
    ]
    weights = changed.state_dict()
    for name in {name for file, _ in files for name in file.changes["transformer"]}:
        changes = [(c, s) for file, s in files for c in file.changes["transformer"].get(name, ())]
        weights[name].copy_(merged(weights[name].float().cpu(), changes))
    return changed
