"""Triton programs on a GPU give the bits of their twins in plain torch, on either device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import make_cases, random_bytes
from torch import Tensor

from lightweight_engine.backend import kernels
from lightweight_engine.backend.block_types import BLOCK_TYPES
from lightweight_engine.backend.gguf import DECODERS
from lightweight_engine.backend.kernels import dequantize, quantize
from lightweight_engine.backend.nf4 import FourBit, code_book, quantize_4bit

pytestmark = pytest.mark.gpu

HOMES = {"dequantize": dequantize, "quantize": quantize}
CASES = {dtype: make_cases(dtype) for dtype in (torch.bfloat16, torch.float16)}
LABELS = [(dtype, label) for dtype, cases in CASES.items() for label in cases.calls if str(dtype) in label]
LABELS += [(torch.bfloat16, label) for label in CASES[torch.bfloat16].calls if "float32" in label or "nested" in label]


def on_gpu(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(on_gpu, value))
    return value.cuda() if isinstance(value, Tensor) else value


def same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, check_device=False)


def test_triton_works_here() -> None:
    assert kernels.available()


@pytest.mark.parametrize(("dtype", "label"), LABELS, ids=[label for _, label in LABELS])
def test_same_bits_as_the_twin(dtype: torch.dtype, label: str) -> None:
    home, name, arguments, options = CASES[dtype].calls[label]
    if "tile" in options:
        options = {"tile": dequantize.Tile(**options["tile"])}
    actual = getattr(HOMES[home], name)(*map(on_gpu, arguments), **options)
    actual = tuple(t.cpu() for t in actual) if isinstance(actual, tuple) else actual.cpu()
    same(actual, CASES[dtype].expected[label])


@pytest.mark.parametrize("shape", [(3072, 3072), (1000, 3072)])
def test_4_bits_at_the_size_of_a_layer(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    packed = quantize_4bit(matrix.cpu(), "nf4")
    codes, absmax = quantize.four_bit(matrix, code_book("nf4", matrix.device), 64)
    same((codes.cpu(), absmax.cpu()), tuple(packed.parts.values()))
    out = torch.full(shape, torch.nan, device="cuda", dtype=torch.bfloat16)
    dequantize.four_bit(codes, absmax, code_book("nf4", matrix.device), 64, out)
    same(out.cpu(), packed.dequantize(torch.bfloat16))


def test_nested_scales_at_the_size_of_a_layer() -> None:
    spec = FourBit("nf4", (3072, 3072), 64, 256)
    parts = {"codes": random_bytes(spec.elements // 2), "absmax": random_bytes(spec.blocks, seed=1)}
    parts["nested_absmax"] = torch.rand(spec.blocks // 256)
    parts["nested_map"], parts["nested_offset"] = torch.randn(256), torch.tensor(0.7)
    out = torch.empty(spec.shape, device="cuda", dtype=torch.bfloat16)
    table = code_book("nf4", out.device)
    dequantize.four_bit_nested(*map(on_gpu, parts.values()), 256, table, 64, out)
    same(out.cpu(), spec.dequantize(parts, torch.bfloat16))


@pytest.mark.parametrize("type_name", sorted(dequantize.SUPPORTED))
def test_blocks_at_the_size_of_a_layer(type_name: str) -> None:
    layout = BLOCK_TYPES[type_name]
    blocks = random_bytes(1536, layout.row_bytes(3072)).cuda()
    out = torch.empty(1536, 3072, device="cuda", dtype=torch.bfloat16)
    dequantize.gguf_blocks(type_name, blocks, out)
    twin = DECODERS[type_name](blocks.view(-1, layout.nbytes)).to(torch.bfloat16)
    same(out, twin.view_as(out))


@pytest.mark.parametrize("start", [1, 2, 4])
def test_codes_that_begin_anywhere(start: int) -> None:
    codes = random_bytes(4096 + start).cuda()[start:]
    absmax, table = torch.rand(128, device="cuda"), code_book("nf4", codes.device)
    expected = FourBit("nf4", (8, 1024)).dequantize({"codes": codes.cpu(), "absmax": absmax.cpu()}, torch.float32)
    same(dequantize.four_bit(codes, absmax, table, 64, torch.empty(8, 1024, device="cuda")).cpu(), expected)


def test_nothing_behind_the_result_is_written() -> None:
    room = torch.full((4096,), 7.0, device="cuda")
    for count in (64, 1000, 2049):
        out = room[:count].view(1, count)
        dequantize.four_bit(
            random_bytes(-(-count // 2)).cuda(),
            torch.rand(-(-count // 64), device="cuda"),
            code_book("nf4", out.device),
            64,
            out,
        )
        assert (room[count:] == 7).all()


@pytest.mark.parametrize("shape", [(1, 8), (65, 136), (3, 1000)])
def test_nothing_behind_a_changed_matrix_is_written(shape: tuple[int, int]) -> None:
    count = shape[0] * shape[1]
    room = torch.full((1 << 17,), 7.0, device="cuda", dtype=torch.bfloat16)
    codes, absmax = random_bytes(-(-count // 2)).cuda(), torch.rand(-(-count // 64), device="cuda")
    up, down = (torch.randn(20, side, device="cuda", dtype=torch.bfloat16) for side in shape)
    out = room[:count].view(shape)
    dequantize.four_bit_changed(codes, absmax, code_book("nf4", out.device), 64, up.t(), down, out)
    assert (room[count:] == 7).all() and (out != 7).any()


def test_a_graph_can_hold_it() -> None:
    """No program waits for the GPU or copies from the host, so that a step can be captured."""
    codes, absmax = random_bytes(2048).cuda(), torch.rand(64, device="cuda")
    blocks = random_bytes(4, BLOCK_TYPES["IQ4_NL"].row_bytes(1024)).cuda()
    table, outs = code_book("nf4", codes.device), [torch.empty(4, 1024, device="cuda") for _ in range(4)]

    def run(first: Tensor, second: Tensor) -> None:
        dequantize.four_bit(codes, absmax, table, 64, first)
        dequantize.gguf_blocks("IQ4_NL", blocks, second)

    run(*outs[:2])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(*outs[2:])
    graph.replay()
    same(outs[2:], outs[:2])
