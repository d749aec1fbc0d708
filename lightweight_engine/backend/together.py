"""Linears that read the same input, as one product: their weights lie one behind another on a GPU.

A product of 512 rows with a square matrix is too small to keep all of a large GPU busy; three of them as one are not.
Where a weight is elsewhere, packed or adapted, each linear is computed by itself.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import in_pieces
from .linear import CastLinear
from .streaming import aligned

PLAIN = (nn.Linear, CastLinear)


class ReadsTogether(nn.Module):
    """A module some of whose linears, none with a bias, read the same input.

    Attributes:
        together: their names, in order.
    """

    together: tuple[str, ...] = ()

    def products(self, x: Tensor) -> Sequence[Tensor]:
        """What each of them makes of ``x`` ``[..., in]``."""
        linears: list[Any] = [self._modules[name] for name in self.together]
        joint = joint_weight(linears) if x.is_cuda and not torch.is_grad_enabled() else None
        if joint is None or not (joint.dtype == x.dtype or in_pieces.serves(x, joint)):
            return [linear(x) for linear in linears]
        made = F.linear(x, joint) if joint.dtype == x.dtype else in_pieces.product(x, joint)
        return made.split([linear.out_features for linear in linears], dim=-1)


def joint_weight(linears: Sequence[nn.Module]) -> Tensor | None:
    """One matrix ``[all outputs, in]`` that is the weights of all, where they lie in memory like that; else None.

    Asked for at each use, as weights move, in few steps of Python.
    """
    weights: list[Tensor] = []
    for linear in linears:
        if type(linear) not in PLAIN or "forward" in linear.__dict__ or linear._parameters["bias"] is not None:
            return None
        weights.append(linear._parameters["weight"])  # type: ignore[arg-type]
    first, storage = weights[0], weights[0].untyped_storage().data_ptr()
    dtype, width, end = first.dtype, first.shape[1], first.data_ptr()
    for weight in weights:
        follows = weight.data_ptr() == end and weight.untyped_storage().data_ptr() == storage
        if not (follows and weight.dtype == dtype and weight.shape[1] == width and weight.is_contiguous()):
            return None
        end += weight.nbytes
    rows = sum(weight.shape[0] for weight in weights)
    return first.detach().as_strided((rows, width), (width, 1))


def read_together(module: nn.Module) -> list[tuple[str, ...]]:
    """Names of the weights that are read together, group by group."""
    return [
        tuple(f"{path}.{name}.weight" for name in each.together)
        for path, each in module.named_modules()
        if isinstance(each, ReadsTogether)
    ]


class Neighbours:
    """Places on a device for weights that are read together, one behind another; threads may ask for them.

    Args:
        groups: their names, in order.
        kept: the dtype of each weight, as far as it is plain.
        shapes: ``[out, in]`` of each.
    """

    def __init__(
        self,
        groups: Iterable[Sequence[str]],
        kept: Mapping[str, torch.dtype],
        shapes: Mapping[str, Sequence[int]],
        device: torch.device,
    ) -> None:
        self._shapes, self._kept, self._device = shapes, kept, device
        self._groups = {name: tuple(group) for group in groups if self._fits(group) for name in group}
        self._made: dict[tuple[str, ...], list[Tensor]] = {}
        self._lock = threading.Lock()

    def place(self, name: str) -> Tensor | None:
        """Where this weight goes; None where it lies by itself."""
        group = self._groups.get(name)
        if group is None:
            return None
        with self._lock:
            if group not in self._made:
                rows = [self._shapes[each][0] for each in group]
                whole = torch.empty(sum(rows), self._shapes[name][1], dtype=self._kept[name], device=self._device)
                self._made[group] = list(whole.split(rows))
            return self._made[group][group.index(name)]

    def _fits(self, group: Sequence[str]) -> bool:
        """Whether one matrix holds all, with each at a place that a unit's other tensors could have too."""
        dtypes, widths = {self._kept.get(name) for name in group}, {self._shapes[name][1] for name in group}
        if None in dtypes or len(dtypes) > 1 or len(widths) > 1:
            return False
        itemsize = next(iter(dtypes)).itemsize  # type: ignore[union-attr]
        sizes = [self._shapes[name][0] * self._shapes[name][1] * itemsize for name in group]
        return all(size == aligned(size) for size in sizes)
