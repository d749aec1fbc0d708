"""How fast packed weights become bf16 on a GPU, against the card's own copy. ``python -m benchmarks.dequantize``

For every matrix of a Flux block: GB/s read and written, and for all of them together the time and the share of what a
device-to-device copy moves in the same run. The programs in Triton are set against plain torch and, where it can be
imported, bitsandbytes. Buffers rotate, so that nothing is found in the second-level cache; short programs run as a
graph, so that the host's launches are not what is measured. "With LoRA" adds a change of low rank on the way, whose
factors are not counted among the bytes. ``--variants`` also measures other ways to part the 4-bit work.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from benchmarks.report import publish
from lightweight_engine.backend import kernels
from lightweight_engine.backend.block_types import BLOCK_TYPES
from lightweight_engine.backend.fp8 import Float8
from lightweight_engine.backend.gguf import Blocks
from lightweight_engine.backend.kernels import dequantize, quantize
from lightweight_engine.backend.kernels.dequantize import CHANGED_TILE, TILE, ChangedTile, Tile
from lightweight_engine.backend.nf4 import FourBit, code_book, quantize_4bit
from lightweight_engine.backend.packed import Added, Packed, Spec

# (out, in) of the matrices of a Flux transformer; the model has 38 of each, beside the modulation.
SHAPES = [(3072, 3072), (9216, 3072), (12288, 3072), (3072, 12288), (21504, 3072), (3072, 15360)]
OF_EACH = 38
ROTATED = 400 << 20  # bytes: several times the second-level cache of any card
ROUNDS = 8  # of all buffers in a graph, so that its start does not count
RUNS = 25
WARM_UP = 5

VARIANTS = [
    Tile("shared", 512, 1, 4),
    Tile("shared", 1024, 1, 8),
    Tile("shared", 1024, 1, 4),
    Tile("shared", 256, 1, 8),
    Tile("shared", 128, 4, 4),
    Tile("cache", 128, 1, 4),
    Tile("cache", 128, 4, 4),
    Tile("cache", 512, 1, 4),
]
CHANGED_VARIANTS = [
    ChangedTile(64, 128, 8),
    ChangedTile(128, 64, 4),
    ChangedTile(128, 64, 8),
    ChangedTile(64, 64, 4),
    ChangedTile(128, 128, 8),
    ChangedTile(64, 256, 8),
]
RANKS = (16, 64, 128)

Call = Callable[[], object]


@dataclass(frozen=True)
class Contender:
    """``prepare`` makes one call, with buffers of its own, and says how many bytes it reads and writes."""

    format: str
    how: str
    prepare: Callable[[tuple[int, int]], tuple[Call, int]]
    as_graph: bool = True


def milliseconds(calls: list[Call], as_graph: bool) -> float:
    """The median time of one of the calls, which run one after the other."""
    rounds = ROUNDS if as_graph else 1

    def each() -> None:
        for call in calls * rounds:
            call()

    each()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    if as_graph:
        with torch.cuda.graph(graph):
            each()
    run, times = graph.replay if as_graph else each, []
    for _ in range(WARM_UP + RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / len(calls) / rounds)
    return statistics.median(times[WARM_UP:])


def measure(contender: Contender, shape: tuple[int, int]) -> tuple[float, int]:
    """Milliseconds and bytes of a call."""
    first, nbytes = contender.prepare(shape)
    calls = [first, *(contender.prepare(shape)[0] for _ in range(ROTATED // nbytes))]
    return milliseconds(calls, contender.as_graph), nbytes


def copied(nbytes: int) -> tuple[Call, int]:
    """A copy that reads and writes ``nbytes`` in all."""
    source, target = (torch.empty(nbytes // 2, dtype=torch.uint8, device="cuda") for _ in range(2))
    return partial(target.copy_, source.random_(256)), nbytes


def copy_like_nf4(shape: tuple[int, int]) -> tuple[Call, int]:
    return copied(FourBit("nf4", shape).nbytes + 2 * shape[0] * shape[1])


def fastest_copy() -> float:
    """Bytes a second that a large copy moves."""
    call, nbytes = copied(1 << 30)
    return nbytes / min(milliseconds([call], as_graph) for as_graph in (False, True)) * 1e3


def random_part(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if dtype == torch.float32:
        return torch.rand(shape, device="cuda")
    part = torch.randint(256, shape, dtype=torch.uint8, device="cuda")
    return part if dtype == torch.uint8 else part.view(dtype)


def packed(spec: Spec) -> Packed:
    return Packed(spec, {name: random_part(name, *row) for name, row in spec.parts.items()})


def bf16(shape: tuple[int, int]) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda")


def by_triton(matrix: Packed, out: Tensor, tile: Tile) -> Tensor:
    spec, parts = matrix.spec, tuple(matrix.parts.values())
    if isinstance(spec, Float8):
        return dequantize.float8(parts[0], matrix.parts.get("scale"), out)
    if isinstance(spec, Blocks):
        return dequantize.gguf_blocks(spec.type, parts[0], out)
    assert isinstance(spec, FourBit)
    table = dequantize.constant(tuple(code_book(spec.kind).tolist()), out.device)
    if spec.nested_block_size:
        codes, absmax, nested_absmax, nested_map, offset = parts
        nested = (nested_absmax, nested_map, offset, spec.nested_block_size)
        return dequantize.four_bit_nested(codes, absmax, *nested, table, spec.block_size, out, tile)
    return dequantize.four_bit(parts[0], parts[1], table, spec.block_size, out, tile)


def with_triton(make: Callable[[tuple[int, int]], Spec], tile: Tile, shape: tuple[int, int]) -> tuple[Call, int]:
    matrix, out = packed(make(shape)), bf16(shape)
    return partial(by_triton, matrix, out, tile), matrix.nbytes + out.nbytes


def factors(shape: tuple[int, int], rank: int) -> Added:
    up, down = torch.randn(rank, shape[0], device="cuda") / rank, torch.randn(rank, shape[1], device="cuda")
    return up.bfloat16().t(), down.bfloat16()


def changed(matrix: Packed, added: Added, out: Tensor, tile: ChangedTile) -> Tensor:
    assert isinstance(matrix.spec, FourBit)
    codes, absmax, *rest = matrix.parts.values()
    table = dequantize.constant(tuple(code_book(matrix.spec.kind).tolist()), out.device)
    nested = (*rest, matrix.spec.nested_block_size) if rest else None
    return dequantize.four_bit_changed(codes, absmax, table, matrix.spec.block_size, *added, out, nested, tile)  # type: ignore[arg-type]


def with_lora(
    make: Callable[[tuple[int, int]], Spec], rank: int, tile: ChangedTile, shape: tuple[int, int]
) -> tuple[Call, int]:
    matrix, out = packed(make(shape)), bf16(shape)
    return partial(changed, matrix, factors(shape, rank), out, tile), matrix.nbytes + out.nbytes


def with_torch(make: Callable[[tuple[int, int]], Spec], shape: tuple[int, int]) -> tuple[Call, int]:
    matrix = packed(make(shape))
    return partial(matrix.dequantize, torch.bfloat16), matrix.nbytes + 2 * shape[0] * shape[1]


def with_bitsandbytes(shape: tuple[int, int]) -> tuple[Call, int]:
    from bitsandbytes import functional

    matrix, out = packed(FourBit("nf4", shape)), bf16(shape)
    codes, absmax = matrix.parts["codes"].view(-1, 1), matrix.parts["absmax"]
    call = partial(functional.dequantize_4bit, codes, absmax=absmax, out=out, blocksize=64, quant_type="nf4")
    return call, matrix.nbytes + out.nbytes


def quantized_by(program: Callable[[Tensor], object], shape: tuple[int, int]) -> tuple[Call, int]:
    matrix = torch.randn(shape, device="cuda").bfloat16()
    return partial(program, matrix), matrix.nbytes + FourBit("nf4", shape).nbytes


def quantize_by_triton(matrix: Tensor) -> object:
    return quantize.four_bit(matrix, dequantize.constant(tuple(code_book("nf4").tolist()), matrix.device), 64)


def specs() -> dict[str, Callable[[tuple[int, int]], Spec]]:
    return {
        "nf4": partial(FourBit, "nf4"),
        "nf4 nested": lambda shape: FourBit("nf4", shape, 64, 256),
        "fp8 e4m3": lambda shape: Float8("fp8_e4m3", shape, 1),
        **{name: partial(Blocks, name) for name in BLOCK_TYPES},
    }


def contenders(variants: bool) -> Iterator[Contender]:
    yield Contender("copy", "torch", copy_like_nf4)
    for name, make in specs().items():
        yield Contender(name, "triton", partial(with_triton, make, TILE))
        yield Contender(name, "torch", partial(with_torch, make), as_graph=False)
    for name in ("nf4", "nf4 nested"):
        for rank in RANKS:
            yield Contender(
                f"{name} with LoRA", f"triton, rank {rank}", partial(with_lora, specs()[name], rank, CHANGED_TILE)
            )
    yield Contender("nf4 quantize", "triton", partial(quantized_by, quantize_by_triton), as_graph=False)
    yield Contender("nf4 quantize", "torch", partial(quantized_by, partial(quantize_4bit, kind="nf4")), as_graph=False)
    if has_bitsandbytes():
        yield Contender("nf4", "bitsandbytes", with_bitsandbytes)
    for tile in VARIANTS if variants else ():
        name = f"triton {tile.lookup} {tile.words}x{tile.steps} {tile.warps} warps"
        yield Contender("nf4", name, partial(with_triton, specs()["nf4"], tile))
    for tile in CHANGED_VARIANTS if variants else ():
        name = f"triton, rank 64, {tile.rows}x{tile.columns} {tile.warps} warps"
        yield Contender("nf4 with LoRA", name, partial(with_lora, specs()["nf4"], 64, tile))


def has_bitsandbytes() -> bool:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        return False
    return True


def check() -> None:
    """A fast program that is wrong would mean nothing.

    Raises:
        SystemExit: a program and its twin disagree.
    """
    shape = SHAPES[0]
    for name, make in specs().items():
        matrix = packed(make(shape))
        expected = matrix.dequantize(torch.bfloat16).nan_to_num()
        for tile in VARIANTS if isinstance(matrix.spec, FourBit) else [TILE]:
            if not torch.equal(by_triton(matrix, bf16(shape), tile).nan_to_num(), expected):
                raise SystemExit(f"error: {name}: the program and its twin disagree ({tile})")
        if isinstance(matrix.spec, FourBit):
            check_changed(name, matrix)


def check_changed(name: str, matrix: Packed) -> None:
    """Sums over the rank are in another order: what is rounded to bf16 may be the next number, and no more."""
    added = factors(matrix.shape, 64)
    expected = matrix.dequantize(torch.bfloat16, added).float()
    for tile in (CHANGED_TILE, *CHANGED_VARIANTS):
        made = changed(matrix, added, bf16(matrix.shape), tile).float()
        if not torch.allclose(made, expected, rtol=2**-7, atol=1e-5):
            raise SystemExit(f"error: {name} with LoRA: the program and its twin disagree ({tile})")


def row_of(contender: Contender, fastest: float) -> dict[str, object]:
    """Each shape's GB/s, and time and rate of all matrices of the model."""
    measured = {f"{out}x{width}": measure(contender, (out, width)) for out, width in SHAPES}
    ms, nbytes = (OF_EACH * sum(values) for values in zip(*measured.values(), strict=True))
    return {
        "format": contender.format,
        "how": contender.how,
        "model ms": ms,
        "model GB/s": nbytes / ms / 1e6,
        "share of copy": nbytes / ms * 1e3 / fastest,
        **{shape: nbytes / ms / 1e6 for shape, (ms, nbytes) in measured.items()},
    }


@torch.inference_mode()
def main() -> None:
    formats = dict.fromkeys(contender.format for contender in contenders(False))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", action="store_true", help="also measure other ways to part the 4-bit work")
    parser.add_argument("--formats", nargs="+", choices=formats, default=list(formats), help="only these")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: torch sees no CUDA device, and this measures one")
    if not kernels.available():
        sys.exit("error: Triton's programs cannot run here; the warning above says why")
    # From here on the formats' own methods are plain torch, as on a machine without Triton.
    with mock.patch.object(kernels, "available", return_value=False):
        check()
        fastest, rows = fastest_copy(), []
        for contender in contenders(args.variants):
            if contender.format in args.formats:
                rows.append(row_of(contender, fastest))
                torch.cuda.empty_cache()
    facts = {"gpu": torch.cuda.get_device_name(), "copy_GBps": fastest / 1e9, "tile": str(TILE), "matrices": OF_EACH}
    publish("dequantize", rows, **facts)


if __name__ == "__main__":
    main()
