"""A matrix in a storage format: a few tensors, and what is needed to read them as numbers.

Each format (``nf4``, ``fp8``, ``gguf``) has a file of its own with a ``Spec``; nothing outside those files knows how
bytes become numbers. Modules that hold packed weights are in ``linear``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import CorruptCheckpointError
from . import kernels

if TYPE_CHECKING:
    from .stored import Stored

# Numbers that a conversion works on at a time: few enough for a CPU's cache, on a GPU enough to keep launches rare.
# With at most so many bytes of temporaries for each, that is 64 MiB there.
PIECE = 1 << 18
GPU_PIECE = 1 << 22
TEMPORARIES = 16

Added = tuple[Tensor, Tensor]
"""A change of low rank that is added to a matrix ``[out, in]``: up ``[out, rank]`` and down ``[rank, in]``."""


class Spec(ABC):
    """What a packed matrix is, without its tensors: a frozen dataclass of a format.

    Attributes:
        shape: ``(out, in)`` of the matrix.
    """

    shape: tuple[int, int]

    @property
    @abstractmethod
    def name(self) -> str:
        """Of the format, as the setting ``storage_dtype`` has it: ``nf4``, ``fp8_e4m3``, ``gguf:Q8_0``."""

    @property
    @abstractmethod
    def parts(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The tensors that the matrix consists of: name to shape and dtype, in the order in which they are kept."""

    @property
    def has_program(self) -> bool:
        """Whether a GPU can do it in one pass."""
        return True

    def takes_added(self, device: torch.device) -> bool:
        """Whether adding a change of low rank there is part of the one pass, and costs next to nothing."""
        return False

    def dequantize(self, parts: Mapping[str, Tensor], dtype: torch.dtype, added: Added | None = None) -> Tensor:
        """The matrix ``[out, in]`` on the device of ``parts``: computed in float32, rounded once to ``dtype``.

        Args:
            added: to the numbers, before they are rounded.
        """
        device = next(iter(parts.values())).device
        if added is None and not self._in_one_pass(device):
            return self._by_torch(parts, dtype)
        out = torch.empty(self.shape, dtype=dtype, device=device)
        self.dequantize_into(parts, out, added)
        return out

    def dequantize_into(self, parts: Mapping[str, Tensor], out: Tensor, added: Added | None = None) -> None:
        """The same into a contiguous tensor ``[out, in]``, where a program writes it at once."""
        if added is not None:
            self._changed(parts, added, out)
        elif self._in_one_pass(out.device):
            self._by_program(parts, out)
        else:
            out.copy_(self._by_torch(parts, out.dtype))

    def _changed(self, parts: Mapping[str, Tensor], added: Added, out: Tensor) -> None:
        """``dequantize_into`` of a changed matrix."""
        up, down = added
        out.copy_(self._by_torch(parts, torch.float32).add_(up.float() @ down.float()))

    def _in_one_pass(self, device: torch.device) -> bool:
        return self.has_program and device.type == "cuda" and kernels.available()

    @abstractmethod
    def _by_torch(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """``dequantize`` in plain torch, on any device."""

    @abstractmethod
    def _by_program(self, parts: Mapping[str, Tensor], out: Tensor) -> None:
        """``dequantize_into`` in one pass over memory: the same numbers."""

    @abstractmethod
    def take(self, parts: Mapping[str, Tensor], start: int, stop: int) -> Packed:
        """Rows ``start`` to ``stop`` without a change of any number.

        Raises:
            ValueError: the cut goes through a block.
        """

    @abstractmethod
    def stack(self, matrices: Sequence[Packed]) -> Packed:
        """Matrices of this format, the first being of this spec, one below another, without a change of any number.

        Raises:
            ValueError: they cannot be joined so (other block sizes, code books or widths, or a block across the seam).
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

    def dequantize(self, dtype: torch.dtype = torch.float32, added: Added | None = None) -> Tensor:
        return self.spec.dequantize(self.parts, dtype, added)

    def dequantize_into(self, out: Tensor, added: Added | None = None) -> None:
        self.spec.dequantize_into(self.parts, out, added)

    @property
    def device(self) -> torch.device:
        return next(iter(self.parts.values())).device

    def take(self, start: int, stop: int) -> Packed:
        return self.spec.take(self.parts, start, stop)

    def to(self, device: torch.device) -> Packed:
        if all(tensor.device == device for tensor in self.parts.values()):
            return self
        return Packed(self.spec, {name: tensor.to(device) for name, tensor in self.parts.items()})


def stack(matrices: Sequence[Packed]) -> Packed:
    """Matrices of one format, one below another; see ``Spec.stack``."""
    if len(matrices) == 1:
        return matrices[0]
    if any(type(m.spec) is not type(matrices[0].spec) or m.spec.name != matrices[0].spec.name for m in matrices):
        raise ValueError("the matrices are stored in different formats")
    if len({m.shape[1] for m in matrices}) > 1:
        raise ValueError(f"the matrices have different widths: {[list(m.shape) for m in matrices]}")
    return matrices[0].spec.stack(matrices)


def stacked_shape(matrices: Sequence[Packed]) -> tuple[int, int]:
    """The shape of matrices of one width, one below another."""
    return sum(m.shape[0] for m in matrices), matrices[0].shape[1]


def pieces(count: int, numbers: int, device: torch.device) -> Iterator[slice]:
    """Slices over ``count`` rows or blocks of ``numbers`` each, so that what is made of one slice stays small."""
    step = max(1, (PIECE if device.type == "cpu" else GPU_PIECE) // numbers)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def check_matrix(matrix: Tensor) -> None:
    """Refuse what no format can hold.

    Raises:
        ValueError: it is no matrix of floating-point numbers, is empty, or has values that are not finite.
    """
    if matrix.dim() != 2 or not matrix.is_floating_point() or not matrix.numel():
        raise ValueError(f"a matrix of numbers is needed, this is {matrix.dtype} of the shape {list(matrix.shape)}")
    if not all(torch.isfinite(end) for end in torch.aminmax(matrix)):  # NaN comes through; no mask as large as a matrix
        raise ValueError("it has values that are not finite (NaN or infinity)")


def divided(values: Tensor, by: float) -> Tensor:
    """Values divided by a number, rounded once; by a bare number, a GPU multiplies with its inverse: rounded twice."""
    return values / torch.full_like(values, by)


@contextmanager
def reading(stored: Stored) -> Iterator[None]:
    """Turns what is wrong with a stored matrix (``ValueError``) into an error that names file and tensor."""
    try:
        if len(stored.shape) != 2:
            raise ValueError(f"it has the shape {list(stored.shape)}, and only matrices are stored as {stored.format}")
        yield
    except ValueError as error:
        raise CorruptCheckpointError(
            f"{stored.checkpoint.path.name}: {stored.name!r} cannot be read as {stored.format}: {error}; "
            "download the file again"
        ) from None


def satellite(stored: Stored, role: str) -> Tensor:
    """The tensor that belongs to a stored matrix as its ``role``.

    Raises:
        ValueError: the file has none.
    """
    if role not in stored.satellites:
        raise ValueError(f"its {role} is missing")
    return stored.checkpoint.tensor(stored.satellites[role])


def check_finite(tensor: Tensor, what: str) -> None:
    """Refuse scales that would spoil every number of a block.

    Raises:
        ValueError: a value is not finite.
    """
    if not torch.isfinite(tensor).all():
        raise ValueError(f"its {what} has values that are not finite (NaN or infinity)")
