"""An ESRGAN of the published size on a GPU, ours beside spandrel's: ``python -m benchmarks.upscaler [--shapes]``

Random weights; a picture of 768x1344 to 4x in the usual tiles, in turn in one process, the network's way to the device
included. Levels are compared with spandrel's network in float32 without TF32. ``--shapes`` times ways to cut the
convolutions into programs instead; ``--small`` shows whether it runs, on a CPU as well.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import spandrel
import torch
from spandrel.architectures.ESRGAN.__arch.RRDB import RRDBNet
from torch import nn

from benchmarks.gpu import milliseconds
from benchmarks.report import publish, write
from lightweight_engine.backend.convolutions import Convolution, Maps, Sums
from lightweight_engine.backend.kernels.convolution import Lines, Shape
from lightweight_engine.core.describe import device_name
from lightweight_engine.core.plan import MOST_TILES
from lightweight_engine.upscalers import tiles
from lightweight_engine.upscalers.dense import dense_network
from lightweight_engine.upscalers.files import Tiling
from lightweight_engine.upscalers.networks import NetworkUpscaler, tile_bytes

SCALE = 4
ROUNDS = 5
BEST = 10  # shapes that are told of each convolution


def coloured(blocks: int, together: int, device: torch.device) -> NetworkUpscaler:
    """An upscaler of random weights, its last convolution such that colours spread over all levels."""
    torch.manual_seed(1)
    descriptor: Any = spandrel.ModelLoader().load_from_state_dict(RRDBNet(num_blocks=blocks, scale=SCALE).state_dict())
    model = descriptor.model.to(device)
    made = model(torch.rand(1, 3, 64, 64, device=device))
    last, spread = model.model[-1], 0.2 / made.std()
    last.bias.data = 0.5 + (last.bias.data - made.mean((0, 2, 3))) * spread
    last.weight.data = last.weight.data * spread
    descriptor.model.cpu()
    return NetworkUpscaler("x", descriptor, Tiling(), device, room=together * tile_bytes(Tiling().tile, SCALE))


def operations(model: nn.Module, tile: int, count: int) -> float:
    """Multiplications and additions of so many tiles."""
    total, pixels = 0, count * tile**2
    for layer in model.model:  # type: ignore[union-attr]
        pixels *= 4 if isinstance(layer, nn.Upsample) else 1
        total += pixels * sum(2 * each.weight.numel() for each in layer.modules() if isinstance(each, nn.Conv2d))
    return total


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def room(work: Callable[[], Any]) -> float | None:
    """GiB of the device that a call takes."""
    if not torch.cuda.is_available():
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def rows(height: int, width: int, blocks: int, together: int, device: torch.device) -> list[dict[str, Any]]:
    torch.manual_seed(3)
    levels = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    ours, theirs = (coloured(blocks, together, device) for _ in range(2))
    theirs._dense, ours._dense = None, ours._dense or dense_network(ours._network.model)
    torch.backends.cudnn.allow_tf32 = False
    exact = theirs.upscale(levels, SCALE).int()
    torch.backends.cudnn.allow_tf32 = True
    networks = {"spandrel, float32 (TF32)": theirs, "ours": ours}
    made = {name: network.upscale(levels, SCALE).int() for name, network in networks.items()}
    taken = {name: room(lambda network=network: network.upscale(levels, SCALE)) for name, network in networks.items()}
    times: dict[str, list[float]] = {name: [] for name in networks}
    for number in range(ROUNDS):
        for name in list(networks)[:: 1 if number % 2 else -1]:
            times[name].append(seconds(lambda name=name: networks[name].upscale(levels, SCALE)))
    tiling = Tiling()
    count = len(tiles.split((width, height), tiling.tile, tiling.overlap))
    flops, medians = operations(ours._network.model, tiling.tile, count), {}
    table = []
    for name in networks:
        medians[name], off = statistics.median(times[name]), (made[name] - exact).abs()
        table.append(
            {
                "network": name,
                "ms": 1e3 * medians[name],
                "TFLOP/s": flops / medians[name] / 1e12,
                "x faster": medians["spandrel, float32 (TF32)"] / medians[name],
                "levels off": int(off.max()),
                "share off": float((off > 0).float().mean()),
                "room GiB": taken[name],
            }
        )
    return table


@dataclass(frozen=True)
class Kind:
    """A convolution of the network, of tiles as large as ``side``."""

    read: int
    made: int
    side: int = 192
    sums: bool = False
    doubled: bool = False


KINDS = {
    "first of a block": Kind(64, 32),
    "fourth": Kind(160, 32),
    "last": Kind(192, 64, sums=True),
    "doubled": Kind(64, 64, side=384, doubled=True),
}
PRODUCTS = ((32, 3), (32, 4), (64, 3))
"""Depth and stages."""
PATCHES = ((8, 4), (8, 8), (16, 8))
"""Lines and warps, of programs that do patches."""
SEGMENTS = ((1, 4, 9), (1, 4, 12), (2, 4, 9), (2, 8, 9), (4, 8, 10))
"""Segments, warps and lines of each, of programs that go down the lines: so many that all processors have as much."""


def shapes(kind: Kind) -> Iterator[Shape | Lines]:
    for group, (lines, warps), (depth, stages), copied in product((1, 2), PATCHES, PRODUCTS, (8, 16)):
        yield Shape(group, lines, 16, depth, warps, stages, copied)
    if kind.doubled:
        return
    made = sorted({32, kind.made})
    for (segments, warps, lines), block, (depth, stages), copied, held in product(
        SEGMENTS, made, PRODUCTS, ((8, 8), (8, 16), (16, 16)), (True, False)
    ):
        yield Lines(segments, 64, lines, block, depth, warps, stages, *copied, held)


def shape_row(label: str, shape: Shape | Lines, batch: int, device: torch.device) -> dict[str, Any] | None:
    """Milliseconds and TFLOP/s of what is asked for; None where it does not fit the device."""
    from triton.runtime.errors import OutOfResources

    kind = KINDS[label]
    weight, bias = torch.randn(kind.made, kind.read, 3, 3) / (9 * kind.read) ** 0.5, torch.randn(kind.made)
    convolution = Convolution(weight, bias, shape).to(device)
    stride = 192 if kind.side == 192 else kind.read
    maps = Maps.empty((batch, kind.side, kind.side), stride, device=device)
    maps.inside.normal_()
    side = kind.side * (2 if kind.doubled else 1)
    out = Maps.empty((batch, side, side), kind.made if kind.doubled else 192, device=device).channels(0, kind.made)
    trunk = torch.zeros(batch, side, side, kind.made, device=device) if kind.sums else None
    sums = None if trunk is None else Sums(trunk, 0.2, keep=trunk)
    read = maps.channels(0, kind.read)

    def work() -> None:
        convolution(read, out.inside, slope=1.0 if kind.sums else 0.2, doubled=kind.doubled, sums=sums)

    try:
        work()
    except OutOfResources:
        return None
    taken = milliseconds(work, 10)
    flops = 18 * kind.read * kind.made * batch * side**2
    return {"convolution": label, "shape": str(shape), "ms": taken, "TFLOP/s": flops / taken / 1e9}


def shape_rows(batch: int, device: torch.device) -> list[dict[str, Any]]:
    """The quickest shapes for each convolution; written after each convolution."""
    table: list[dict[str, Any]] = []
    for label in KINDS:
        found = [row for shape in shapes(KINDS[label]) if (row := shape_row(label, shape, batch, device))]
        table += sorted(found, key=lambda row: row["ms"])[:BEST]
        write("upscaler_shapes", table, device=device_name(device))
    return table


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="few blocks and a small picture: whether it runs")
    parser.add_argument("--shapes", action="store_true", help="time the shapes of programs; a GPU is needed")
    parser.add_argument("--together", type=int, default=MOST_TILES, help="tiles at once, at most (default: a job's)")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and (args.shapes or not args.small):
        raise SystemExit("a GPU is needed; --small runs without")
    if args.shapes:
        publish("upscaler_shapes", shape_rows(2 if args.small else args.together, device), device=device_name(device))
        return
    size = (96, 64, 1) if args.small else (1344, 768, 23)
    table = rows(*size, args.together, device)
    name = "upscaler_small" if args.small else "upscaler"
    publish(name, table, together=args.together, device=device_name(device))


if __name__ == "__main__":
    main()
