"""One step of the full-size transformer on a GPU, beside its peers and beside the floor of the card.

    python -m benchmarks.gpu

Random weights of the published size, 768x1344 with 512 text tokens. Every way of computing a step runs in turn in one
process, the order turned around each round, and the medians are compared. The floor is what the matrix products and
attention of a step take by themselves, on the same card in the same run. Peers that are not installed are left out,
and the table says so.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.fullsize import SMALL, draw
from benchmarks.report import publish
from benchmarks.step import diffusers_config, to_diffusers
from lightweight_engine.backend.ahead import Ahead
from lightweight_engine.backend.linear import PackedLinear, store
from lightweight_engine.backend.lora_layers import attach
from lightweight_engine.backend.quantize import quantize
from lightweight_engine.core.describe import device_name
from lightweight_engine.flux.conditioning import Conditioning
from lightweight_engine.flux.latents import pack
from lightweight_engine.flux.load import linear_weights
from lightweight_engine.flux.params import FluxParams
from lightweight_engine.flux.transformer import Flux
from lightweight_engine.flux.units import unit_of
from lightweight_engine.flux.velocity import Velocity

BF16 = torch.bfloat16
SIGMA = 0.7
MODULATION = re.compile(r"mod(ulation)?\.lin$").search

Step = Callable[[], Any]


@dataclass(frozen=True)
class Task:
    """What a step is asked: sizes in tokens, and the inputs of both ways to ask.

    Attributes:
        rows, columns: of image tokens, 16 pixels a side.
        text: tokens of the text.
    """

    params: FluxParams
    rows: int
    columns: int
    text: int
    device: torch.device

    @property
    def tokens(self) -> int:
        return self.rows * self.columns

    def ours(self, model: Flux) -> Step:
        """A step of sampling: what does not depend on the latent was computed before."""
        params = self.params
        latent = torch.randn(1, params.in_channels // 4, self.rows * 2, self.columns * 2, device=self.device)
        condition = Conditioning(
            torch.randn(self.text, params.context_in_dim), torch.randn(params.vec_in_dim), guidance=3.5
        )
        velocity = Velocity(model)
        velocity.precompute([SIGMA], [condition])
        return lambda: velocity(latent, SIGMA, [condition])

    def theirs(self, model: nn.Module) -> Step:
        """The call that diffusers' pipeline makes."""
        params, device = self.params, self.device
        ids = torch.zeros(self.rows, self.columns, 3, device=device)
        ids[..., 1] = torch.arange(self.rows, device=device)[:, None]
        ids[..., 2] = torch.arange(self.columns, device=device)[None]
        latent = torch.randn(1, params.in_channels // 4, self.rows * 2, self.columns * 2, device=device)
        inputs = {
            "hidden_states": pack(latent).to(BF16),
            "encoder_hidden_states": torch.randn(1, self.text, params.context_in_dim, device=device, dtype=BF16),
            "pooled_projections": torch.randn(1, params.vec_in_dim, device=device, dtype=BF16),
            "timestep": torch.tensor([SIGMA], device=device, dtype=BF16),
            "guidance": torch.tensor([3.5], device=device, dtype=torch.float32),
            "img_ids": ids.view(-1, 3),
            "txt_ids": torch.zeros(self.text, 3, device=device),
            "return_dict": False,
        }
        return lambda: model(**inputs)


def random_model(params: FluxParams, device: torch.device) -> Flux:
    with torch.device("meta"):
        model = Flux(params)
    state = {name: draw(name, tuple(each.shape), BF16, device) for name, each in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def packed(model: Flux, params: FluxParams, format: str) -> Flux:
    """The same weights with the linears of the blocks, and of the modulation, in a storage format."""
    with torch.device("meta"):
        copy = Flux(params)
    copy.load_state_dict(model.state_dict(), assign=True)
    for name in linear_weights(model):
        if "blocks" in name:
            store(copy, name, quantize(model.get_parameter(name), format))  # type: ignore[arg-type]
    return copy.eval().requires_grad_(False)


def ahead(model: Flux) -> Flux:
    """The same with each weight unpacked while the product before it runs, as the engine does."""
    linears = [each for path, each in model.named_modules() if isinstance(each, PackedLinear) and not MODULATION(path)]
    Ahead(linears, BF16)
    return model


def at_hand(model: Flux, device: torch.device) -> Flux:
    """The same with the numbers of all block linears kept, as ``residency = fast`` does."""
    linears = [f"{path}.weight" for path, each in model.named_modules() if hasattr(each, "out_features")]
    names = [name for name in linears if unit_of("transformer", name).kind == "block"]
    attach(model, {}, device=device, dtype=BF16, at_hand=names)
    return model


def peers(model: Flux, task: Task, *, compile: bool) -> Iterator[tuple[str, Step]]:
    """diffusers' network with the very same weights, as it comes and compiled; with bitsandbytes' 4-bit linears."""
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    params = task.params
    state = to_diffusers(model.state_dict(), params.hidden_size, params.mlp_hidden)

    def build() -> Any:
        with torch.device("meta"):
            peer = FluxTransformer2DModel(**diffusers_config(params))
        peer.load_state_dict(state, assign=True)  # views of ours: no second copy
        return peer.eval().requires_grad_(False)

    yield "diffusers, eager", task.theirs(build())
    if compile:
        compiled = build()
        compiled.compile_repeated_blocks(fullgraph=True)
        yield "diffusers, blocks compiled", task.theirs(compiled)
    four_bit = bitsandbytes_twin(build())
    if four_bit is not None:
        yield "diffusers, bitsandbytes nf4", task.theirs(four_bit)


def bitsandbytes_twin(model: nn.Module) -> nn.Module | None:
    """The linears of the blocks as bitsandbytes keeps them; None where it is not installed."""
    try:
        import bitsandbytes  # type: ignore[import-not-found]
    except ImportError:
        return None
    for path, linear in list(model.named_modules()):
        if type(linear) is not nn.Linear or "blocks" not in path:
            continue
        bias = linear.bias is not None
        made = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=bias, compute_dtype=BF16, quant_type="nf4", device="meta"
        )
        made.weight = bitsandbytes.nn.Params4bit(linear.weight.cpu(), requires_grad=False, quant_type="nf4")
        made.bias = linear.bias
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, made.to(linear.weight.device))
    return model


def floor(task: Task) -> dict[str, float]:
    """Milliseconds of a step's matrix products and of its attention, each by itself, back to back."""
    params, device = task.params, task.device
    d, m, image, text = params.hidden_size, params.mlp_hidden, task.tokens, task.text
    double, single = params.depth, params.depth_single_blocks
    products = [(tokens, n, k, double) for tokens in (image, text) for n, k in ((3 * d, d), (d, d), (m, d), (d, m))]
    products += [(image + text, n, k, single) for n, k in ((3 * d + m, d), (d, d + m))]
    total = 0.0
    for tokens, out, width, count in products:
        x = torch.randn(tokens, width, device=device, dtype=BF16)
        weight, bias = torch.randn(out, width, device=device, dtype=BF16), torch.randn(out, device=device, dtype=BF16)
        total += count * milliseconds(lambda x=x, weight=weight, bias=bias: F.linear(x, weight, bias), count)
    q, k, v = torch.randn(3, 1, params.num_heads, image + text, params.head_dim, device=device, dtype=BF16)
    blocks = params.depth + params.depth_single_blocks
    attention = blocks * milliseconds(lambda: F.scaled_dot_product_attention(q, k, v), blocks)
    return {"products": total, "attention": attention}


def milliseconds(work: Step, count: int) -> float:
    """Of one of ``count`` calls that follow each other closely, the median of five rounds."""
    times = []
    for _ in range(6):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            work()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / count)
    return statistics.median(times[1:])


def in_turn(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each step, of rounds that go through all of them forwards and backwards by turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(-1, rounds):
        names = list(steps) if number % 2 else list(reversed(steps))
        for name in names:
            steps[name]()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            steps[name]()
            end.record()
            torch.cuda.synchronize()
            if number >= 0:
                times[name].append(start.elapsed_time(end))
    return times


def measure(task: Task, *, rounds: int, compile: bool) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The table, and the milliseconds that the floor consists of."""
    model = random_model(task.params, task.device)
    steps: dict[str, Step] = {
        "ours, bf16": task.ours(model),
        "ours, nf4": task.ours(ahead(packed(model, task.params, "nf4"))),
        "ours, nf4, nothing unpacked ahead": task.ours(packed(model, task.params, "nf4")),
        "ours, nf4, residency fast": task.ours(at_hand(packed(model, task.params, "nf4"), task.device)),
    }
    try:
        steps |= dict(peers(model, task, compile=compile))
    except ImportError as error:
        print(f"without peers: {error}")
    parts = floor(task)
    least, times = sum(parts.values()), in_turn(steps, rounds)
    eager = statistics.median(times.get("diffusers, eager", [float("nan")]))
    rows = [
        {
            "step": name,
            "ms": statistics.median(taken),
            "min": min(taken),
            "max": max(taken),
            "x floor": statistics.median(taken) / least,
            "x faster than eager": eager / statistics.median(taken),
        }
        for name, taken in times.items()
    ]
    return rows, {"floor": least, **parts}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--text", type=int, default=512, help="tokens of the text")
    parser.add_argument("--compile", action="store_true", help="diffusers with compiled blocks too")
    parser.add_argument("--small", action="store_true", help="a small network: whether it runs")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("a GPU is needed")
    device = torch.device("cuda")
    task = Task(SMALL.transformer if args.small else FluxParams(), 84, 48, args.text, device)
    rows, least = measure(task, rounds=args.rounds, compile=args.compile)
    name = "gpu_small" if args.small else "gpu"
    publish(name, rows, device=device_name(device), image="768x1344", text_tokens=args.text, floor_ms=least)


if __name__ == "__main__":
    main()
