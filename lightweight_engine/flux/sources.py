"""Where a parameter of a network comes from: a tensor of a file, rows of one, or several joined.

Loads no torch before a weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..backend.stored import Stored

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..backend.packed import Packed

Rows = tuple[int, int] | None
"""First row and the one after the last; None for all."""


@dataclass(frozen=True, eq=False)
class Source:
    """Where a parameter of ours comes from: rows of one stored tensor or several, one below another.

    Attributes:
        pieces: (tensor, rows of it), all rows where that is None.
        swapped: the two halves of the rows change places (diffusers has scale before shift).
        shape: of the parameter; that of the rows joined, or one with as many elements (1 x 1 convolutions).
    """

    pieces: tuple[tuple[Stored, Rows], ...]
    shape: tuple[int, ...]
    swapped: bool = False

    @property
    def format(self) -> str:
        """The one format of all pieces, else ``mixed``."""
        first = self.pieces[0][0].format
        return first if all(stored.format == first for stored, _ in self.pieces[1:]) else "mixed"

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return sum(nbytes_of(stored, rows) for stored, rows in self.pieces)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def read(self, look: bool = True) -> Tensor | Packed:
        """The parameter, on the CPU.

        A view of the mapped file where one plain tensor holds it as it is; packed where all pieces are and can be
        joined without a change of any number; else put together in the pieces' own dtype, the widest of several, or
        in float32 where one of them is packed.

        Args:
            look: see ``Stored.read``; numbers that packed pieces become are of those that were looked at.

        Raises:
            CorruptCheckpointError: a quantised tensor that cannot be read, or scales that are not finite.
        """
        (first, rows), *more = self.pieces
        if not more and rows is None and not self.swapped and first.shape == self.shape:
            return first.read(look)

        from torch import Tensor

        from ..backend import packed

        values = [(stored.read(look), rows) for stored, rows in self._cuts()]
        matrices = [
            value if rows is None else value.take(*rows) for value, rows in values if not isinstance(value, Tensor)
        ]
        if len(matrices) == len(values) and self.shape == joined_shape([m.shape for m in matrices]):
            try:
                return packed.stack(matrices)
            except ValueError:  # scales or blocks that cannot stand in one matrix
                pass
        if matrices and not look:
            return self.read()
        return _join([_numbers(value, rows) for value, rows in values]).reshape(self.shape)

    def _cuts(self) -> Iterator[tuple[Stored, Rows]]:
        """The pieces in the order of our rows."""
        if not self.swapped:
            yield from self.pieces
            return
        for stored, rows in self.pieces:
            start, stop = rows or (0, stored.shape[0])
            middle = (start + stop) // 2
            yield stored, (middle, stop)
            yield stored, (start, middle)


def nbytes_of(stored: Stored, rows: Rows) -> int:
    """Bytes in the file of some rows of a tensor."""
    return stored.nbytes if rows is None else stored.nbytes * (rows[1] - rows[0]) // max(stored.shape[0], 1)


def _numbers(value: Tensor | Packed, rows: Rows) -> Tensor:
    from torch import Tensor

    if isinstance(value, Tensor):
        return value if rows is None else value[rows[0] : rows[1]]
    numbers = value.dequantize()
    return numbers if rows is None else numbers[rows[0] : rows[1]]


def _join(tensors: Sequence[Tensor]) -> Tensor:
    """One below another, in the widest of their dtypes."""
    import torch

    if len(tensors) == 1:
        return tensors[0]
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1:
        wide = _widest(dtypes)
        return torch.cat([tensor.to(wide) for tensor in tensors])
    dtype = dtypes.pop()
    if dtype.itemsize > 1:
        return torch.cat(list(tensors))
    return torch.cat([tensor.view(torch.uint8) for tensor in tensors]).view(dtype)


def _widest(dtypes: set[torch.dtype]) -> torch.dtype:
    """A dtype that holds the numbers of all: 8-bit floats have none in common with others but float32."""
    import torch

    if any(dtype.itemsize == 1 for dtype in dtypes):
        return torch.float32
    first, *others = dtypes
    for other in others:
        first = torch.promote_types(first, other)
    return first


def joined_shape(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of tensors of such shapes, one below another."""
    return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if shapes else ()
