"""What a step is compared with: diffusers' network with the very same weights, as it comes and as people make it faster
or smaller. Packages that are not installed are left out, and a line says so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.step import diffusers_config, to_diffusers
from lightweight_engine.flux.params import FluxParams
from lightweight_engine.flux.transformer import Flux


def peers(model: Flux, params: FluxParams, compile: bool) -> Iterator[tuple[str, nn.Module]]:
    """diffusers, its blocks compiled, its linears by torchao in fp8 and compiled, and by bitsandbytes in nf4."""
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    state = to_diffusers(model.state_dict(), params.hidden_size, params.mlp_hidden)

    def build() -> Any:
        with torch.device("meta"):
            peer = FluxTransformer2DModel(**diffusers_config(params))
        peer.load_state_dict(state, assign=True)  # views of ours: no second copy
        return peer.eval().requires_grad_(False)

    yield "diffusers, eager", build()
    if compile:
        compiled = build()
        compiled.compile_repeated_blocks(fullgraph=True)
        yield "diffusers, blocks compiled", compiled
        eight = torchao_twin(build())
        if eight is not None:
            eight.compile_repeated_blocks(fullgraph=True)
            yield "diffusers, torchao fp8, blocks compiled", eight
    four_bit = bitsandbytes_twin(build())
    if four_bit is not None:
        yield "diffusers, bitsandbytes nf4", four_bit


def torchao_twin(model: Any) -> Any:
    """Linears of the blocks, not of their modulation, in fp8 by rows, inputs too; None where it is not installed."""
    try:
        from torchao.quantization import (  # type: ignore[import-not-found]
            Float8DynamicActivationFloat8WeightConfig,
            PerRow,
            quantize_,
        )
    except ImportError as error:
        print(f"without torchao: {error}")
        return None

    def in_a_block(linear: nn.Module, path: str) -> bool:
        return isinstance(linear, nn.Linear) and "blocks" in path and ".norm" not in path

    quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()), filter_fn=in_a_block)
    return model


def bitsandbytes_twin(model: nn.Module) -> nn.Module | None:
    """The linears of the blocks as bitsandbytes keeps them; None where it is not installed."""
    try:
        import bitsandbytes  # type: ignore[import-not-found]
    except ImportError as error:
        print(f"without bitsandbytes: {error}")
        return None
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
