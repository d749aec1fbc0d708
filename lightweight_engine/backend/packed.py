"""A matrix in a storage format: a few tensors, and what is needed to read them as numbers.

Each format (``nf4``, ``fp8``, ``gguf``) has a file of its own with a ``Spec``; nothing outside those files knows how
bytes become numbers. Modules that hold packed weights are in ``linear``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class Spec(ABC):
    """What a packed matrix is, without its tensors: a frozen dataclass of a format.

    Attributes:
        name: of the format, as the setting ``storage_dtype`` has it (``nf4``, ``fp8_e4m3``, ``gguf:Q8_0``).
        shape: ``(out, in)`` of the matrix.
    """

    name: str
    shape: tuple[int, int]

    @property
    @abstractmethod
    def parts(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The tensors that the matrix consists of: name to shape and dtype, in the order in which they are kept."""

    @abstractmethod
    def dequantize(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The matrix ``[out, in]`` on the device of ``parts``: computed in float32, rounded once to ``dtype``."""

    @abstractmethod
    def take(self, parts: Mapping[str, Tensor], start: int, stop: int) -> Packed:
        """Rows ``start`` to ``stop`` without a change of any number.

        Raises:
            ValueError: the cut goes through a block.
        """

    @abstractmethod
    def stack(self, matrices: Sequence[Packed]) -> Packed:
        """Matrices of this format, this one's spec being the first's, one below another, without a change of any number.

        Raises:
            ValueError: they cannot be joined so (other block sizes, widths, or scales of a whole matrix).
        """

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.parts.values())


@dataclass(frozen=True, eq=False)
class Packed:
    """A matrix in a storage format, with its tensors."""

    spec: Spec
    parts: Mapping[str, Tensor]

    @property
    def shape(self) -> tuple[int, int]:
        return self.spec.shape

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.parts.values())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.spec.dequantize(self.parts, dtype)

    def take(self, start: int, stop: int) -> Packed:
        return self.spec.take(self.parts, start, stop)

    def to(self, device: torch.device) -> Packed:
        return Packed(self.spec, {name: tensor.to(device) for name, tensor in self.parts.items()})


def stack(matrices: Sequence[Packed]) -> Packed:
    """Matrices of one format, one below another; see ``Spec.stack``."""
    if len(matrices) == 1:
        return matrices[0]
    if any(type(m.spec) is not type(matrices[0].spec) or m.spec.name != matrices[0].spec.name for m in matrices):
        raise ValueError("the matrices are stored in different formats")
    return matrices[0].spec.stack(matrices)
