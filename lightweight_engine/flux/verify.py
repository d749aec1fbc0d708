"""Reading a part whole: every parameter has its place and its shape, and every number of it is finite."""

from __future__ import annotations

import torch

from ..backend.packed import Packed
from ..errors import CorruptCheckpointError
from .keymaps import Part
from .load import empty_network, give_back, named_tensors, several


def verify_part(part: Part) -> int:
    """How many parameters a part has, each of them read.

    A packed weight is read as numbers, so that scales and codes are looked at by what they mean. Pages of the file are
    given back, so that memory stays flat.

    Raises:
        UnsupportedCheckpointError: keys or shapes that do not fit; the first ones are named.
        CorruptCheckpointError: a weight that cannot be read, or a number that is not finite; it is named.
    """
    names = list(named_tensors(empty_network(part)))
    for name, finite in several(lambda name: _is_finite(part, name), names):
        if not finite:
            raise CorruptCheckpointError(
                f"{part.checkpoint.path.name}: {name} holds numbers that are not finite; download it again"
            )
    return len(names)


def _is_finite(part: Part, name: str) -> bool:
    value = part.sources[name].read()
    numbers = value.dequantize() if isinstance(value, Packed) else value
    if numbers.is_floating_point() and numbers.itemsize == 1:  # 8-bit floats have no comparisons of their own
        numbers = numbers.float()
    finite = not numbers.numel() or all(bool(torch.isfinite(end)) for end in torch.aminmax(numbers))
    give_back(part.sources[name])
    return finite
