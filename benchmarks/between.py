"""What a transformer block does between its products, program by program: ``python -m benchmarks.between``

At the sizes of a step of 768x1344 with 512 text tokens. The floor is the bytes that a program reads and writes, at the
speed of a copy measured beside it. Each is run with several numbers of warps, the one that the engine takes first.
The host's time is what starting one takes it, measured on tensors of one token. A GPU is needed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import milliseconds
from benchmarks.report import publish
from lightweight_engine.backend.kernels import fused
from lightweight_engine.core.describe import device_name

TOKENS = 48 * 84 + 512
WIDTH, MLP, HEADS = 3072, 12288, 24
WARPS = (4, 8, 16)
CALLS, STARTS = 20, 200
EIGHT = fused.EIGHT_BITS
BF16 = torch.bfloat16


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=BF16)


def programs(tokens: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """Name -> (a call, the bytes that it reads and writes)."""
    x, update, attended = (randn(1, tokens, WIDTH) for _ in range(3))
    gate, shift, scale = randn(1, 1, 3 * WIDTH).chunk(3, dim=-1)
    wide, single, qkv = randn(1, tokens, MLP), randn(1, tokens, 3 * WIDTH + MLP), randn(1, tokens, 3 * WIDTH)
    gains = randn(2, WIDTH // HEADS)
    angles = torch.randn(tokens, WIDTH // HEADS // 2, device="cuda")
    rotary = torch.polar(torch.ones_like(angles), angles)
    one, mlp = 2 * tokens * WIDTH, 2 * tokens * MLP
    return {
        "residual and norm": (lambda: fused.residual_norm(x, (gate, update), (shift, scale)), 4 * one),
        "residual and norm, in rows": (
            lambda: fused.residual_norm(x, (gate, update), (shift, scale), rows=EIGHT),
            3 * one + one // 2,
        ),
        "rows": (lambda: fused.in_rows(attended), one + one // 2),
        "GELU in rows": (lambda: fused.in_rows(None, wide), mlp + mlp // 2),
        "GELU in rows beside attention": (
            lambda: fused.in_rows(attended, single[..., 3 * WIDTH :]),
            one + mlp + (one + mlp) // 2,
        ),
        "GELU beside attention": (lambda: fused.gelu_beside(attended, single), 2 * (one + mlp)),
        "heads": (lambda: fused.heads([(qkv, gains[0], gains[1])], rotary), 4 * one),
    }


def replayed(work: Callable[[], Any]) -> float:
    """Milliseconds of the GPU for one call."""
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            work()
    return milliseconds(graph.replay, 1) / CALLS


def started(work: Callable[[], Any]) -> float:
    """Microseconds of the host for one call, while the GPU keeps up."""
    work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STARTS):
        work()
    taken = time.perf_counter() - start
    torch.cuda.synchronize()
    return taken / STARTS * 1e6


@contextmanager
def with_warps(count: int) -> Iterator[None]:
    def launch(program: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        genuine(program, grid, *arguments, **{**constants, "num_warps": count})

    genuine = fused.launch
    with mock.patch.object(fused, "launch", launch):
        yield


def rows() -> list[dict[str, Any]]:
    x = randn(1, TOKENS, MLP)
    copied = 2 * x.nbytes / replayed(lambda: torch.empty_like(x).copy_(x))
    small, table = programs(1), []
    for name, (work, nbytes) in programs(TOKENS).items():
        row: dict[str, Any] = {"what": name, "ms": replayed(work), "floor ms": nbytes / copied}
        for count in WARPS:
            with with_warps(count):
                row[f"{count} warps"] = replayed(work)
        table.append({**row, "host us": started(small[name][0])})
    few, weight = randn(1, WIDTH), randn(WIDTH, WIDTH)
    bare = {"what": "a linear of torch, for the host's time", "ms": None, "floor ms": None}
    return [*table, {**bare, "host us": started(lambda: F.linear(few, weight))}]


@torch.inference_mode()
def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("a GPU is needed")
    publish("between", rows(), device=device_name(torch.device("cuda")))


if __name__ == "__main__":
    main()
