"""What the autoencoder does between its convolutions, and its attention, beside torch's: ``python -m benchmarks.maps``

Feature maps of each level of a picture of 768x1344 in bfloat16. The floor of a norm is three passes over memory at the
speed of a copy measured beside it. A GPU is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import milliseconds
from benchmarks.report import publish
from lightweight_engine.backend.attention import attention
from lightweight_engine.backend.feature_maps import group_norm
from lightweight_engine.core.describe import device_name

MAPS = ((128, 1344, 768), (256, 1344, 768), (256, 672, 384), (512, 336, 192), (512, 168, 96))
CALLS = 20


def row(what: str, shape: tuple[int, ...], work: Callable[[], Any], floor: float | None = None) -> dict[str, Any]:
    """Milliseconds of a call that follows others closely, and the bytes that it takes beside what it is given."""
    work()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    taken = milliseconds(work, CALLS)
    room = (torch.cuda.max_memory_allocated() - before) / 2**20
    return {"what": what, "shape": "x".join(map(str, shape)), "ms": taken, "floor ms": floor, "room MiB": room}


def norms(channels: int, height: int, width: int) -> list[dict[str, Any]]:
    x = torch.randn(1, channels, height, width, device="cuda", dtype=torch.bfloat16)
    last = x.contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, channels, device="cuda", dtype=torch.bfloat16)
    floor = 1.5 * milliseconds(lambda: torch.empty_like(x).copy_(x), CALLS)

    def by_torch(x: Tensor) -> Tensor:
        return F.silu(F.group_norm(x, 32, weight, bias, 1e-6), inplace=True)

    by = partial(row, shape=(channels, height, width), floor=floor)
    return [
        by("norm, ours", work=lambda: group_norm(last, 32, weight, bias, 1e-6, silu=True)),
        by("norm, torch", work=lambda: by_torch(x)),
        by("norm, torch, channels last", work=lambda: by_torch(last)),
    ]


def attentions(tokens: int, dim: int) -> list[dict[str, Any]]:
    q, k, v = torch.randn(3, 1, 1, tokens, dim, device="cuda", dtype=torch.bfloat16)
    by = partial(row, shape=(tokens, dim))
    return [
        by("attention, ours", work=lambda: attention(q, k, v)),
        by("attention, torch's efficient", work=lambda: attention(q, k, v, backend="efficient")),
    ]


@torch.inference_mode()
def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("a GPU is needed")
    rows = [each for shape in MAPS for each in norms(*shape)] + attentions(168 * 96, 512)
    publish("maps", rows, device=device_name(torch.device("cuda")))


if __name__ == "__main__":
    main()
