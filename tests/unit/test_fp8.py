"""Eight-bit floats: every code, rounding, scales, and what a file may have wrong."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from stored_files import stored
from torch import Tensor

from lightweight_engine.backend.fp8 import DTYPES, Float8, Kind, quantize_fp8, read_packed
from lightweight_engine.backend.packed import Packed, stack
from lightweight_engine.errors import CorruptCheckpointError

# Kind -> bits of the exponent, bits of the fraction, bias, largest value.
KINDS: dict[Kind, tuple[int, int, int, float]] = {"fp8_e4m3": (4, 3, 7, 448.0), "fp8_e5m2": (5, 2, 15, 57344.0)}


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


def value(code: int, kind: Kind) -> float:
    """What a code stands for, by the definition of the type."""
    exponent_bits, fraction_bits, bias, _ = KINDS[kind]
    sign = -1.0 if code & 128 else 1.0
    exponent, fraction = code >> fraction_bits & (2**exponent_bits - 1), code & (2**fraction_bits - 1)
    if kind == "fp8_e5m2" and exponent == 31:
        return math.nan if fraction else sign * math.inf
    if kind == "fp8_e4m3" and code & 127 == 127:
        return math.nan
    if exponent:
        return sign * (1 + fraction / 2**fraction_bits) * 2.0 ** (exponent - bias)
    return sign * fraction / 2**fraction_bits * 2.0 ** (1 - bias)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_code(kind: Kind, dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(DTYPES[kind]).view(16, 16)
    table = Packed(Float8(kind, (16, 16)), {"values": codes}).dequantize(dtype)
    expected = torch.tensor([value(code, kind) for code in range(256)]).view(16, 16)
    torch.testing.assert_close(table.float(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_become_the_nearest_code(kind: Kind, dtype: torch.dtype) -> None:
    matrix = (torch.randn(9, 50) * torch.logspace(-6, 6, 9)[:, None]).to(dtype)
    matrix = matrix.nan_to_num(posinf=60000.0, neginf=-60000.0)
    table = torch.tensor([v for v in (value(code, kind) for code in range(256)) if math.isfinite(v)])
    best = (table - matrix.float()[..., None]).abs().amin(dim=-1)
    values = quantize_fp8(matrix, kind).dequantize()
    assert torch.equal((values - matrix.float()).abs(), best)


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_value_is_where_it_ends(kind: Kind) -> None:
    largest = KINDS[kind][3]
    matrix = torch.tensor([[largest, -largest, largest * 1.01, 1e30, -3e38]])
    assert quantize_fp8(matrix, kind).dequantize().tolist() == [[largest, -largest, largest, largest, -largest]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_one_scale_uses_the_whole_range(kind: Kind, scale: float) -> None:
    matrix = torch.randn(8, 64) * scale
    packed = quantize_fp8(matrix, kind, scaled=True)
    assert packed.spec == Float8(kind, (8, 64), 1) and packed.nbytes == 8 * 64 + 4
    assert packed.parts["values"].float().abs().max() == KINDS[kind][3]
    error = (packed.dequantize() - matrix).abs()
    half_step = 2.0 ** -(KINDS[kind][1] + 1)
    least = packed.parts["scale"] * value(1, kind)
    assert (error <= matrix.abs() * half_step * 1.001 + least).all()
    assert not quantize_fp8(torch.zeros(2, 3), kind, scaled=True).dequantize().any()


def test_stacking_scales() -> None:
    plain = quantize_fp8(torch.randn(2, 16), "fp8_e4m3")
    one = quantize_fp8(torch.randn(3, 16), "fp8_e4m3", scaled=True)
    other = quantize_fp8(torch.randn(4, 16) * 5, "fp8_e4m3", scaled=True)
    joined = stack([one, plain, other])
    assert joined.spec == Float8("fp8_e4m3", (9, 16), 9)
    assert torch.equal(joined.dequantize(), torch.cat([m.dequantize() for m in (one, plain, other)]))
    rows = [joined.take(0, 1), joined.take(1, 6), joined.take(6, 9)]
    assert [row.spec for row in rows] == [Float8("fp8_e4m3", (n, 16), n) for n in (1, 5, 3)]
    assert torch.equal(stack(rows).dequantize(), joined.dequantize())
    again = stack([one.take(0, 1), one.take(1, 3)])
    assert again.spec == one.spec and torch.equal(again.dequantize(), one.dequantize())


@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.tensor([2.0]), torch.rand(4, 1), torch.rand(4).bfloat16()])
def test_reading(tmp_path: Path, scale: Tensor) -> None:
    values = torch.randn(4, 6).to(torch.float8_e5m2)
    read = read_packed(stored(tmp_path, "fp8_e5m2", (4, 6), values, {"scale": scale}))
    assert torch.equal(read.dequantize(), values.float() * scale.float().reshape(-1, 1))
    bare = read_packed(stored(tmp_path, "fp8_e5m2", (4, 6), values, {}))
    assert torch.equal(bare.dequantize(), values.float()) and bare.spec == Float8("fp8_e5m2", (4, 6))


@pytest.mark.parametrize(
    ("weight", "roles", "reason"),
    [
        (torch.zeros(4, 6), {"scale": torch.ones(3)}, "it has 3 scales; one, or one for each of 4 rows"),
        (torch.zeros(4, 6), {"scale": torch.ones(0)}, "its scale is empty"),
        (torch.zeros(4, 6), {"scale": torch.tensor(float("nan"))}, "its scale has values that are not finite"),
        (torch.zeros(4, 5), {}, r"of the shape \[4, 5\], \[4, 6\] expected"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, weight: Tensor, roles: dict[str, Any], reason: str) -> None:
    file = stored(tmp_path, "fp8_e4m3", (4, 6), weight.to(torch.float8_e4m3fn), roles)
    with pytest.raises(CorruptCheckpointError, match=rf"'layer\.weight' cannot be read as fp8_e4m3: .*{reason}"):
        read_packed(file)


def test_another_dtype_is_refused(tmp_path: Path) -> None:
    file = stored(tmp_path, "fp8_e4m3", (4, 6), torch.zeros(4, 6, dtype=torch.uint8), {})
    with pytest.raises(CorruptCheckpointError, match=r"it is torch\.uint8"):
        read_packed(file)
