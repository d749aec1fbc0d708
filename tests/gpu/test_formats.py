"""Storage formats in plain torch give the same bytes and numbers on a GPU as on a CPU."""

from __future__ import annotations

import pytest
import torch

from lightweight_engine.backend.fp8 import DTYPES, Kind, quantize_fp8
from lightweight_engine.backend.packed import Packed, stack
from lightweight_engine.backend.quantize import SPECS, WRITERS, quantize, spec_for

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


def random_parts(format: str) -> Packed:
    """Random bytes; scales of blocks are numbers, as no byte is above that of the largest float16."""
    spec = spec_for(format, (40, 512))
    parts = {name: torch.randint(0, 0x7B, shape).to(dtype) for name, (shape, dtype) in spec.parts.items()}
    return Packed(spec, parts)


@pytest.mark.parametrize("format", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers(format: str, dtype: torch.dtype) -> None:
    packed = random_parts(format)
    assert torch.equal(packed.to(CUDA).dequantize(dtype).cpu(), packed.dequantize(dtype))


@pytest.mark.parametrize("format", WRITERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes(format: str, dtype: torch.dtype) -> None:
    matrix = (torch.randn(2100, 2048) * torch.randn(2100, 1).exp()).to(dtype)  # more than one piece on a GPU
    ours, expected = quantize(matrix.to(CUDA), format), quantize(matrix, format)
    for name, part in expected.parts.items():
        assert torch.equal(ours.parts[name].cpu().view(torch.uint8), part.view(torch.uint8))


@pytest.mark.parametrize("kind", DTYPES)
def test_scaled_fp8(kind: Kind) -> None:
    matrix = torch.randn(210, 2048)
    ours, expected = quantize_fp8(matrix.to(CUDA), kind, scaled=True), quantize_fp8(matrix, kind, scaled=True)
    assert torch.equal(ours.parts["scale"].cpu(), expected.parts["scale"])
    assert torch.equal(ours.dequantize().cpu(), expected.dequantize())


@pytest.mark.parametrize("format", WRITERS)
def test_rows_apart_and_together_again(format: str) -> None:
    packed = quantize(torch.randn(12, 64, device=CUDA), format)
    assert torch.equal(stack([packed.take(0, 5), packed.take(5, 12)]).dequantize(), packed.dequantize())
