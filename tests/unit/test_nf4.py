"""Four-bit matrices: nearest codes, blocks that cross rows, double quantised scales, and what a file may have wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from stored_files import stored
from torch import Tensor

from lightweight_engine.backend.nf4 import FourBit, Kind, code_book, quantize_4bit, read_packed
from lightweight_engine.backend.packed import Packed, stack
from lightweight_engine.errors import CorruptCheckpointError

KINDS: tuple[Kind, ...] = ("nf4", "fp4")


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


def double_quantised(shape: tuple[int, int], offset: float = 0.5, nested: int = 32, seed: int = 0) -> Packed:
    """Random bytes with scales of the second order."""
    generator = torch.Generator().manual_seed(seed)
    spec = FourBit("nf4", shape, 32, nested)
    parts = {
        "codes": torch.randint(0, 256, (spec.elements // 2,), generator=generator, dtype=torch.uint8),
        "absmax": torch.randint(0, 256, (spec.blocks,), generator=generator, dtype=torch.uint8),
        "nested_absmax": torch.rand(-(-spec.blocks // nested), generator=generator),
        "nested_map": torch.linspace(-1, 1, 256),
        "nested_offset": torch.tensor(offset),
    }
    return Packed(spec, parts)


def plain(packed: Packed) -> Tensor:
    """The definition, number by number."""
    spec, parts = packed.spec, packed.parts
    assert isinstance(spec, FourBit)
    book = parts["code_book"] if spec.own_book else code_book(spec.kind)
    scales = spec.scales(parts)
    values = []
    for i in range(spec.elements):
        byte = int(parts["codes"][i // 2])
        values.append(book[byte & 15 if i % 2 else byte >> 4] * scales[i // spec.block_size])
    return torch.stack(values).view(spec.shape)


def test_the_first_code_is_in_the_high_half() -> None:
    packed = quantize_4bit(torch.tensor([[1.0, -1.0] * 32]), "nf4")
    assert packed.parts["codes"].tolist() == [0xF0] * 32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 13), (2, 32), (3, 50), (9, 64)])
@pytest.mark.parametrize("block_size", [32, 64])
def test_codes_are_the_nearest(kind: Kind, shape: tuple[int, int], block_size: int) -> None:
    matrix = torch.randn(shape)
    packed = quantize_4bit(matrix, kind, block_size)
    values = packed.dequantize()
    assert torch.equal(values, plain(packed))
    scales = packed.parts["absmax"].repeat_interleave(block_size)[: matrix.numel()].view(shape)
    possible = code_book(kind) * scales[..., None]
    best = (possible - matrix[..., None]).abs().amin(dim=-1)
    torch.testing.assert_close((values - matrix).abs(), best, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e30, 3e38])
def test_extreme_values(kind: Kind, scale: float) -> None:
    matrix = torch.tensor([[1.0, -1.0, 0.0, 0.5] * 16]) * scale
    values = quantize_4bit(matrix, kind).dequantize()
    assert torch.isfinite(values).all()
    if scale > 1e-37:
        assert torch.equal(values[0, :3], matrix[0, :3])


def test_many_pieces_are_as_one() -> None:
    matrix = torch.randn(70, 4096)  # more than are worked on at a time
    packed = quantize_4bit(matrix, "nf4")
    halves = [quantize_4bit(matrix[:35], "nf4"), quantize_4bit(matrix[35:], "nf4")]
    assert torch.equal(packed.dequantize(), torch.cat([half.dequantize() for half in halves]))


def test_double_quantised_scales() -> None:
    packed = double_quantised((8, 128))
    assert torch.equal(packed.dequantize(), plain(packed))
    spec = packed.spec
    assert isinstance(spec, FourBit)
    expanded = spec.expand(packed.parts)
    assert list(expanded.parts) == ["codes", "absmax"] and torch.equal(expanded.dequantize(), packed.dequantize())
    assert FourBit("nf4", (12288, 3072), 64, 256).nbytes * 8 / (12288 * 3072) == pytest.approx(4.127, abs=5e-4)


@pytest.mark.parametrize("cut", [8, 4, 1])
def test_double_quantised_rows(cut: int) -> None:
    """Rows have 4 blocks here, and 32 blocks share a scale: other cuts than at 8 rows need float32 scales."""
    packed = double_quantised((16, 128))
    rows = [packed.take(0, cut), packed.take(cut, 16)]
    assert torch.equal(torch.cat([part.dequantize() for part in rows]), packed.dequantize())
    again = stack(rows)
    assert torch.equal(again.dequantize(), packed.dequantize())
    assert again.parts["absmax"].dtype == (torch.uint8 if cut == 8 else torch.float32)


def test_double_quantised_matrices_with_different_offsets() -> None:
    parts = [double_quantised((8, 128), offset, seed=i) for i, offset in enumerate((0.5, 0.25, 0.5))]
    joined = stack(parts)
    assert joined.shape == (24, 128) and joined.parts["absmax"].dtype == torch.float32
    assert torch.equal(joined.dequantize(), torch.cat([part.dequantize() for part in parts]))
    single = quantize_4bit(torch.randn(2, 128), "nf4", 32)
    for order in ([parts[0], single], [single, parts[0]]):
        assert torch.equal(stack(order).dequantize(), torch.cat([part.dequantize() for part in order]))


def test_blocks_are_not_cut() -> None:
    packed = quantize_4bit(torch.randn(4, 48), "nf4")
    assert torch.equal(packed.take(0, 4).dequantize(), packed.dequantize())
    for start, stop in ((0, 1), (1, 4)):
        with pytest.raises(ValueError, match="inside a block of 64"):
            packed.take(start, stop)
    with pytest.raises(ValueError, match="across the seam"):
        stack([quantize_4bit(torch.randn(1, 48), "nf4")] * 2)
    with pytest.raises(ValueError, match="different sizes"):
        stack([quantize_4bit(torch.randn(2, 64), "nf4", size) for size in (64, 128)])


def save(folder: Path, packed: Packed, **changes: Any) -> Any:
    """A matrix as bitsandbytes saves it, with something changed: a tensor, a detail, or ``None`` for none."""
    spec, parts = packed.spec, packed.parts
    assert isinstance(spec, FourBit)
    roles = {"absmax": parts["absmax"], "quant_map": code_book(spec.kind)}
    details: dict[str, Any] = {"block_size": spec.block_size, "dtype": "bfloat16"}
    if spec.nested_block_size:
        roles |= {"nested_absmax": parts["nested_absmax"], "nested_quant_map": parts["nested_map"]}
        details |= {"nested_block_size": spec.nested_block_size, "nested_offset": float(parts["nested_offset"])}
    weight = changes.pop("weight", parts["codes"].view(-1, 1))
    details |= {name: changes.pop(name) for name in list(changes) if name in details}
    roles = {role: tensor for role, tensor in {**roles, **changes}.items() if tensor is not None}
    return stored(folder, spec.kind, spec.shape, weight, roles, **details)


@pytest.mark.parametrize("packed", [quantize_4bit(torch.randn(3, 65), "fp4"), double_quantised((4, 96))])
def test_reading(tmp_path: Path, packed: Packed) -> None:
    read = read_packed(save(tmp_path, packed))
    assert read.spec == packed.spec and torch.equal(read.dequantize(), packed.dequantize())


def test_a_code_book_of_its_own_is_kept(tmp_path: Path) -> None:
    book = torch.linspace(-1, 1, 16)
    read = read_packed(save(tmp_path, quantize_4bit(torch.randn(4, 64), "nf4"), quant_map=book))
    assert torch.equal(read.parts["code_book"], book) and torch.equal(read.dequantize(), plain(read))
    assert torch.equal(stack([read, read]).dequantize(), torch.cat([read.dequantize()] * 2))
    with pytest.raises(ValueError, match="different code books"):
        stack([read, quantize_4bit(torch.randn(4, 64), "nf4")])
    other = read_packed(save(tmp_path, quantize_4bit(torch.randn(4, 64), "nf4"), quant_map=book / 2))
    with pytest.raises(ValueError, match="different code books"):
        stack([read, other])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"weight": torch.zeros(100, 1, dtype=torch.uint8)}, "its codes has 100 values .* 192 of"),
        ({"absmax": torch.ones(13)}, "its absmax has 13 values .* 12 of"),
        ({"absmax": torch.full((12,), float("nan"))}, "its absmax has 12 values"),
        ({"absmax": None}, "its absmax is missing"),
        ({"quant_map": torch.ones(15)}, "its code_book has 15 values"),
        ({"quant_map": torch.full((16,), float("inf"))}, "its code_book has values that are not finite"),
        ({"nested_absmax": torch.ones(2)}, "its nested_absmax has 2 values"),
        ({"nested_absmax": torch.full((1,), float("inf"))}, "its nested_absmax has values that are not finite"),
        ({"nested_quant_map": torch.ones(16)}, "its nested_map has 16 values .* 256"),
        ({"nested_quant_map": None}, "its nested_quant_map is missing"),
        ({"nested_offset": None}, "its nested_offset has values that are not finite"),
        ({"block_size": None}, "blocks of None numbers"),
        ({"nested_offset": float("nan")}, "its nested_offset has values that are not finite"),
        ({"block_size": 48}, "blocks of 48 numbers"),
        ({"block_size": "64"}, "blocks of '64' numbers"),
        ({"nested_block_size": 0}, "blocks of 0 numbers"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(
        CorruptCheckpointError, match=rf"x\.safetensors: 'layer\.weight' cannot be read as nf4: .*{reason}"
    ):
        read_packed(save(tmp_path, double_quantised((4, 96)), **changes))


def test_scales_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    packed = quantize_4bit(torch.randn(4, 64), "nf4")
    with pytest.raises(CorruptCheckpointError, match="its absmax has values that are not finite"):
        read_packed(save(tmp_path, packed, absmax=torch.full((4,), float("inf"))))


def test_only_matrices_are_packed(tmp_path: Path) -> None:
    row = stored(tmp_path, "nf4", (64,), torch.zeros(32, dtype=torch.uint8), {}, block_size=64)
    with pytest.raises(CorruptCheckpointError, match=r"the shape \[64\], and only matrices"):
        read_packed(row)
