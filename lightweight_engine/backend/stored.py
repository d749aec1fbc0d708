"""The logical tensors of a model file: what a weight and its satellites (scales, code books) hold together.

A plain file has one tensor for each parameter. A quantised one has several, told apart by their names and dtypes, tensor
by tensor: mixed files are common. Loads no torch and reads no weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from .packed import Packed


@dataclass(frozen=True, eq=False)
class Stored:
    """One parameter as a file has it.

    Attributes:
        name: the key of the weight itself, which names the parameter.
        format: ``plain``, ``nf4``, ``fp4``, ``fp8_e4m3``, ``fp8_e5m2`` or ``gguf:TYPE``.
        shape: of the parameter, whatever shape its bytes have in the file.
        satellites: what else belongs to it: role (``absmax``, ``scale`` …) to key.
        details: numbers that the format's reader needs (block size, offset of nested scales …).
    """

    checkpoint: Checkpoint
    name: str
    format: str
    shape: tuple[int, ...]
    satellites: Mapping[str, str] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def keys(self) -> tuple[str, ...]:
        """Every key of the file that it consists of."""
        return (self.name, *self.satellites.values())

    @property
    def nbytes(self) -> int:
        """Bytes in the file, satellites included."""
        return sum(self.checkpoint.tensors[key].nbytes for key in self.keys)

    @property
    def dtype(self) -> str:
        """The file's dtype of the weight's bytes, in safetensors' spelling."""
        return self.checkpoint.tensors[self.name].dtype

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def read(self) -> Tensor | Packed:
        """The tensor, or the packed matrix, as views of the mapped file where that can be."""
        if self.format == "plain":
            return self.checkpoint.tensor(self.name)
        raise NotImplementedError


def find_stored(checkpoint: Checkpoint) -> dict[str, Stored]:
    """Every parameter of a file by name. Each key of the file belongs to exactly one.

    Raises:
        UnsupportedCheckpointError: a layer is stored in a format that is not read; layer and format are named.
        CorruptCheckpointError: satellites are missing, or do not fit.
    """
    return {name: Stored(checkpoint, name, "plain", info.shape) for name, info in checkpoint.tensors.items()}
