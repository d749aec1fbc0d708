"""Time of one transformer step on the CPU against diffusers' FluxTransformer2DModel with the same random weights.

Both run interleaved in one process; the ratio is that of the medians. ``python -m benchmarks.step``
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.report import publish, spread
from lightweight_engine.flux.conditioning import Conditioning
from lightweight_engine.flux.params import FluxParams
from lightweight_engine.flux.transformer import Flux
from lightweight_engine.flux.velocity import Velocity


def to_diffusers(state: dict[str, torch.Tensor], hidden: int, mlp: int) -> dict[str, torch.Tensor]:
    """BFL parameter names to those of diffusers, with the fused projections taken apart."""
    out: dict[str, torch.Tensor] = {}
    renamed = {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        "final_layer.linear": "proj_out",
        "img_attn.proj": "attn.to_out.0",
        "txt_attn.proj": "attn.to_add_out",
        "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
        "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
        "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
        "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
        "img_mlp.0": "ff.net.0.proj",
        "img_mlp.2": "ff.net.2",
        "txt_mlp.0": "ff_context.net.0.proj",
        "txt_mlp.2": "ff_context.net.2",
        "img_mod.lin": "norm1.linear",
        "txt_mod.lin": "norm1_context.linear",
        "linear2": "proj_out",
        "modulation.lin": "norm.linear",
        "norm.query_norm.scale": "attn.norm_q.weight",
        "norm.key_norm.scale": "attn.norm_k.weight",
    }
    fused = {
        "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    }
    for key, tensor in state.items():
        prefix, name = "", key
        if key.startswith(("double_blocks.", "single_blocks.")):
            kind, number, name = key.split(".", 2)
            prefix = f"{'transformer_blocks' if kind == 'double_blocks' else 'single_transformer_blocks'}.{number}."
        stem, _, leaf = name.rpartition(".")
        if name == "final_layer.adaLN_modulation.1." + leaf:
            shift, scale = tensor.chunk(2)
            out[f"norm_out.linear.{leaf}"] = torch.cat((scale, shift))
        elif stem in fused:
            sizes = [hidden] * 3 + [mlp] * (len(fused[stem]) - 3)
            for target, rows in zip(fused[stem], tensor.split(sizes), strict=True):
                out[f"{prefix}{target}.{leaf}"] = rows
        elif name in renamed:
            out[prefix + renamed[name]] = tensor
        else:
            out[f"{prefix}{renamed[stem]}.{leaf}"] = tensor
    return out


def diffusers_config(params: FluxParams) -> dict[str, Any]:
    """The arguments of diffusers' network of the same sizes."""
    return {
        "in_channels": params.in_channels,
        "num_layers": params.depth,
        "num_single_layers": params.depth_single_blocks,
        "attention_head_dim": params.head_dim,
        "num_attention_heads": params.num_heads,
        "joint_attention_dim": params.context_in_dim,
        "pooled_projection_dim": params.vec_in_dim,
        "guidance_embeds": params.guidance_embed,
        "axes_dims_rope": params.axes_dim,
    }


def build(params: FluxParams, dtype: torch.dtype) -> tuple[Flux, Any]:
    """Ours and diffusers' network with the same random weights."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    ours = Flux(params).to(dtype).eval().requires_grad_(False)
    peer = FluxTransformer2DModel(**diffusers_config(params))
    peer.load_state_dict(to_diffusers(ours.state_dict(), params.hidden_size, params.mlp_hidden))
    return ours, peer.to(dtype).eval().requires_grad_(False)


def steps_of(
    params: FluxParams, dtype: torch.dtype, tokens: tuple[int, int], text: int
) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]:
    """One step of ours and of diffusers' on the same inputs; both return tokens ``[1, L, C]``."""
    from lightweight_engine.flux.latents import pack

    ours, peer = build(params, dtype)
    rows, columns = tokens
    latent = torch.randn(1, params.in_channels // 4, rows * 2, columns * 2)
    cond = Conditioning(torch.randn(text, params.context_in_dim), torch.randn(params.vec_in_dim), 3.5)
    velocity = Velocity(ours)
    velocity.precompute([0.7], [cond])
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)[None]
    inputs = {
        "hidden_states": pack(latent).to(dtype),
        "encoder_hidden_states": cond.context[None].to(dtype),
        "pooled_projections": cond.pooled[None].to(dtype),
        "timestep": torch.tensor([0.7]).to(dtype),
        "guidance": torch.tensor([3.5]).to(dtype),
        "img_ids": ids.view(-1, 3),
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    }
    return lambda: pack(velocity(latent, 0.7, [cond])), lambda: peer(**inputs)[0]


def measure(ours: Callable[[], Any], peer: Callable[[], Any], runs: int) -> tuple[list[float], list[float]]:
    """Seconds of each, taken in turn after one warm-up."""
    times: tuple[list[float], list[float]] = ([], [])
    for run in range(-1, runs):
        for index, step in enumerate((ours, peer)):
            start = time.perf_counter()
            step()
            if run >= 0:
                times[index].append(time.perf_counter() - start)
    return times


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--depth", type=int, nargs=2, default=(2, 4), metavar=("DOUBLE", "SINGLE"))
    args = parser.parse_args()
    params = FluxParams(
        hidden_size=args.hidden,
        mlp_hidden=4 * args.hidden,
        num_heads=args.hidden // 128,
        depth=args.depth[0],
        depth_single_blocks=args.depth[1],
    )
    rows = []
    for name, dtype, tolerance in (("fp32", torch.float32, 1e-3), ("bf16", torch.bfloat16, 0.1)):
        ours, peer = steps_of(params, dtype, (32, 32), 256)
        difference = (ours().float() - peer().float()).norm() / peer().float().norm()
        if difference > tolerance:
            raise SystemExit(
                f"{name}: the two networks disagree by {difference:.1e}: the comparison would mean nothing"
            )
        mine, theirs = (spread(times) for times in measure(ours, peer, args.runs))
        rows.append(
            {
                "dtype": name,
                "ours_ms": mine["median"] * 1e3,
                "ours_min": mine["min"] * 1e3,
                "ours_max": mine["max"] * 1e3,
                "diffusers_ms": theirs["median"] * 1e3,
                "diffusers_min": theirs["min"] * 1e3,
                "diffusers_max": theirs["max"] * 1e3,
                "ratio": mine["median"] / theirs["median"],
                "difference": float(difference),
            }
        )
    publish("step", rows, hidden=args.hidden, blocks=list(args.depth), image_tokens=1024, text_tokens=256)


if __name__ == "__main__":
    main()
