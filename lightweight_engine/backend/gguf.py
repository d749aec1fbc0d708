"""The block types of GGUF files as numbers.

A row is a whole number of blocks; a block has a 16-bit scale (some an offset too) and codes of 2 to 8 bits. Types K
have 256 numbers in a block, with small integer scales for each 16 or 32 of them; IQ4 types have a code book.

A decoder takes blocks, uint8 ``[n, bytes]``, to float32 ``[n, elements]``. Every layout is made of runs of bit fields,
which ``_fields`` parts. The simple types are also written; K and IQ types are read only, as good ones take a search.

Source: ggml-quants.c and gguf-py (MIT), whose values and bytes these are, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .block_types import BLOCK_TYPES, BlockType
from .packed import Packed, Spec, check_matrix, divided, pieces, reading, stacked_shape

if TYPE_CHECKING:
    from .stored import Stored

Codec = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Blocks(Spec):
    """A matrix of GGUF blocks of one type (``Q8_0``, ``Q4_K`` …)."""

    type: str
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        if self.type not in BLOCK_TYPES:
            raise ValueError(f"the GGUF type {self.type} is not read; these are: {', '.join(BLOCK_TYPES)}")
        self.layout.row_bytes(self.shape[1])

    @property
    def name(self) -> str:
        return f"gguf:{self.type}"

    @property
    def layout(self) -> BlockType:
        return BLOCK_TYPES[self.type]

    @property
    def parts(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"blocks": ((self.shape[0], self.layout.row_bytes(self.shape[1])), torch.uint8)}

    def _by_torch(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        elements, decode = self.layout.elements, DECODERS[self.type]
        blocks = parts["blocks"].reshape(-1, self.layout.nbytes)
        out = torch.empty(len(blocks), elements, dtype=dtype, device=blocks.device)
        for piece in pieces(len(blocks), elements, blocks.device):
            out[piece] = decode(blocks[piece])
        return out.view(self.shape)

    def _by_program(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        from .kernels.dequantize import gguf_blocks

        gguf_blocks(self.type, parts["blocks"], out)

    def take(self, parts: Mapping[str, Tensor], start: int, stop: int) -> Packed:
        return Packed(replace(self, shape=(stop - start, self.shape[1])), {"blocks": parts["blocks"][start:stop]})

    def stack(self, matrices: Sequence[Packed]) -> Packed:
        blocks = torch.cat([m.parts["blocks"] for m in matrices])
        return Packed(replace(self, shape=stacked_shape(matrices)), {"blocks": blocks})


def quantize_blocks(matrix: Tensor, type: str) -> Packed:
    """A matrix ``[out, in]`` as blocks of a type; the same bytes as gguf-py writes.

    Raises:
        ValueError: the type is not written, the width is no whole number of blocks, or values are not finite or too
            large for a block's scale.
    """
    if type not in ENCODERS:
        raise ValueError(f"the GGUF type {type} is not written; these are: {', '.join(ENCODERS)}")
    check_matrix(matrix)
    spec = Blocks(type, (matrix.shape[0], matrix.shape[1]))
    values = matrix.reshape(-1, spec.layout.elements)
    blocks = torch.empty(len(values), spec.layout.nbytes, dtype=torch.uint8, device=matrix.device)
    for piece in pieces(len(values), spec.layout.elements, matrix.device):
        blocks[piece] = ENCODERS[type](values[piece].float())
    return Packed(spec, {"blocks": blocks.view(matrix.shape[0], -1)})


def read_packed(stored: Stored) -> Packed:
    """A matrix of GGUF blocks of a file, as a view of it.

    Raises:
        CorruptCheckpointError: the type is not read, or the bytes do not fit the shape.
    """
    with reading(stored):
        spec = Blocks(stored.format.removeprefix("gguf:"), (stored.shape[0], stored.shape[1]))
        blocks = stored.checkpoint.tensor(stored.name)
        shape, dtype = spec.parts["blocks"]
        if blocks.dtype != dtype or blocks.numel() != math.prod(shape):
            raise ValueError(f"it has {blocks.nbytes} bytes, its shape {list(spec.shape)} needs {math.prod(shape)}")
        return Packed(spec, {"blocks": blocks.view(shape)})


def _half(blocks: Tensor, start: int) -> Tensor:
    """The float16 at a byte of each block, as float32 ``[n, 1]``."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _fields(blocks: Tensor, start: int, stop: int, *, bits: int, run: int) -> Tensor:
    """The bit fields of bytes ``start`` to ``stop``, uint8 ``[n, fields]``.

    The bytes come in runs. Of a run, first the lowest ``bits`` of each byte in turn, then the next ones, and so on.
    """
    runs = blocks[:, start:stop].reshape(len(blocks), -1, 1, run)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=blocks.device)
    return ((runs >> shifts[:, None]) & (2**bits - 1)).reshape(len(blocks), -1)


def _signed(fields: Tensor, offset: int) -> Tensor:
    return fields.float() - offset


def _grouped(values: Tensor, groups: int) -> Tensor:
    return values.float().view(len(values), groups, -1)


def _q8_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * blocks[:, 2:].view(torch.int8).float()


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _signed(_fields(blocks, 2, 18, bits=4, run=16), 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _fields(blocks, 4, 20, bits=4, run=16).float() + _half(blocks, 2)


def _five_bits(blocks: Tensor, start: int) -> Tensor:
    """The codes of Q5_0 and Q5_1: four bytes with the fifth bit of each number, then the lower four."""
    high = _fields(blocks, start, start + 4, bits=1, run=1)
    return _fields(blocks, start + 4, start + 20, bits=4, run=16) | (high << 4)


def _q5_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _signed(_five_bits(blocks, 2), 16)


def _q5_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _five_bits(blocks, 4).float() + _half(blocks, 2)


def _affine(codes: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
    """Codes times the scale of their group, less its offset; groups are of equal size."""
    groups = scales.shape[1]
    return (scales[:, :, None] * _grouped(codes, groups) - offsets[:, :, None]).view(codes.shape)


def _scaled(codes: Tensor, scales: Tensor) -> Tensor:
    return (scales[:, :, None] * _grouped(codes, scales.shape[1])).view(codes.shape)


def _q2_k(blocks: Tensor) -> Tensor:
    scales = _half(blocks, 80) * (blocks[:, :16] & 15).float()
    offsets = _half(blocks, 82) * (blocks[:, :16] >> 4).float()
    return _affine(_fields(blocks, 16, 80, bits=2, run=32), scales, offsets)


def _q3_k(blocks: Tensor) -> Tensor:
    low = _fields(blocks, 96, 104, bits=4, run=8)
    scales = _half(blocks, 108) * _signed(low | (_fields(blocks, 104, 108, bits=2, run=4) << 4), 32)
    # The third bit is stored inverted: where it is clear, four is subtracted.
    codes = _fields(blocks, 32, 96, bits=2, run=32) | (_fields(blocks, 0, 32, bits=1, run=32) << 2)
    return _scaled(_signed(codes, 4), scales)


def _scales_and_offsets(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of Q4_K and Q5_K, float32 ``[n, 8]`` each, from two float16 and twelve bytes with sixteen 6-bit integers.

    Four bytes begin with scales 0-3, four with offsets 0-3; scales and offsets 4-7 have their lower halves in the last
    four bytes and their upper two bits in those that the first eight leave free.
    """
    scales, offsets, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([scales & 63, (rest & 15) | (scales >> 6 << 4)], dim=1)
    offsets = torch.cat([offsets & 63, (rest >> 4) | (offsets >> 6 << 4)], dim=1)
    return _half(blocks, 0) * scales.float(), _half(blocks, 2) * offsets.float()


def _q4_k(blocks: Tensor) -> Tensor:
    return _affine(_fields(blocks, 16, 144, bits=4, run=32), *_scales_and_offsets(blocks))


def _q5_k(blocks: Tensor) -> Tensor:
    high = _fields(blocks, 16, 48, bits=1, run=32)
    return _affine(_fields(blocks, 48, 176, bits=4, run=32) | (high << 4), *_scales_and_offsets(blocks))


def _q6_k(blocks: Tensor) -> Tensor:
    codes = _fields(blocks, 0, 128, bits=4, run=64) | (_fields(blocks, 128, 192, bits=2, run=32) << 4)
    scales = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
    return _scaled(_signed(codes, 32), scales)


_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _iq4(codes: Tensor) -> Tensor:
    book = torch.tensor(_IQ4, dtype=torch.float32, device=codes.device)
    return book.index_select(0, codes.flatten().int()).view(codes.shape)


def _iq4_nl(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _iq4(_fields(blocks, 2, 18, bits=4, run=16))


def _iq4_xs(blocks: Tensor) -> Tensor:
    low, high = _fields(blocks, 4, 8, bits=4, run=1), _fields(blocks, 2, 4, bits=2, run=1)
    scales = _half(blocks, 0) * _signed(low | (high << 4), 32)
    return _scaled(_iq4(_fields(blocks, 8, 136, bits=4, run=16)), scales)


DECODERS: dict[str, Codec] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}


def _inverse(scale: Tensor) -> Tensor:
    """One over a scale; 0 where that is infinite, as the 16-bit scale is then 0."""
    return (1.0 / scale).nan_to_num(posinf=0.0, neginf=0.0)


def _half_bytes(values: Tensor) -> Tensor:
    half = values.half()
    if not torch.isfinite(half).all():
        raise ValueError("its values are too large for the 16-bit scale of a block")
    return half.view(torch.uint8)


def _nibbles(codes: Tensor) -> Tensor:
    """Two codes to a byte: number i of a block and, in the high half, number i + 16."""
    return (codes[:, :16] & 15) | (codes[:, 16:] << 4)


def _fifth_bits(codes: Tensor) -> Tensor:
    places = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return ((codes >> 4).view(-1, 4, 8) << places).sum(dim=2, dtype=torch.uint8)


def _symmetric(values: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Scales that give the number of the largest magnitude the lowest code, whatever its sign, and codes."""
    farthest = values.gather(1, values.abs().argmax(dim=1, keepdim=True))
    scale = farthest / (-levels // 2)
    codes = (values * _inverse(scale) + (levels // 2 + 0.5)).trunc().clamp(0, levels - 1)
    return _half_bytes(scale), codes.to(torch.uint8)


def _ranged(values: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Scales and lowest values of blocks, and codes."""
    low, high = values.amin(dim=1, keepdim=True), values.amax(dim=1, keepdim=True)
    scale = divided(high - low, levels - 1)
    codes = ((values - low) * _inverse(scale) + 0.5).trunc().clamp(0, levels - 1)
    return torch.cat([_half_bytes(scale), _half_bytes(low)], dim=1), codes.to(torch.uint8)


def _write_q8_0(values: Tensor) -> Tensor:
    scale = divided(values.abs().amax(dim=1, keepdim=True), 127)
    scaled = values * _inverse(scale)
    size, whole = scaled.abs(), scaled.abs().floor()
    codes = torch.copysign(whole + (size - whole >= 0.5), scaled)  # halves away from zero; torch.round has them to even
    return torch.cat([_half_bytes(scale), codes.to(torch.int8).view(torch.uint8)], dim=1)


def _write_q4_0(values: Tensor) -> Tensor:
    scales, codes = _symmetric(values, 16)
    return torch.cat([scales, _nibbles(codes)], dim=1)


def _write_q4_1(values: Tensor) -> Tensor:
    scales, codes = _ranged(values, 16)
    return torch.cat([scales, _nibbles(codes)], dim=1)


def _write_q5_0(values: Tensor) -> Tensor:
    scales, codes = _symmetric(values, 32)
    return torch.cat([scales, _fifth_bits(codes), _nibbles(codes)], dim=1)


def _write_q5_1(values: Tensor) -> Tensor:
    scales, codes = _ranged(values, 32)
    return torch.cat([scales, _fifth_bits(codes), _nibbles(codes)], dim=1)


ENCODERS: dict[str, Codec] = {
    "Q8_0": _write_q8_0,
    "Q5_1": _write_q5_1,
    "Q5_0": _write_q5_0,
    "Q4_1": _write_q4_1,
    "Q4_0": _write_q4_0,
}
