"""One step of the full-size transformer on a GPU, beside its peers and beside the floor of the card.

    python -m benchmarks.gpu

Random weights of the published size, 768x1344 with 512 text tokens. Every way of computing a step runs in turn in one
process, the order turned around each round, and the medians are compared. The floor is the matrix products and the
attention of a step with nothing between them, in turn with the others, as the card's clock falls under load: figures
are of a card that never rests and, beside them, of one that rests half a second before each step and the one before it.
Peers that are not installed are left out, and the table says so.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.fullsize import SMALL, draw
from benchmarks.report import publish, write
from lightweight_engine.backend import eight_bit
from lightweight_engine.backend.ahead import Ahead
from lightweight_engine.backend.attention import attention
from lightweight_engine.backend.eight_bit import EightBitLinear, multiply_as_stored
from lightweight_engine.backend.linear import PackedLinear, store
from lightweight_engine.backend.lora import Change
from lightweight_engine.backend.lora_algorithms import LowRank
from lightweight_engine.backend.lora_layers import Changes, attach
from lightweight_engine.backend.packed import Packed
from lightweight_engine.backend.quantize import ROWS, quantize
from lightweight_engine.core.describe import device_name
from lightweight_engine.flux.conditioning import Conditioning
from lightweight_engine.flux.latents import pack, unpack
from lightweight_engine.flux.load import linear_weights
from lightweight_engine.flux.params import FluxParams
from lightweight_engine.flux.recorded import Recorded
from lightweight_engine.flux.transformer import Flux
from lightweight_engine.flux.units import unit_of
from lightweight_engine.flux.velocity import Velocity

BF16 = torch.bfloat16
REST = 0.5  # seconds, in which the card's clock recovers
SIGMA, GUIDANCE = 0.5, 4.0  # exact in bfloat16, a thousand of them too
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

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """A latent, a text and a pooled text, the same at each call, rounded to bfloat16."""
        random, params = torch.Generator().manual_seed(1), self.params
        shapes = (
            (1, params.in_channels // 4, self.rows * 2, self.columns * 2),
            (self.text, params.context_in_dim),
            (params.vec_in_dim,),
        )
        latent, text, pooled = (torch.randn(shape, generator=random).bfloat16() for shape in shapes)
        return latent.to(self.device), text, pooled

    def ours(self, model: Flux, pictures: int = 1, *, record: bool = True) -> Step:
        """A step of sampling: what does not depend on the latent was computed before; replayed, as in a pass."""
        latent, text, pooled = self.inputs()
        latent, condition = latent.expand(pictures, -1, -1, -1), Conditioning(text, pooled, guidance=GUIDANCE)
        velocity = Velocity(model, Recorded(model, lambda: "here", trial=1) if record else None)
        velocity.precompute([SIGMA], [condition])
        return lambda: velocity(latent, SIGMA, [condition] * pictures)

    def theirs(self, model: nn.Module) -> Step:
        """The call that diffusers' pipeline makes."""
        device = self.device
        ids = torch.zeros(self.rows, self.columns, 3, device=device)
        ids[..., 1] = torch.arange(self.rows, device=device)[:, None]
        ids[..., 2] = torch.arange(self.columns, device=device)[None]
        latent, text, pooled = self.inputs()
        inputs = {
            "hidden_states": pack(latent),
            "encoder_hidden_states": text[None].to(device),
            "pooled_projections": pooled[None].to(device),
            "timestep": torch.tensor([SIGMA], device=device, dtype=BF16),
            "guidance": torch.tensor([GUIDANCE], device=device, dtype=torch.float32),
            "img_ids": ids.view(-1, 3),
            "txt_ids": torch.zeros(self.text, 3, device=device),
            "return_dict": False,
        }
        return lambda: model(**inputs)


@dataclass(frozen=True)
class Way:
    """A way to compute a step.

    Attributes:
        pictures: that it computes at once.
        eight_bits: whether its products are in 8 bits.
    """

    step: Step
    pictures: int = 1
    eight_bits: bool = False


def random_model(params: FluxParams, device: torch.device) -> Flux:
    with torch.device("meta"):
        model = Flux(params)
    state = {name: draw(name, tuple(each.shape), BF16, device) for name, each in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


Weights = dict[str, Packed]


def in_format(model: Flux, format: str) -> Weights:
    """The linears of the blocks in a storage format, and those of the modulation where it is no matter of products."""
    names = block_linears(model) if format == ROWS else [name for name in linear_weights(model) if "blocks" in name]
    return {name: quantize(model.get_parameter(name), format) for name in names}


def packed(model: Flux, params: FluxParams, weights: Weights) -> Flux:
    """A network of the same parameters but for these weights; none is copied."""
    with torch.device("meta"):
        made = Flux(params)
    made.load_state_dict(model.state_dict(), assign=True)
    for name, weight in weights.items():
        store(made, name, weight)
    multiply_as_stored(made)
    return made.eval().requires_grad_(False)


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


def block_linears(model: Flux) -> list[str]:
    return sorted(name for name in linear_weights(model) if unit_of("transformer", name).kind == "block")


FLOORS = {False: "floor", True: "floor in 8 bits"}


def floor(task: Task, model: Flux) -> Step:
    """The matrix products of a step, with the model's own weights, and its attention, and nothing between them."""
    params = task.params
    joint = task.tokens + task.text
    inputs = {
        (tokens, width): torch.randn(1, tokens, width, device=task.device, dtype=BF16)
        for tokens in (task.tokens, task.text, joint)
        for width in (params.hidden_size, params.mlp_hidden, params.hidden_size + params.mlp_hidden)
    }
    q, k, v = torch.randn(3, 1, params.num_heads, joint, params.head_dim, device=task.device, dtype=BF16)
    work: list[Step] = []
    for blocks in (model.double_blocks, model.single_blocks):
        for block in blocks:
            for path, linear in block.named_modules():
                if not hasattr(linear, "out_features") or "mod" in path:
                    continue
                tokens = joint if path.startswith("linear") else task.text if path.startswith("txt") else task.tokens
                x = inputs[tokens, linear.in_features]
                if isinstance(linear, EightBitLinear):
                    work.append(partial(linear, eight_bit.in_rows(x)))
                else:
                    work.append(partial(F.linear, x, linear.weight, linear.bias))
            work.append(lambda: attention(q, k, v))

    def step() -> None:
        for each in work:
            each()

    return step


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


def in_turn(steps: dict[str, Step], rounds: int, rest: float = 0.0) -> Iterator[dict[str, list[float]]]:
    """Milliseconds of each step so far, after each of the rounds that go through all of them forwards and backwards by
    turns; the first round warms up. The card rests so many seconds before each, which is computed twice in a row."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(-1, rounds):
        names = list(steps) if number % 2 else list(reversed(steps))
        for name in names:
            time.sleep(rest)
            steps[name]()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            steps[name]()
            end.record()
            torch.cuda.synchronize()
            if number >= 0:
                times[name].append(start.elapsed_time(end))
        if number >= 0:
            yield times


Builders = dict[str, Callable[[], Way]]
"""Ways by what they are called, each built when it is asked for: that takes seconds, and all of them fill a card."""


def ours(task: Task, model: Flux, lora: int) -> Builders:
    """Our ways to compute a step."""
    params, device = task.params, task.device
    changes = cache(lambda: random_changes(model, lora))
    formats = cache(lambda format: in_format(model, format))

    def nf4() -> Flux:
        return packed(model, params, formats("nf4"))

    def fp8() -> Flux:
        return packed(model, params, formats(ROWS))

    def changed(twin: Flux, kept: Sequence[str] = ()) -> Flux:
        attach(twin, changes(), device=device, dtype=BF16, at_hand=kept)
        return twin

    ways: Builders = {
        "ours, bf16": lambda: Way(task.ours(model)),
        "ours, bf16, not replayed": lambda: Way(task.ours(model, record=False)),
        "ours, bf16, four at once": lambda: Way(task.ours(model, 4), pictures=4),
        "ours, nf4": lambda: Way(task.ours(ahead(nf4()))),
        "ours, nf4, residency fast": lambda: Way(task.ours(at_hand(nf4(), device))),
    }
    if lora:
        ways[f"ours, nf4, LoRA of rank {lora}"] = lambda: Way(task.ours(changed(ahead(nf4()))))
    if not eight_bit.available(device):
        return ways
    ways |= {
        "ours, fp8": lambda: Way(task.ours(fp8()), eight_bits=True),
        "ours, fp8, not replayed": lambda: Way(task.ours(fp8(), record=False), eight_bits=True),
        "ours, fp8, four at once": lambda: Way(task.ours(fp8(), 4), pictures=4, eight_bits=True),
    }
    if lora:
        name = f"ours, fp8, LoRA of rank {lora}"
        ways[name] = lambda: Way(task.ours(changed(fp8())), eight_bits=True)
        ways[f"{name}, residency fast"] = lambda: Way(task.ours(changed(fp8(), list(changes()))), eight_bits=True)
    return ways


def theirs(task: Task, model: Flux, compile: bool) -> Builders:
    """The peers' ways, of the same weights."""
    try:
        from benchmarks.gpu_peers import peers

        built = peers(model, task.params, compile)
    except ImportError as error:
        print(f"without peers: {error}")
        return {}
    return {
        name: lambda build=build, name=name: Way(task.theirs(build()), eight_bits="fp8" in name)
        for name, build in built.items()
    }


def random_changes(model: Flux, rank: int) -> dict[str, Changes]:
    """A LoRA on every linear of the blocks."""
    made: dict[str, Changes] = {}
    for name in block_linears(model):
        out, width = model.get_parameter(name).shape
        down, up = torch.randn(rank, width) / width**0.5, torch.randn(out, rank) / rank
        made[name] = [(Change(LowRank(down=down, up=up)), 0.1)]
    return made


def measure(
    task: Task, *, rounds: int, compile: bool, lora: int, only: str
) -> Iterator[tuple[list[dict[str, Any]], dict[str, float]]]:
    """The table after each round, and the milliseconds that the floors consist of."""
    exact = reference(task)
    torch.cuda.empty_cache()
    model = random_model(task.params, task.device)
    builders = ours(task, model, lora) | theirs(task, model, compile)
    ways: dict[str, Way] = {}
    errors: dict[str, float] = {}
    for name in (name for name in builders if re.search(only, name)):
        start = time.perf_counter()
        try:
            ways[name] = builders[name]()
        except ImportError as error:
            print(f"without {name}: {error}")
            continue
        built = time.perf_counter()
        errors[name] = error_of(ways[name], exact)  # peers are compiled here
        took = f"built in {built - start:.1f} s, first call {time.perf_counter() - built:.1f} s"
        print(f"{name}: error {errors[name]:.4f}, {took}", flush=True)
    floors = {FLOORS[False]: floor(task, model)}
    if eight_bit.available(task.device):
        floors[FLOORS[True]] = floor(task, packed(model, task.params, in_format(model, ROWS)))
    steps = {name: way.step for name, way in ways.items()} | floors
    *_, rested = in_turn(steps, rounds, REST)
    for times in in_turn(steps, rounds):
        rows = [
            {
                "step": name,
                **compared(name, way, times),
                **{f"rested, {what}": figure for what, figure in compared(name, way, rested).items()},
                "error": errors[name],
            }
            for name, way in ways.items()
        ]
        yield (
            rows,
            {
                f"{label}{name}": statistics.median(found[name])
                for label, found in (("", times), ("rested, ", rested))
                for name in floors
            },
        )


def compared(name: str, way: Way, times: dict[str, list[float]]) -> dict[str, float]:
    """Milliseconds for a picture, beside those of the floor and of diffusers."""
    taken = [each / way.pictures for each in times[name]]
    median, least = statistics.median(taken), statistics.median(times[FLOORS[way.eight_bits]])
    eager = statistics.median(times.get("diffusers, eager", [float("nan")]))
    return {"ms": median, "min": min(taken), "max": max(taken), "x floor": median / least, "x eager": eager / median}


def reference(task: Task) -> Tensor:
    """The result in float32, of the same weights and inputs."""
    model = random_model(task.params, task.device).float()
    return task.ours(model, record=False)()[0].cpu()


def error_of(way: Way, exact: Tensor) -> float:
    """How far the first picture is from the result in float32, relative to that."""
    made = way.step()
    made = made[0] if isinstance(made, tuple) else made
    made = made[0].float().cpu()
    if made.shape != exact.shape:  # tokens, as diffusers has them
        made = unpack(made[None], *exact.shape[-2:])[0]
    return float((made - exact).norm() / exact.norm())


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--text", type=int, default=512, help="tokens of the text")
    parser.add_argument("--compile", action="store_true", help="diffusers with compiled blocks too, and torchao's fp8")
    parser.add_argument("--only", default="", help="ways whose names have this in them, a regular expression")
    parser.add_argument("--lora", type=int, default=64, help="rank of LoRAs on every linear; 0 for none")
    parser.add_argument("--small", action="store_true", help="a small network: whether it runs")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("a GPU is needed")
    device = torch.device("cuda")
    task = Task(SMALL.transformer if args.small else FluxParams(), 84, 48, args.text, device)
    name = f"gpu{'_small' * args.small}{'_compiled' * args.compile}"
    facts = {"image": "768x1344", "text_tokens": args.text}
    facts["device"] = device_name(device)
    rows, least = [], {}
    for rows, least in measure(task, rounds=args.rounds, compile=args.compile, lora=args.lora, only=args.only):
        write(name, rows, floor_ms=least, **facts)  # a run may be cut off
    publish(name, rows, floor_ms=least, **facts)


if __name__ == "__main__":
    main()
