"""The family on disk: sizes of its four networks, where they lie, how they are saved and read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from lightweight_engine.flux.autoencoder import Autoencoder
from lightweight_engine.flux.clip import CLIPText
from lightweight_engine.flux.params import AutoencoderParams, CLIPParams, FluxParams, T5Params
from lightweight_engine.flux.t5 import T5Encoder
from lightweight_engine.flux.transformer import Flux

TINY = Path(__file__).resolve().parents[2] / "lightweight_engine" / "tiny"

PLACES = {
    "transformer": "Stable-diffusion/tiny.safetensors",
    "clip": "text_encoder/clip_l.safetensors",
    "t5": "text_encoder/t5xxl.safetensors",
    "autoencoder": "VAE/ae.safetensors",
}

# Widths are multiples of 256 where quantised formats group so many weights; all four files take less than 24 MB.
FLUX = FluxParams(
    vec_in_dim=128, context_in_dim=128, hidden_size=256, mlp_hidden=512, num_heads=8,
    depth=2, depth_single_blocks=6, axes_dim=(8, 12, 12),
)  # fmt: skip
T5 = T5Params(vocab_size=256, hidden_size=128, num_layers=2, num_heads=4, head_dim=32, mlp_hidden=256)
CLIP = CLIPParams(vocab_size=834, hidden_size=128, num_layers=2, num_heads=2, mlp_hidden=256)
AUTOENCODER = AutoencoderParams(widths=(32, 64, 96, 96), num_res_blocks=1, scale=1.0, shift=0.0)

_DESCRIPTIONS = {
    "transformer": "tiny: a small Flux transformer trained on drawings made by a program; a demonstration model",
    "clip": "tiny: the CLIP-layout text encoder trained with the transformer",
    "t5": "tiny: the T5-layout text encoder trained with the transformer",
    "autoencoder": "tiny: the autoencoder trained on drawings made by a program",
}
_NETWORKS: dict[str, tuple[Any, Any]] = {
    "transformer": (FluxParams, Flux),
    "clip": (CLIPParams, CLIPText),
    "t5": (T5Params, T5Encoder),
    "autoencoder": (AutoencoderParams, Autoencoder),
}


def hints_of(role: str, network: nn.Module) -> dict[str, Any]:
    """What the shapes do not tell."""
    params: Any = network.params
    return {
        "transformer": lambda: {"axes_dim": list(params.axes_dim), "theta": params.theta},
        "clip": lambda: {"num_attention_heads": params.num_heads},
        "t5": lambda: {"max_distance": params.max_distance},
        "autoencoder": lambda: {"scale": params.scale, "shift": params.shift},
    }[role]()


def save(role: str, network: nn.Module, root: Path, weights: Mapping[str, torch.Tensor] | None = None) -> Path:
    """Write a network (or other ``weights`` of its shapes) in bfloat16 below ``root``."""
    path = root / PLACES[role]
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        key: value.detach().to("cpu", torch.bfloat16).contiguous()
        for key, value in (weights or network.state_dict()).items()
    }
    metadata = {
        "config": json.dumps(hints_of(role, network)),
        "description": _DESCRIPTIONS[role],
        "license": "Apache-2.0",
    }
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata)
    temporary.replace(path)
    return path


def load(role: str, root: Path, device: str | torch.device = "cpu") -> nn.Module:
    """Read a network below ``root``, in float32."""
    params_type, network_type = _NETWORKS[role]
    with safe_open(root / PLACES[role], "pt") as file:
        tensors = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 - not a mapping
        hints = json.loads((file.metadata() or {}).get("config", "{}"))
    network = network_type(params_type.from_shapes({k: tuple(v.shape) for k, v in tensors.items()}, hints))
    network.load_state_dict(tensors)
    return network.to(device)
