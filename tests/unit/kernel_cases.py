"""Calls of the GPU programs with what their twins in plain torch say, for the interpreter and for a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightweight_engine.backend.block_types import BLOCK_TYPES
from lightweight_engine.backend.fp8 import DTYPES, Float8
from lightweight_engine.backend.gguf import Blocks
from lightweight_engine.backend.nf4 import CODE_BOOKS, FourBit, code_book, quantize_4bit

# One whole tile; several with a short last one; an odd number of elements; rows that no block ends with.
SHAPES = [(64, 64), (9, 512), (3, 77), (5, 96)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_bytes(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


class Cases:
    """What the interpreter is asked to run, and what the twins say."""

    def __init__(self) -> None:
        self.calls: dict[str, tuple[str, str, tuple[Any, ...], dict[str, Any]]] = {}
        self.expected: dict[str, Any] = {}

    def add(self, label: str, expected: Any, home: str, name: str, *arguments: Any, **options: Any) -> None:
        self.calls[label] = (home, name, arguments, options)
        self.expected[label] = expected


def four_bit(cases: Cases, kind: Any, shape: tuple[int, int], block_size: int, dtype: torch.dtype, **tile: Any) -> None:
    packed = quantize_4bit(randn(*shape), kind, block_size)
    label = f"four_bit {kind} {shape} {block_size} {dtype} {'-'.join(map(str, tile.values()))}"
    parts = (
        packed.parts["codes"],
        packed.parts["absmax"],
        code_book(kind),
        block_size,
        torch.empty(shape, dtype=dtype),
    )
    cases.add(label, packed.dequantize(dtype), "dequantize", "four_bit", *parts, **({"tile": tile} if tile else {}))


def nested(cases: Cases, kind: Any, shape: tuple[int, int], nested_block_size: int) -> None:
    spec = FourBit(kind, shape, 64, nested_block_size)
    parts = {"codes": random_bytes(*spec.parts["codes"][0]), "absmax": random_bytes(spec.blocks, seed=1)}
    parts["nested_absmax"] = randn(*spec.parts["nested_absmax"][0]).abs()
    parts["nested_map"], parts["nested_offset"] = randn(256, seed=2), torch.tensor(0.3)
    arguments = (*parts.values(), nested_block_size, code_book(kind), 64, torch.empty(shape))
    label = f"nested {kind} {shape} {nested_block_size}"
    cases.add(label, spec.dequantize(parts, torch.float32), "dequantize", "four_bit_nested", *arguments)


def changed(
    cases: Cases, kind: Any, shape: tuple[int, int], rank: int, block_size: int, dtype: torch.dtype, nested: int = 0
) -> None:
    """Factors in eighths, so that sums over the rank are the same in any order."""
    spec = FourBit(kind, shape, block_size, nested)
    parts = {"codes": random_bytes(*spec.parts["codes"][0]), "absmax": randn(spec.blocks).abs()}
    if nested:
        parts["absmax"], parts["nested_absmax"] = random_bytes(spec.blocks), randn(-(-spec.blocks // nested)).abs()
        parts["nested_map"], parts["nested_offset"] = randn(256, seed=2), torch.tensor(0.3)
    short = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    up = ((random_bytes(rank, shape[0], seed=3) % 16).float() / 8 - 1).to(short).t()
    down = ((random_bytes(rank, shape[1], seed=4) % 16).float() / 8 - 1).to(short)
    outer = (parts["nested_absmax"], parts["nested_map"], parts["nested_offset"], nested) if nested else None
    arguments = (parts["codes"], parts["absmax"], code_book(kind), block_size, up, down)
    label = f"changed {kind} {shape} {rank} {block_size} {nested} {dtype}"
    expected = spec.dequantize(parts, dtype, (up, down))
    cases.add(label, expected, "dequantize", "four_bit_changed", *arguments, torch.empty(shape, dtype=dtype), outer)


def float8(cases: Cases, kind: Any, shape: tuple[int, int], scales: int, dtype: torch.dtype) -> None:
    """All codes, infinities and NaN included."""
    codes = torch.arange(shape[0] * shape[1]).to(torch.uint8).view(shape).view(DTYPES[kind])
    scale = randn(scales).abs() if scales else None
    parts = {"values": codes, **({} if scale is None else {"scale": scale})}
    expected = Float8(kind, shape, scales).dequantize(parts, dtype)
    label = f"float8 {kind} {shape} {scales} {dtype}"
    cases.add(label, expected, "dequantize", "float8", codes, scale, torch.empty(shape, dtype=dtype))


def gguf(cases: Cases, type_name: str, rows: int, blocks_of_row: int, dtype: torch.dtype) -> None:
    layout = BLOCK_TYPES[type_name]
    blocks = random_bytes(rows, blocks_of_row * layout.nbytes)
    shape = (rows, blocks_of_row * layout.elements)
    expected = Blocks(type_name, shape).dequantize({"blocks": blocks}, dtype)
    label = f"gguf {type_name} {shape} {dtype}"
    cases.add(label, expected, "dequantize", "gguf_blocks", type_name, blocks, torch.empty(shape, dtype=dtype))


def quantize(cases: Cases, kind: Any, shape: tuple[int, int], block_size: int, dtype: torch.dtype) -> None:
    """Numbers at random, a block of zeros, and one whose numbers lie in the middle between two entries."""
    matrix = randn(*shape).view(-1)
    book = code_book(kind).sort().values
    middles = (book[1:] + book[:-1]) / 2
    matrix[: len(middles) + 1] = torch.cat([middles, torch.ones(1)])
    matrix[block_size : 2 * block_size] = 0
    matrix = matrix.view(shape).to(dtype)
    packed = quantize_4bit(matrix, kind, block_size)
    label = f"quantize {kind} {shape} {block_size} {dtype}"
    expected = (packed.parts["codes"], packed.parts["absmax"])
    cases.add(label, expected, "quantize", "four_bit", matrix, code_book(kind), block_size)


def make_cases(short: torch.dtype) -> Cases:
    """Every program at float32, and at the 16-bit dtype ``short``."""
    cases = Cases()
    for kind in CODE_BOOKS:
        for shape in SHAPES:
            four_bit(cases, kind, shape, 64, torch.float32)
            quantize(cases, kind, shape, 64, torch.float32)
        four_bit(cases, kind, (9, 512), 128, short)
        nested(cases, kind, (64, 64), 32)
        nested(cases, kind, (5, 1000), 256)
        quantize(cases, kind, (12, 130), 32, torch.bfloat16)
        changed(cases, kind, (64, 128), 16, 64, short)
        changed(cases, kind, (70, 200), 17, 64, torch.float32)
        changed(cases, kind, (66, 1000), 5, 64, torch.float32, nested=256)
    changed(cases, "nf4", (3, 8), 1, 4096, torch.float32)
    changed(cases, "nf4", (130, 136), 130, 128, torch.float32)
    changed(cases, "nf4", (96, 192), 64, 32, short, nested=32)
    four_bit(cases, "nf4", (9, 512), 4096, torch.float32)
    for tile in ({"lookup": "cache", "words": 128, "steps": 4}, {"lookup": "shared", "words": 128, "steps": 2}):
        four_bit(cases, "nf4", (9, 512), 64, torch.float32, **tile)
    for kind in DTYPES:
        for scales in (0, 1, 6):
            float8(cases, kind, (6, 130), scales, torch.float32)
        float8(cases, kind, (2, 1040), 2, short)
    for type_name, layout in BLOCK_TYPES.items():
        gguf(cases, type_name, 3, 4096 // layout.elements // 2, torch.float32)
        gguf(cases, type_name, 2, 1, short)
    return cases
