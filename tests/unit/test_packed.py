"""What all storage formats share: names, sizes, stacking, and what none of them can hold."""

from __future__ import annotations

import pytest
import torch

from lightweight_engine.backend.packed import Packed, pieces, stack
from lightweight_engine.backend.quantize import SPECS, WRITERS, quantize, spec_for
from lightweight_engine.errors import ConfigError

H = 3072
# Every linear of Flux.1 dev, as (out, in).
EMBEDDERS = [(H, 64), (H, 4096), (H, 256), (H, H), (H, 768), (H, H), (H, 256), (H, H)]
DOUBLE = [(6 * H, H), (3 * H, H), (H, H), (4 * H, H), (H, 4 * H)] * 2
SINGLE = [(7 * H, H), (H, 5 * H), (3 * H, H)]
LINEARS = [*EMBEDDERS, *DOUBLE * 19, *SINGLE * 38, (64, H), (2 * H, H)]
OTHERS = 3_085_376  # biases and scales of norms
# Bytes of the whole transformer, from the published arithmetic of each format; GGUF files keep the others in float32.
TOTALS = {
    "fp8_e4m3": 11_904_493_696,
    "nf4": 6_698_977_408,
    "fp4": 6_698_977_408,
    "gguf:Q8_0": 12_654_309_632,
    "gguf:Q5_1": 8_936_083_712,
    "gguf:Q5_0": 8_192_438_528,
    "gguf:Q4_1": 7_448_793_344,
    "gguf:Q4_0": 6_705_148_160,
    "gguf:Q6_K": 9_772_916_480,
    "gguf:Q5_K": 8_192_696_576,
    "gguf:Q4_K": 6_705_430_784,
    "gguf:Q3_K": 5_125_210_880,
    "gguf:Q2_K": 3_916_807_424,
}


# Relative root mean square error on normally distributed weights.
ERRORS = {"gguf:Q8_0": 0.0054, "fp8_e4m3": 0.027, "fp8_e5m2": 0.053, "gguf:Q5_0": 0.043, "gguf:Q4_0": 0.086}
ERRORS |= {"nf4": 0.092, "fp4": 0.122}


CALLED = {"fp8_rows": "fp8_e4m3"}  # a matter of scales alone


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


def bytes_of(format: str, shape: tuple[int, int]) -> int:
    """In float16 where the width is no whole number of blocks, as converters leave ``img_in``."""
    try:
        return spec_for(format, shape).nbytes
    except ValueError:
        assert shape == (H, 64)
        return shape[0] * shape[1] * 2


@pytest.mark.parametrize("format", TOTALS)
def test_sizes_of_the_real_model(format: str) -> None:
    others = OTHERS * (4 if format.startswith("gguf:") else 2)
    assert sum(bytes_of(format, shape) for shape in LINEARS) + others == TOTALS[format]


@pytest.mark.parametrize("format", ERRORS)
def test_errors_are_those_of_the_format(format: str) -> None:
    matrix = torch.randn(256, 1024)
    error = (quantize(matrix, format).dequantize() - matrix).norm() / matrix.norm()
    assert float(error) == pytest.approx(ERRORS[format], rel=0.04)


@pytest.mark.parametrize("format", WRITERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_matrix_takes_what_its_spec_says(format: str, dtype: torch.dtype) -> None:
    matrix = torch.randn(6, 128).to(dtype)
    packed = quantize(matrix, format)
    assert packed.spec == spec_for(format, (6, 128)) and packed.spec.name == CALLED.get(format, format)
    assert packed.nbytes == packed.spec.nbytes
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in packed.parts.items()}
    assert found == packed.spec.parts and list(found) == list(packed.spec.parts)
    values = packed.dequantize()
    assert values.shape == (6, 128) and (values - matrix.float()).norm() < 0.2 * matrix.float().norm()
    for rounded in (torch.bfloat16, torch.float16):
        assert torch.equal(packed.dequantize(rounded), values.to(rounded))


@pytest.mark.parametrize("format", WRITERS)
def test_rows_apart_and_together_again(format: str) -> None:
    packed = quantize(torch.randn(12, 64), format)
    rows = [packed.take(start, stop) for start, stop in ((0, 1), (1, 7), (7, 12))]
    assert [part.shape for part in rows] == [(1, 64), (6, 64), (5, 64)]
    assert torch.equal(torch.cat([part.dequantize() for part in rows]), packed.dequantize())
    again = stack(rows)
    assert again.spec == packed.spec
    for name, tensor in packed.parts.items():
        assert torch.equal(again.parts[name].view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize("format", WRITERS)
def test_zeros_stay_zeros(format: str) -> None:
    assert not quantize(torch.zeros(3, 64), format).dequantize().any()


@pytest.mark.parametrize("format", WRITERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(format: str, bad: float) -> None:
    matrix = torch.randn(3, 64)
    matrix[1, 5] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantize(matrix, format)


@pytest.mark.parametrize("format", WRITERS)
@pytest.mark.parametrize("matrix", [torch.zeros(64), torch.zeros(2, 64, dtype=torch.int32), torch.zeros(0, 64)])
def test_what_is_no_matrix_is_refused(format: str, matrix: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="a matrix of numbers is needed"):
        quantize(matrix, format)


def test_names_of_formats() -> None:
    assert set(WRITERS) < set(SPECS)
    with pytest.raises(ConfigError, match="'int3' is no storage format"):
        quantize(torch.zeros(2, 64), "int3")
    with pytest.raises(ConfigError, match=r"gguf:Q4_K can be read, not written; use one of nf4, .*gguf:Q8_0"):
        quantize(torch.zeros(2, 256), "gguf:Q4_K")


def test_different_matrices_do_not_stack() -> None:
    nf4 = quantize(torch.randn(2, 64), "nf4")
    assert stack([nf4]) is nf4
    with pytest.raises(ValueError, match="different formats"):
        stack([nf4, quantize(torch.randn(2, 64), "fp4")])
    with pytest.raises(ValueError, match="different formats"):
        stack([nf4, quantize(torch.randn(2, 64), "gguf:Q8_0")])
    with pytest.raises(ValueError, match=r"different widths: \[\[2, 64\], \[2, 128\]\]"):
        stack([nf4, quantize(torch.randn(2, 128), "nf4")])


def test_a_matrix_moves_with_its_parts() -> None:
    packed = quantize(torch.randn(2, 64), "nf4")
    moved = packed.to(torch.device("meta"))
    assert isinstance(moved, Packed) and moved.spec is packed.spec and moved.nbytes == packed.nbytes
    assert {tensor.device.type for tensor in moved.parts.values()} == {"meta"}


@pytest.mark.parametrize("numbers", [1, 64, 3072, 1 << 20])
@pytest.mark.parametrize("count", [1, 7, 1000])
def test_pieces_cover_everything_once(count: int, numbers: int) -> None:
    cuts = list(pieces(count, numbers, torch.device("cpu")))
    assert [row for cut in cuts for row in range(cut.start, cut.stop)] == list(range(count))
    assert all((cut.stop - cut.start) * numbers <= max(1 << 18, numbers) for cut in cuts)
