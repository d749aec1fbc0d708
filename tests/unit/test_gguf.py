"""GGUF blocks: every type against gguf-py bit for bit, error bounds, and what a file may have wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightweight_engine.backend.block_types import BLOCK_TYPES
from lightweight_engine.backend.checkpoint import Checkpoint, TensorInfo
from lightweight_engine.backend.gguf import DECODERS, ENCODERS, Blocks, quantize_blocks, read_packed
from lightweight_engine.backend.packed import Packed, stack
from lightweight_engine.backend.stored import Stored
from lightweight_engine.errors import CorruptCheckpointError

# Type -> bytes at which a block's float16 numbers lie.
HALVES = {
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
}
# Written type -> the largest error of a value, in parts of the block's largest magnitude (0) or of its range (1).
LEVELS = {"Q8_0": (0.5 / 127, 0), "Q5_0": (1 / 16, 0), "Q4_0": (1 / 8, 0), "Q5_1": (0.5 / 31, 1), "Q4_1": (0.5 / 15, 1)}


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


def random_blocks(type: str, rows: int, per_row: int) -> Tensor:
    """Random bytes with scales that are numbers, uint8 ``[rows, bytes]``."""
    layout = BLOCK_TYPES[type]
    blocks = torch.randint(0, 256, (rows * per_row, layout.nbytes), dtype=torch.uint8)
    for start in HALVES.get(type, (0,)):
        blocks[:, start : start + 2] = torch.randn(len(blocks), 1).half().view(torch.uint8)
    return blocks.view(rows, -1)


def packed_blocks(type: str, rows: int, per_row: int) -> Packed:
    spec = Blocks(type, (rows, per_row * BLOCK_TYPES[type].elements))
    return Packed(spec, {"blocks": random_blocks(type, rows, per_row)})


def oracle() -> Any:
    return pytest.importorskip("gguf", reason="gguf is the oracle here; it is installed with the extra 'test'")


def test_the_table_of_types() -> None:
    gguf = oracle()
    assert set(DECODERS) == set(BLOCK_TYPES)
    for name, layout in BLOCK_TYPES.items():
        type = gguf.GGMLQuantizationType[name]
        assert (layout.number, (layout.elements, layout.nbytes)) == (type.value, gguf.GGML_QUANT_SIZES[type])


@pytest.mark.parametrize("type", BLOCK_TYPES)
def test_any_bytes_are_the_numbers_of_gguf_py(type: str) -> None:
    gguf = oracle()
    packed = packed_blocks(type, 40, 3)
    expected = gguf.quants.dequantize(packed.parts["blocks"].numpy(), gguf.GGMLQuantizationType[type])
    assert torch.equal(packed.dequantize(), torch.from_numpy(expected))
    assert torch.equal(packed.dequantize(torch.bfloat16), torch.from_numpy(expected).bfloat16())


@pytest.mark.parametrize("type", ENCODERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_bytes_are_those_of_gguf_py(type: str, dtype: torch.dtype) -> None:
    gguf = oracle()
    matrix = torch.randn(64, 256) * torch.randn(64, 1).exp()
    matrix[0], matrix[1, :32], matrix[2] = 0.0, 1e-9, 0.5
    matrix[3] = torch.randint(-8, 9, (256,))  # the farthest value twice, with both signs; halves between codes
    matrix = matrix.to(dtype)
    expected = gguf.quants.quantize(matrix.float().numpy(), gguf.GGMLQuantizationType[type])
    assert torch.equal(quantize_blocks(matrix, type).parts["blocks"], torch.from_numpy(expected))


@pytest.mark.parametrize("type", ENCODERS)
@pytest.mark.parametrize("scale", [0.1, 1.0, 1e4])
def test_errors_are_within_half_a_step(type: str, scale: float) -> None:
    """Of the symmetric types a whole one: the code for the farthest value's opposite does not exist."""
    matrix = torch.randn(16, 128) * scale
    error = (quantize_blocks(matrix, type).dequantize() - matrix).abs().view(-1, 32)
    blocks = matrix.view(-1, 32)
    step, ranged = LEVELS[type]
    size = blocks.amax(dim=1) - blocks.amin(dim=1) if ranged else blocks.abs().amax(dim=1)
    assert (error.amax(dim=1) <= size * (step + 1e-3)).all()


@pytest.mark.parametrize("type", ENCODERS)
def test_extreme_values(type: str) -> None:
    for tiny in (1e-45, 1e-38, 1e-20):
        assert torch.isfinite(quantize_blocks(torch.randn(2, 32) * tiny, type).dequantize()).all()
    with pytest.raises(ValueError, match="too large for the 16-bit scale"):
        quantize_blocks(torch.full((2, 32), -3e38) * torch.tensor([1.0, -1.0] * 16), type)


@pytest.mark.parametrize("type", BLOCK_TYPES)
def test_rows_apart_and_together_again(type: str) -> None:
    packed = packed_blocks(type, 5, 2)
    rows = [packed.take(0, 2), packed.take(2, 5)]
    assert torch.equal(torch.cat([part.dequantize() for part in rows]), packed.dequantize())
    again = stack(rows)
    assert again.spec == packed.spec and torch.equal(again.parts["blocks"], packed.parts["blocks"])


def test_many_pieces_are_as_one() -> None:
    packed = packed_blocks("Q4_K", 300, 4)  # more than are worked on at a time
    assert torch.equal(packed.take(250, 300).dequantize(), packed.dequantize()[250:])
    matrix = torch.randn(100, 4096)
    whole = quantize_blocks(matrix, "Q8_0").parts["blocks"]
    assert torch.equal(whole[90:], quantize_blocks(matrix[90:], "Q8_0").parts["blocks"])


def test_types_that_are_not_written_or_read() -> None:
    with pytest.raises(ValueError, match="Q4_K is not written; these are: Q8_0, Q5_1, Q5_0, Q4_1, Q4_0"):
        quantize_blocks(torch.zeros(1, 256), "Q4_K")
    with pytest.raises(ValueError, match="IQ2_S is not read; these are: Q4_0"):
        Blocks("IQ2_S", (1, 256))
    with pytest.raises(ValueError, match="a row of 64 numbers cannot be parted into blocks of 256"):
        Blocks("Q6_K", (4, 64))


def open_blocks(path: Path, type: str, shape: tuple[int, ...], blocks: Tensor) -> Stored:
    """A file that is one tensor's blocks, at an odd place."""
    path.write_bytes(b"\0" + blocks.numpy().tobytes())
    info = TensorInfo(f"gguf:{type}", shape, 1, 1 + blocks.numel())
    return Stored(Checkpoint(path, {"a.weight": info}), "a.weight", info.dtype, shape)


@pytest.mark.parametrize("type", BLOCK_TYPES)
def test_reading(tmp_path: Path, type: str) -> None:
    packed = packed_blocks(type, 3, 2)
    read = read_packed(open_blocks(tmp_path / "x.gguf", type, packed.shape, packed.parts["blocks"]))
    assert read.spec == packed.spec and torch.equal(read.dequantize(), packed.dequantize())


@pytest.mark.parametrize(
    ("type", "shape", "size", "reason"),
    [
        ("Q8_0", (4, 64), 4 * 68 - 4, r"it has 268 bytes, its shape \[4, 64\] needs 272"),
        ("Q8_0", (4, 48), 4 * 68, "a row of 48 numbers cannot be parted"),
        ("IQ1_S", (4, 256), 4 * 50, "the GGUF type IQ1_S is not read"),
        ("Q8_0", (128,), 136, r"the shape \[128\], and only matrices"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, type: str, shape: tuple[int, ...], size: int, reason: str) -> None:
    file = open_blocks(tmp_path / "x.gguf", type, shape, torch.zeros(size, dtype=torch.uint8))
    with pytest.raises(
        CorruptCheckpointError, match=rf"x\.gguf: 'a\.weight' cannot be read as gguf:{type}: .*{reason}"
    ):
        read_packed(file)
