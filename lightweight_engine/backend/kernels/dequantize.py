"""Packed matrices to numbers on the GPU, into a tensor that the caller keeps.

Values are computed in float32 and rounded once to the dtype of ``out`` (bf16, fp16 or fp32), with the same bits as the
formats' plain torch. ``out`` is contiguous ``[out, in]`` on the device of the parts. Nothing waits for the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..block_types import BLOCK_TYPES
from .launch import ROUNDED_EACH, launch


@dataclass(frozen=True)
class Tile:
    """How the 4-bit program parts its work; measured by ``benchmarks/dequantize.py``.

    Attributes:
        lookup: where the table of 16 is read from, ``shared`` memory or the first-level ``cache``.
        words: of eight codes, read at once by a program.
        steps: how often it does so.
        warps: of 32 threads that share a program.
    """

    lookup: str = "shared"
    words: int = 512
    steps: int = 1
    warps: int = 4


TILE = Tile()


@dataclass(frozen=True)
class ChangedTile:
    """How the program that adds a change of low rank parts its work; measured by ``benchmarks/dequantize.py``.

    Attributes:
        rows, columns: of a program. Each reads its parts of both factors, which the second-level cache holds.
        warps: of 32 threads that share a program.
    """

    rows: int = 64
    columns: int = 128
    warps: int = 4


CHANGED_TILE = ChangedTile()

# Type -> (runs of a block that share a scale, elements of a run). The program has the type's name in lower case.
_RUNS = {
    **dict.fromkeys(("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL"), (2, 16)),
    **dict.fromkeys(("Q4_K", "Q5_K"), (8, 32)),
    **dict.fromkeys(("Q2_K", "Q3_K", "Q6_K", "IQ4_XS"), (16, 16)),
}
SUPPORTED = frozenset(_RUNS)

_IQ4_TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

# Of changes that have programs of their own: from the fewest that tensor cores sum at once to the most that are kept at
# hand. Others go by the next one's, or by the last.
RANKS = (16, 32, 64)

_GGUF_ELEMENTS = 4096  # of a program: 32 for each of 128 threads, four vectors of bf16
_FLOAT8_TILE = (4, 1024)


@cache
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A small table in float32 on a device, copied there once: a copy at each use would make the host wait."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def four_bit(codes: Tensor, absmax: Tensor, table: Tensor, block_size: int, out: Tensor, tile: Tile = TILE) -> Tensor:
    """Codes of two to a byte, the first in the high half, times the float32 scale of their block.

    Args:
        codes: uint8 ``[ceil(n / 2)]``.
        absmax: float32 ``[ceil(n / block_size)]``.
        table: float32 ``[16]``.
        block_size: a power of two from 32 to 4096.
    """
    return _four_bit(codes, absmax, table, block_size, out, tile)


def four_bit_nested(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor,
    nested_map: Tensor,
    nested_offset: Tensor,
    nested_block_size: int,
    table: Tensor,
    block_size: int,
    out: Tensor,
    tile: Tile = TILE,
) -> Tensor:
    """As ``four_bit``, where the scales are 8-bit codes with a table, scales and an offset of their own.

    Args:
        absmax: uint8 ``[ceil(n / block_size)]``.
        nested_absmax: float32, one for each ``nested_block_size`` scales.
        nested_map: float32 ``[256]``.
        nested_offset: float32 ``[]``.
    """
    nested = (nested_absmax, nested_map, nested_offset, nested_block_size)
    return _four_bit(codes, absmax, table, block_size, out, tile, nested)


def _four_bit(
    codes: Tensor,
    absmax: Tensor,
    table: Tensor,
    block_size: int,
    out: Tensor,
    tile: Tile,
    nested: tuple[Tensor, Tensor, Tensor, int] | None = None,
) -> Tensor:
    from .four_bit import dequantize

    count = out.numel()
    _check(out, codes, -(-count // 2))
    _check(out, absmax, -(-count // block_size))
    words = max(tile.words, block_size // 8)
    # Without nested scales their places are filled by the scales themselves, which the program then does not read.
    outer, book, offset, nested_block_size = nested or (absmax, absmax, absmax, 0)
    programs = -(-count // (8 * words * tile.steps))
    launch(
        dequantize,
        (programs,),
        *(_words(codes), absmax, table, outer, book, offset, out, count),
        BLOCK_SIZE=block_size,
        NESTED_BLOCK=nested_block_size,
        WORDS=words,
        STEPS=tile.steps,
        LOOKUP=tile.lookup,
        num_warps=tile.warps,
        **ROUNDED_EACH,
    )
    return out


def four_bit_changed(
    codes: Tensor,
    absmax: Tensor,
    table: Tensor,
    block_size: int,
    up: Tensor,
    down: Tensor,
    out: Tensor,
    nested: tuple[Tensor, Tensor, Tensor, int] | None = None,
    tile: ChangedTile = CHANGED_TILE,
) -> Tensor:
    """As ``four_bit``, with ``up @ down`` added before it is rounded; the sum over the rank is in float32.

    Args:
        absmax: uint8 with ``nested``.
        up: ``[out, rank]``, its transpose contiguous (else it is copied), in 16 bits, as ``down``.
        down: ``[rank, in]``.
        out: ``[out, in]``; its width is a multiple of 8.
        nested: scales, table, offset and block size of ``four_bit_nested``.
    """
    from .four_bit import dequantize_changed

    (rows, columns), (rank, _) = out.shape, down.shape
    high = up.t().contiguous()
    _check(out, codes, -(-out.numel() // 2))
    _check(out, absmax, -(-out.numel() // block_size))
    _check(out, high, rows * rank)
    _check(out, down, rank * columns)
    if columns % 8:
        raise ValueError(f"rows of {columns} numbers are no whole words of 8 codes")
    outer, book, offset, nested_block_size = nested or (absmax, absmax, absmax, 0)
    launch(
        dequantize_changed,
        (-(-columns // tile.columns), -(-rows // tile.rows)),
        *(_words(codes), absmax, table, outer, book, offset, high, down, out, rows, columns, rank),
        BLOCK_SIZE=block_size,
        NESTED_BLOCK=nested_block_size,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        RANK=next((each for each in RANKS if rank <= each), RANKS[-1]),
        num_warps=tile.warps,
        num_stages=2,
        **ROUNDED_EACH,
    )
    return out


def _words(codes: Tensor) -> Tensor:
    """The codes as int32, copied only where they are no whole words or do not begin at one (no real weight)."""
    if short := -len(codes) % 4:
        codes = torch.nn.functional.pad(codes, (0, short))
    elif codes.data_ptr() % 4:
        codes = codes.clone()
    return codes.view(torch.int32)


def float8(weight: Tensor, scale: Tensor | None, out: Tensor) -> Tensor:
    """A matrix of 8-bit floats, times a scale.

    Args:
        weight: float8_e4m3fn or float8_e5m2 ``[out, in]``, contiguous.
        scale: float32 with one value, or one for each row; None for none.
    """
    from .float8 import dequantize

    rows, columns = out.shape
    _check(out, weight, rows * columns)
    if scale is not None and scale.numel() != 1:
        _check(out, scale, rows)
    tall, wide = _FLOAT8_TILE
    codes = weight.view(torch.uint8)
    launch(
        dequantize,
        (-(-rows // tall), -(-columns // wide)),
        *(codes, codes if scale is None else scale, out, rows, columns),
        SCALED=scale is not None,
        PER_ROW=scale is not None and scale.numel() > 1,
        E5M2=weight.dtype == torch.float8_e5m2,
        ROWS=tall,
        COLUMNS=wide,
    )
    return out


def gguf_blocks(type_name: str, blocks: Tensor, out: Tensor) -> Tensor:
    """Blocks of one of the ``SUPPORTED`` GGUF types.

    Args:
        blocks: uint8 ``[out, bytes of a row]``, contiguous.
    """
    from . import gguf

    runs, run = _RUNS[type_name]
    layout = BLOCK_TYPES[type_name]
    count = out.numel() // layout.elements
    _check(out, blocks, count * layout.nbytes)
    several = _GGUF_ELEMENTS // layout.elements
    data = blocks.view(-1)
    if data.data_ptr() % 2:
        data = data.clone()
    launch(
        gguf.dequantize,
        (-(-count // several),),
        *(data, data.view(torch.float16), constant(_IQ4_TABLE, out.device), out, count),
        DECODE=getattr(gguf, type_name.lower()),
        BLOCKS=several,
        RUNS=runs,
        RUN=run,
        BLOCK_BYTES=layout.nbytes,
    )
    return out


def _check(out: Tensor, part: Tensor, expected: int) -> None:
    """A program reads and writes by address: what does not fit would be read from behind the tensor.

    Raises:
        ValueError: a part is of another size or device than ``out`` needs, or either is not contiguous.
    """
    if part.numel() != expected:
        raise ValueError(f"a part has {part.numel()} values where {list(out.shape)} needs {expected}")
    if part.device != out.device:
        raise ValueError(f"a part lies on {part.device}, the result on {out.device}")
    if not (part.is_contiguous() and out.is_contiguous()):
        raise ValueError("parts and result of a dequantisation must be contiguous")
