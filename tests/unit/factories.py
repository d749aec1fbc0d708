"""Small random models on disk, in the layouts of users' files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from lightweight_engine.flux.autoencoder import Autoencoder
from lightweight_engine.flux.clip import CLIPText
from lightweight_engine.flux.params import AutoencoderParams, CLIPParams, FluxParams, T5Params
from lightweight_engine.flux.t5 import T5Encoder
from lightweight_engine.flux.transformer import Flux

FLUX = FluxParams(
    vec_in_dim=32,
    context_in_dim=48,
    hidden_size=64,
    mlp_hidden=128,
    num_heads=2,
    depth=1,
    depth_single_blocks=1,
    axes_dim=(8, 12, 12),
)
T5 = T5Params(vocab_size=64, hidden_size=48, num_layers=2, num_heads=2, head_dim=16, mlp_hidden=64)
CLIP = CLIPParams(vocab_size=64, hidden_size=32, num_layers=2, num_heads=2, mlp_hidden=64)
AE = AutoencoderParams(widths=(32, 32, 32, 32), num_res_blocks=1)


def network(kind: type[nn.Module], params: object, seed: int = 0) -> nn.Module:
    """A network with random weights, in evaluation mode."""
    torch.manual_seed(seed)
    module = kind(params)  # type: ignore[call-arg]
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2 if "embed" in name else parameter[0].numel() ** -0.5)
    return module.eval().requires_grad_(False)


def save(
    path: Path, module: nn.Module, *, prefix: str = "", dtype: torch.dtype = torch.bfloat16, config: dict | None = None
) -> Path:
    """Write a network's parameters as a safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {prefix + key: tensor.to(dtype).contiguous() for key, tensor in module.state_dict().items()}
    save_file(state, path, metadata={"config": json.dumps(config)} if config else None)
    return path


def save_flux(path: Path, *, prefix: str = "", dtype: torch.dtype = torch.bfloat16, **changes: object) -> Path:
    params = FluxParams(**{**FLUX.__dict__, **changes})
    return save(path, network(Flux, params), prefix=prefix, dtype=dtype, config={"axes_dim": params.axes_dim})


def save_family(root: Path) -> Path:
    """A complete models folder in the layout of Stable Diffusion WebUI."""
    save_flux(root / "Stable-diffusion" / "small.safetensors")
    save(root / "text_encoder" / "t5.safetensors", network(T5Encoder, T5))
    save(root / "text_encoder" / "clip.safetensors", network(CLIPText, CLIP), config={"num_attention_heads": 2})
    save(root / "VAE" / "ae.safetensors", network(Autoencoder, AE))
    return root


VOCABULARY = 2048  # of the tokenizers of ``tiny``, and more


def save_drawable(root: Path, *, dtype: torch.dtype = torch.bfloat16, **changes: object) -> Path:
    """``save_family`` with text encoders that know every token of ``tiny``, so that pictures of noise can be drawn."""
    save_flux(root / "Stable-diffusion" / "small.safetensors", dtype=dtype, **changes)
    clip = network(CLIPText, replace(CLIP, vocab_size=VOCABULARY))
    save(root / "text_encoder" / "t5.safetensors", network(T5Encoder, replace(T5, vocab_size=VOCABULARY)), dtype=dtype)
    save(root / "text_encoder" / "clip.safetensors", clip, dtype=dtype, config={"num_attention_heads": 2})
    save(root / "VAE" / "ae.safetensors", network(Autoencoder, AE), dtype=dtype)
    return root
