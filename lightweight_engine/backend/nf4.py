"""Four bits to a number: indices into a code book of sixteen, and one scale (absmax) for each block (bitsandbytes).

Blocks run through the row-major matrix and may cross rows. A byte holds two codes, the first in its high half. A double
quantised matrix has 8-bit scales with a code book and scales of their own, which stay as they are: 4.13 bits to a
weight instead of 4.5.

Source: the QLoRA paper (Dettmers et al. 2023) for the format; bitsandbytes (MIT) for the code books and the ties.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels
from .packed import Added, Packed, Spec, check_finite, check_matrix, pieces, reading, satellite, stacked_shape

if TYPE_CHECKING:
    from .stored import Stored

Kind = Literal["nf4", "fp4"]

_FP4 = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
# nf4: the quantiles of a normal distribution, so that each code is used equally often.
CODE_BOOKS: dict[str, tuple[float, ...]] = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": (*_FP4, 0.0, *(-value for value in _FP4[1:])),
}
BLOCK_SIZES = tuple(2**power for power in range(5, 13))
_TINY = 1e-38  # the least absmax that is divided by, as in bitsandbytes: one over it is still finite


@dataclass(frozen=True)
class FourBit(Spec):
    """A matrix of 4-bit codes.

    Attributes:
        block_size: numbers that share a scale.
        nested_block_size: scales that share a scale of the second order; 0 where scales are float32.
        own_book: it has another code book than the standard one, as the part ``code_book``.
    """

    kind: Kind
    shape: tuple[int, int]
    block_size: int = 64
    nested_block_size: int = 0
    own_book: bool = False

    @property
    def name(self) -> str:
        return self.kind

    @property
    def elements(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def blocks(self) -> int:
        return -(-self.elements // self.block_size)

    @property
    def parts(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        nested = self.nested_block_size
        return {
            "codes": ((-(-self.elements // 2),), torch.uint8),
            "absmax": ((self.blocks,), torch.uint8 if nested else torch.float32),
            **({"nested_absmax": ((-(-self.blocks // nested),), torch.float32)} if nested else {}),
            **({"nested_map": ((256,), torch.float32), "nested_offset": ((), torch.float32)} if nested else {}),
            **({"code_book": ((16,), torch.float32)} if self.own_book else {}),
        }

    def scales(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The scale of each block, float32 ``[blocks]``."""
        absmax = parts["absmax"]
        if not self.nested_block_size:
            return absmax
        nested = parts["nested_absmax"].repeat_interleave(self.nested_block_size)[: self.blocks]
        return parts["nested_map"].index_select(0, absmax.int()) * nested + parts["nested_offset"]

    def expand(self, parts: Mapping[str, Tensor]) -> Packed:
        """The same numbers with float32 scales."""
        kept = {name: tensor for name, tensor in parts.items() if not name.startswith("nested_")}
        return Packed(replace(self, nested_block_size=0), {**kept, "absmax": self.scales(parts)})

    def _by_torch(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        codes, scales = parts["codes"], self.scales(parts)
        pairs = _pairs(parts["code_book"] if self.own_book else code_book(self.kind, codes.device))
        if short := self.blocks * self.block_size // 2 - len(codes):
            codes = F.pad(codes, (0, short))
        codes = codes.view(self.blocks, self.block_size // 2)
        out = torch.empty(self.blocks, self.block_size, dtype=dtype, device=codes.device)
        for piece in pieces(self.blocks, self.block_size, codes.device):
            values = pairs.index_select(0, codes[piece].flatten().int()).view(torch.float32)
            torch.mul(values.view(-1, self.block_size), scales[piece, None], out=out[piece])
        return out.view(-1)[: self.elements].view(self.shape)

    def _by_program(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        from .kernels.dequantize import four_bit, four_bit_nested

        codes, absmax, book = parts["codes"], parts["absmax"], self._book_for_programs(parts)
        if self.nested_block_size:
            four_bit_nested(codes, absmax, *self._nested(parts), book, self.block_size, out)
        else:
            four_bit(codes, absmax, book, self.block_size, out)

    def takes_added(self, device: torch.device) -> bool:
        return self._in_one_pass(device) and self.shape[1] % 8 == 0

    def _changed(self, parts: Mapping[str, Tensor], added: Added, out: Tensor) -> None:
        if not self.takes_added(out.device):
            super()._changed(parts, added, out)
            return
        from .kernels.dequantize import four_bit_changed

        nested = self._nested(parts) if self.nested_block_size else None
        book = self._book_for_programs(parts)
        four_bit_changed(parts["codes"], parts["absmax"], book, self.block_size, *added, out, nested)

    def _book_for_programs(self, parts: Mapping[str, Tensor]) -> Tensor:
        from .kernels.dequantize import constant

        return parts["code_book"] if self.own_book else constant(CODE_BOOKS[self.kind], parts["codes"].device)

    def _nested(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, int]:
        return parts["nested_absmax"], parts["nested_map"], parts["nested_offset"], self.nested_block_size

    def take(self, parts: Mapping[str, Tensor], start: int, stop: int) -> Packed:
        first, last = start * self.shape[1], stop * self.shape[1]
        if first % self.block_size or (last % self.block_size and stop != self.shape[0]):
            raise ValueError(f"rows {start} to {stop} begin or end inside a block of {self.block_size} numbers")
        block, end = first // self.block_size, -(-last // self.block_size)
        if self.nested_block_size and block % self.nested_block_size:
            return self.expand(parts).take(start, stop)
        cuts = {"codes": slice(first // 2, -(-last // 2)), "absmax": slice(block, end)}
        if nested := self.nested_block_size:
            cuts["nested_absmax"] = slice(block // nested, -(-end // nested))
        taken = {name: tensor[cuts[name]] if name in cuts else tensor for name, tensor in parts.items()}
        return Packed(replace(self, shape=(stop - start, self.shape[1])), taken)

    def stack(self, matrices: Sequence[Packed]) -> Packed:
        specs = [_spec(m) for m in matrices]
        if len({spec.block_size for spec in specs}) > 1:
            raise ValueError(f"they have blocks of different sizes: {[spec.block_size for spec in specs]}")
        if len({spec.own_book for spec in specs}) > 1 or not _same(matrices, "code_book"):
            raise ValueError("they have different code books")
        if any(spec.elements % self.block_size for spec in specs[:-1]):
            raise ValueError(f"a block of {self.block_size} numbers would lie across the seam")
        if any(spec.nested_block_size for spec in specs) and not _nested_alike(matrices):
            matrices = [spec.expand(m.parts) for spec, m in zip(specs, matrices, strict=True)]
        joined = {"codes", "absmax", "nested_absmax"}
        parts = {
            name: torch.cat([m.parts[name] for m in matrices]) if name in joined else tensor
            for name, tensor in matrices[0].parts.items()
        }
        return Packed(replace(_spec(matrices[0]), shape=stacked_shape(matrices)), parts)


def _spec(matrix: Packed) -> FourBit:
    assert isinstance(matrix.spec, FourBit)
    return matrix.spec


def _same(matrices: Sequence[Packed], name: str) -> bool:
    first = matrices[0].parts.get(name)
    return first is None or all(torch.equal(first, m.parts[name]) for m in matrices[1:])


def _nested_alike(matrices: Sequence[Packed]) -> bool:
    """Whether 8-bit scales can be joined as they are: one code book, one offset, and no short block of them inside."""
    sizes = {_spec(m).nested_block_size for m in matrices}
    return (
        len(sizes) == 1
        and all(_same(matrices, name) for name in ("nested_map", "nested_offset"))
        and all(_spec(m).blocks % _spec(m).nested_block_size == 0 for m in matrices[:-1])
    )


def code_book(kind: Kind, device: torch.device | None = None) -> Tensor:
    """The sixteen values of a kind, float32."""
    return torch.tensor(CODE_BOOKS[kind], dtype=torch.float32, device=device)


def _pairs(book: Tensor) -> Tensor:
    """The two values of each byte, int64 ``[256]``: one look-up then fetches both, as eight bytes."""
    codes = torch.arange(256, device=book.device)
    return torch.stack([book[codes >> 4], book[codes & 15]], dim=1).view(torch.int64).view(256)


def quantize_4bit(matrix: Tensor, kind: Kind, block_size: int = 64) -> Packed:
    """The nearest codes of a matrix ``[out, in]``, with float32 scales; the same bytes as bitsandbytes.

    Raises:
        ValueError: it is no matrix, or has values that are not finite.
    """
    check_matrix(matrix)
    _check_block_size(block_size)
    spec = FourBit(kind, (matrix.shape[0], matrix.shape[1]), block_size)
    if matrix.is_cuda and kernels.available():
        from .kernels.dequantize import constant
        from .kernels.quantize import four_bit

        codes, absmax = four_bit(matrix, constant(CODE_BOOKS[kind], matrix.device), block_size)
        return Packed(spec, {"codes": codes, "absmax": absmax})
    flat, whole = matrix.reshape(-1), spec.blocks * block_size
    if whole > len(flat):
        flat = F.pad(flat, (0, whole - len(flat)))
    blocks = flat.view(spec.blocks, block_size)
    book, order = code_book(kind, matrix.device).sort(stable=True)
    between, order = (book[:-1] + book[1:]) / 2, order.to(torch.uint8)
    codes = torch.empty(spec.blocks, block_size // 2, dtype=torch.uint8, device=matrix.device)
    absmax = torch.empty(spec.blocks, dtype=torch.float32, device=matrix.device)
    for piece in pieces(spec.blocks, block_size, matrix.device):
        values = blocks[piece].float()
        torch.amax(values.abs(), dim=1, out=absmax[piece])
        values = values * (1.0 / absmax[piece, None].clamp(min=_TINY))
        nearest = order.index_select(0, torch.bucketize(values, between, out_int32=True).view(-1))
        pairs = nearest.view(-1, block_size // 2, 2)
        torch.bitwise_or(pairs[..., 0] << 4, pairs[..., 1], out=codes[piece])
    return Packed(spec, {"codes": codes.view(-1)[: -(-spec.elements // 2)], "absmax": absmax})


def _check_block_size(size: Any) -> None:
    if not isinstance(size, int) or size not in BLOCK_SIZES:
        raise ValueError(f"blocks of {size!r} numbers; {BLOCK_SIZES[0]} to {BLOCK_SIZES[-1]}, a power of two, are read")


def read_packed(stored: Stored, look: bool = True) -> Packed:
    """A 4-bit matrix of a file, as views of it.

    Args:
        look: at the numbers of scales and code books, too.

    Raises:
        CorruptCheckpointError: sizes do not fit together, a scale is not finite, or a part is missing.
    """
    with reading(stored):
        kind: Kind = "fp4" if stored.format == "fp4" else "nf4"
        nested = "nested_absmax" in stored.satellites
        nested_block_size = stored.details.get("nested_block_size", 256) if nested else 0
        block_size = stored.details.get("block_size", 0)
        for size in (block_size, *([nested_block_size] if nested else ())):
            _check_block_size(size)
        spec = FourBit(kind, (stored.shape[0], stored.shape[1]), block_size, nested_block_size)
        parts = {"codes": stored.checkpoint.tensor(stored.name).view(torch.uint8).view(-1)}
        parts["absmax"] = satellite(stored, "absmax").view(-1)
        if nested:
            parts["nested_absmax"] = satellite(stored, "nested_absmax").view(-1).float()
            parts["nested_map"] = satellite(stored, "nested_quant_map").view(-1).float()
            offset = stored.details.get("nested_offset")
            parts["nested_offset"] = torch.tensor(offset if isinstance(offset, int | float) else float("nan"))
        elif parts["absmax"].is_floating_point():
            parts["absmax"] = parts["absmax"].float()
        book = satellite(stored, "quant_map").view(-1).float()
        if not torch.equal(book, _standard_book(kind)):
            spec, parts["code_book"] = replace(spec, own_book=True), book
        _check_parts(spec, parts, look)
        return Packed(spec, parts)


@cache
def _standard_book(kind: Kind) -> Tensor:
    """On the CPU, to compare with."""
    return code_book(kind)


def _check_parts(spec: FourBit, parts: Mapping[str, Tensor], look: bool) -> None:
    for name, (shape, dtype) in spec.parts.items():
        tensor = parts[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(
                f"its {name} has {tensor.numel()} values of {tensor.dtype}, {math.prod(shape)} of {dtype} expected"
            )
        if look and tensor.is_floating_point():
            check_finite(tensor, name)
