"""The networks around the transformer on a GPU, each by itself: ``python -m benchmarks.parts``

Random weights of the published sizes; pictures of 768x1344, texts of 512 tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.fullsize import SMALL, Sizes, draw
from benchmarks.gpu import milliseconds
from benchmarks.report import publish
from lightweight_engine.backend.together import Neighbours, read_together
from lightweight_engine.core.describe import device_name
from lightweight_engine.flux.keymaps import Role
from lightweight_engine.flux.load import NETWORKS

TFLOP = {"decode": 10.30, "encode": 4.80, "T5, 512 tokens": 4.84, "CLIP": 0.013}
"""Of the published sizes."""


def network(role: Role, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Any:
    """A network of random weights, placed as when it is loaded: what is read together lies together, and those of
    convolutions have their channels last."""
    with torch.device("meta"):
        module: nn.Module = NETWORKS[role][1](sizes.of(role))
    shapes = {name: tuple(each.shape) for name, each in module.state_dict().items()}
    places = Neighbours(read_together(module), dict.fromkeys(shapes, dtype), shapes, device)
    state = {}
    for name, shape in shapes.items():
        drawn, place = draw(name, shape, dtype, device), places.place(name)
        state[name] = drawn if place is None else place.copy_(drawn)
    module.load_state_dict(state, assign=True)
    return module.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def row(part: str, dtype: torch.dtype, work: Callable[[], Any], calls: int = 5) -> dict[str, Any]:
    """Milliseconds of a call that follows others closely, and what they are of arithmetic and memory."""
    work()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    taken = milliseconds(work, calls)
    return {
        "part": part,
        "dtype": str(dtype).removeprefix("torch."),
        "ms": taken,
        "TFLOP/s": TFLOP[part] / taken * 1e3,
        "room GiB": (torch.cuda.max_memory_allocated() - before) / 2**30,
    }


def rows(sizes: Sizes, height: int, width: int, device: torch.device) -> list[dict[str, Any]]:
    made = []
    autoencoder = network("autoencoder", sizes, torch.bfloat16, device)
    latent = torch.randn(1, 16, height // 8, width // 8, device=device)
    picture = torch.rand(1, 3, height, width, device=device).bfloat16()
    made.append(row("decode", torch.bfloat16, lambda: autoencoder.decode(latent)))
    noise = torch.randn_like(latent)
    made.append(row("encode", torch.bfloat16, lambda: autoencoder.encode(picture, noise)))
    for dtype in (torch.float32, torch.bfloat16):
        t5 = network("t5", sizes, dtype, device)
        tokens = torch.randint(sizes.t5.vocab_size, (1, 512), device=device)
        made.append(row("T5, 512 tokens", dtype, lambda t5=t5, tokens=tokens: t5(tokens)))
    clip = network("clip", sizes, torch.float32, device)
    words = torch.randint(sizes.clip.vocab_size, (1, 77), device=device)
    made.append(row("CLIP", torch.float32, lambda: clip(words, 1)))
    return made


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small networks: whether it runs")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("a GPU is needed")
    device = torch.device("cuda")
    table = rows(SMALL if args.small else Sizes(), 1344, 768, device)
    publish("parts_small" if args.small else "parts", table, device=device_name(device))


if __name__ == "__main__":
    main()
