"""What a step is compared with: diffusers' network with the very same weights, as it comes and as people make it faster
or smaller. Packages that are not installed are left out, and a line says so."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from benchmarks.step import diffusers_config, to_diffusers
from lightweight_engine.flux.params import FluxParams
from lightweight_engine.flux.transformer import Flux


def peers(model: Flux, params: FluxParams, compile: bool) -> dict[str, Callable[[], nn.Module]]:
    """diffusers, its blocks compiled, its linears by torchao in fp8 and compiled, and by bitsandbytes in nf4.

    Raises:
        ImportError: by one that is built, and by all without diffusers.
    """
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    state = cache(lambda: to_diffusers(model.state_dict(), params.hidden_size, params.mlp_hidden))

    def build() -> Any:
        with torch.device("meta"):
            peer = FluxTransformer2DModel(**diffusers_config(params))
        peer.load_state_dict(state(), assign=True)  # views of ours: no second copy
        return peer.eval().requires_grad_(False)

    def compiled(peer: Any) -> nn.Module:
        peer.compile_repeated_blocks(fullgraph=True)
        return peer

    eager = {"diffusers, eager": build, "diffusers, bitsandbytes nf4": lambda: bitsandbytes_twin(build())}
    if not compile:
        return eager
    return eager | {
        "diffusers, blocks compiled": lambda: compiled(build()),
        "diffusers, torchao fp8, blocks compiled": lambda: compiled(torchao_twin(build())),
    }


def torchao_twin(model: Any) -> Any:
    """Linears of the blocks, not of their modulation, in fp8 by rows, inputs too."""
    from torchao.quantization import (  # type: ignore[import-not-found]
        Float8DynamicActivationFloat8WeightConfig,
        PerRow,
        quantize_,
    )

    def in_a_block(linear: nn.Module, path: str) -> bool:
        return isinstance(linear, nn.Linear) and "blocks" in path and ".norm" not in path

    quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()), filter_fn=in_a_block)
    return model


def bitsandbytes_twin(model: nn.Module) -> nn.Module:
    """The linears of the blocks as bitsandbytes keeps them."""
    import bitsandbytes  # type: ignore[import-not-found]

    for path, linear in list(model.named_modules()):
        if type(linear) is not nn.Linear or "blocks" not in path:
            continue
        bias = linear.bias is not None
        made = bitsandbytes.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=bias,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
            device="meta",
        )
        made.weight = bitsandbytes.nn.Params4bit(linear.weight.cpu(), requires_grad=False, quant_type="nf4")
        made.bias = linear.bias
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, made.to(linear.weight.device))
    return model
