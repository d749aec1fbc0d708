"""Changes of a weight by LoRAs: as one side branch beside it, as a dense change, or merged into it.

What a change is made of is the matter of ``lora_algorithms``. Letters: W [out, in] the weight, s the strength, r the
rank. All products are made in float32, whatever the file has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

Rows = tuple[int, int] | None
"""First row and the one after the last; None for all."""


@dataclass(frozen=True, eq=False)
class Branch:
    """A change of a linear that leaves its weight alone: ``y = W x`` becomes ``(1 + gain) * y + up (down x)``.

    Attributes:
        down: [R, in].
        up: [out, R], with strength and scale in it.
        gain: [out], or None where the output itself is kept.
    """

    down: Tensor
    up: Tensor
    gain: Tensor | None = None

    @property
    def rank(self) -> int:
        return len(self.down)

    def __call__(self, x: Tensor, output: Tensor) -> Tensor:
        """The changed output; ``output`` is W x without the bias."""
        kept = output if self.gain is None else output * (1 + self.gain)
        return kept + F.linear(F.linear(x, self.down), self.up)


class Delta(ABC):
    """What one module of a LoRA does to a matrix, or to a vector (biases, scales of norms)."""

    algorithm: ClassVar[str]
    """What it is called."""

    needs_weight = False
    """Whether the branch depends on the weight that it stands beside."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of the weight: (out, in), or (out,) of a vector."""

    @property
    def rank(self) -> int | None:
        """Of its branch; None where it has none."""
        return None

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        return sum(_nbytes(getattr(self, field.name)) for field in fields(self))  # type: ignore[arg-type]

    def to(self, device: torch.device) -> Self:
        """The same with its tensors on a device."""
        moved = {field.name: _moved(getattr(self, field.name), device) for field in fields(self)}  # type: ignore[arg-type]
        return replace(self, **moved)  # type: ignore[type-var]

    @abstractmethod
    def change(self, weight: Tensor, strength: float) -> Tensor:
        """What is added to ``weight``: float32, of its shape, on its device."""

    def merge(self, weight: Tensor, strength: float) -> Tensor:
        """The changed weight, in float32."""
        return weight.float() + self.change(weight, strength)

    def branch(self, weight: Tensor | None, strength: float) -> Branch | None:
        """The same as a side branch, or None where it has full rank; ``weight`` may be None unless it is needed."""
        return None


class KroneckerProduct(Delta):
    """A delta that acts beside a layer by two small matrices, of which it is the Kronecker product."""

    @property
    @abstractmethod
    def elements(self) -> int:
        """Of both matrices."""

    @property
    @abstractmethod
    def piece(self) -> int:
        """Numbers that are made on the way, for each token."""

    @abstractmethod
    def matrices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """[out1, in1] and [out2, in2], the scale in the second."""


@dataclass(frozen=True, eq=False)
class Change:
    """A delta, and the rows of a parameter that it concerns."""

    delta: Delta
    rows: Rows = None

    def part(self, weight: Tensor) -> Tensor:
        """A view of the rows, and of the columns, that the delta is for."""
        rows = weight[slice(*self.rows)] if self.rows else weight
        return rows[:, : self.delta.shape[1]] if rows.dim() == 2 else rows


def _nbytes(value: Any) -> int:
    if isinstance(value, tuple):
        return sum(map(_nbytes, value))
    return value.nbytes if isinstance(value, Tensor | Delta) else 0


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(_moved(each, device) for each in value)
    return value.to(device) if isinstance(value, Tensor | Delta) else value


def on_device(change: Change, device: torch.device) -> Change:
    """A change with its tensors on a device."""
    return replace(change, delta=change.delta.to(device))


def merged(weight: Tensor, changes: Sequence[tuple[Change, float]]) -> Tensor:
    """A parameter with changes at their strengths, in their order: a new tensor in float32.

    A delta with fewer inputs than the weight changes its first columns; for one with more, it gets columns of zeros.
    """
    result = widened(weight.to(torch.float32, copy=True), [change for change, _ in changes])
    for change, strength in changes:
        part = change.part(result)
        part.copy_(change.delta.merge(part, strength))
    return result


def widened(weight: Tensor, changes: Sequence[Change]) -> Tensor:
    """The weight with columns of zeros added, as many as the widest delta needs."""
    if weight.dim() < 2:
        return weight
    missing = max((change.delta.shape[1] - weight.shape[1] for change in changes), default=0)
    return F.pad(weight, (0, missing)) if missing > 0 else weight


def joined(branches: Sequence[tuple[Rows, Branch]], shape: tuple[int, int]) -> Branch:
    """Several branches beside one weight of this shape as one, joined along the rank; each acts on those before it."""
    rows, width = shape
    device = branches[0][1].down.device
    down = torch.cat([F.pad(branch.down, (0, width - branch.down.shape[1])) for _, branch in branches])
    up = torch.zeros(rows, len(down), dtype=down.dtype, device=device)
    factor = torch.ones(rows, dtype=down.dtype, device=device)
    at = 0
    for place, branch in branches:
        part = slice(*(place or (0, rows)))
        if branch.gain is not None:
            factor[part] *= 1 + branch.gain
            up[part] *= (1 + branch.gain).view(-1, 1)
        up[part, at : at + branch.rank] = branch.up
        at += branch.rank
    gain = None if all(branch.gain is None for _, branch in branches) else factor - 1
    return Branch(down, up, gain)


def side_branch(
    changes: Sequence[tuple[Change, float]], shape: tuple[int, int], weight: Callable[[], Tensor]
) -> Branch | None:
    """All changes of a weight, at their strengths and in their order, as one branch; None where one has full rank.

    Args:
        shape: (out, in) of the weight, once it is ``widened``.
        weight: gives it as numbers; not called unless a change depends on it.
    """
    last = max((at for at, (change, _) in enumerate(changes) if change.delta.needs_weight), default=-1)
    so_far = widened(weight().float(), [change for change, _ in changes]) if last >= 0 else None
    branches: list[tuple[Rows, Branch]] = []
    for at, (change, strength) in enumerate(changes):
        branch = change.delta.branch(None if so_far is None else change.part(so_far), strength)
        if branch is None:
            return None
        branches.append((change.rows, branch))
        if so_far is not None and at < last:  # a later change depends on what this one makes of the weight
            so_far = merged(so_far, [(change, strength)])
    return joined(branches, shape) if branches else None
