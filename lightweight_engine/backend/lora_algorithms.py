"""What a LoRA does to a matrix, algorithm by algorithm: plain, LoHa, LoKr, GLoRA, OFT and BOFT, DoRA, differences.

Letters: W [out, in] the weight, s the strength, r the rank.

Source: the LyCORIS and peft packages (formulas only); Forge and ComfyUI for what is said to be the reference's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .lora import Branch, Delta, KroneckerProduct

MAX_RANK = 4096
EPSILON = torch.finfo(torch.float32).eps


@dataclass(frozen=True, eq=False)
class LowRank(Delta):
    """Plain LoRA: up [out, r] times down [r, in]."""

    algorithm: ClassVar[str] = "LoRA"
    down: Tensor
    up: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_product("lora_up", self.up, "lora_down", self.down)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.up.shape[0], self.down.shape[1]

    @property
    def rank(self) -> int:
        return len(self.down)

    def change(self, weight: Tensor, strength: float) -> Tensor:
        return (_f32(self.up, weight) @ _f32(self.down, weight)) * (self.scale * strength)

    def branch(self, weight: Tensor | None, strength: float) -> Branch:
        return Branch(_f32(self.down, weight), _f32(self.up, weight) * (self.scale * strength))


@dataclass(frozen=True, eq=False)
class Hadamard(Delta):
    """LoHa: the element-wise product of two products of thin factors."""

    algorithm: ClassVar[str] = "LoHa"
    pairs: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
    scale: float = 1.0

    def __post_init__(self) -> None:
        for number, (a, b) in enumerate(self.pairs, 1):
            check_product(f"hada_w{number}_a", a, f"hada_w{number}_b", b)
        sizes = {(len(a), b.shape[1]) for a, b in self.pairs}
        if len(sizes) > 1:
            raise ValueError(f"its two products have the sizes {sorted(sizes)}")

    @property
    def shape(self) -> tuple[int, ...]:
        a, b = self.pairs[0]
        return a.shape[0], b.shape[1]

    def change(self, weight: Tensor, strength: float) -> Tensor:
        first, second = (_f32(a, weight) @ _f32(b, weight) for a, b in self.pairs)
        return first * second * (self.scale * strength)


@dataclass(frozen=True, eq=False)
class Kronecker(KroneckerProduct):
    """LoKr: the Kronecker product of two matrices, each given whole or as two factors."""

    algorithm: ClassVar[str] = "LoKr"
    first: tuple[Tensor, ...]
    second: tuple[Tensor, ...]
    scale: float = 1.0

    def __post_init__(self) -> None:
        for name, factors in (("lokr_w1", self.first), ("lokr_w2", self.second)):
            if len(factors) == 2:
                check_product(f"{name}_a", factors[0], f"{name}_b", factors[1])
            elif factors[0].dim() != 2:
                raise ValueError(f"{name} {list(factors[0].shape)} is no matrix")

    @property
    def shape(self) -> tuple[int, ...]:
        return (
            self.first[0].shape[0] * self.second[0].shape[0],
            self.first[-1].shape[1] * self.second[-1].shape[1],
        )

    @property
    def elements(self) -> int:
        return sum(factors[0].shape[0] * factors[-1].shape[1] for factors in (self.first, self.second))

    @property
    def piece(self) -> int:
        return self.shape[0] + self.first[0].shape[0] * self.second[-1].shape[1]

    def matrices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        first, second = (_product(factors, device) for factors in (self.first, self.second))
        return first, second * self.scale

    def change(self, weight: Tensor, strength: float) -> Tensor:
        return torch.kron(*self.matrices(weight.device)) * strength


@dataclass(frozen=True, eq=False)
class Generalised(Delta):
    """GLoRA: W (a1 a2) + b1 b2, where a1 [in, r], a2 [r, in], b1 [out, r], b2 [r, in]."""

    algorithm: ClassVar[str] = "GLoRA"
    a: tuple[Tensor, Tensor]
    b: tuple[Tensor, Tensor]
    scale: float = 1.0
    needs_weight = True

    def __post_init__(self) -> None:
        check_product("a1", self.a[0], "a2", self.a[1])
        check_product("b1", self.b[0], "b2", self.b[1])
        width = self.b[1].shape[1]
        if self.a[0].shape[0] != width or self.a[1].shape[1] != width:
            raise ValueError(f"a1 {list(self.a[0].shape)} and a2 {list(self.a[1].shape)} do not have {width} inputs")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.b[0].shape[0], self.b[1].shape[1]

    @property
    def rank(self) -> int:
        return len(self.a[1]) + len(self.b[1])

    def branch(self, weight: Tensor | None, strength: float) -> Branch:
        if weight is None:
            raise TypeError("the branch of a GLoRA needs the weight")
        down = torch.cat([_f32(self.a[1], weight), _f32(self.b[1], weight)])
        up = torch.cat([weight.float() @ _f32(self.a[0], weight), _f32(self.b[0], weight)], dim=1)
        return Branch(down, up * (self.scale * strength))

    def change(self, weight: Tensor, strength: float) -> Tensor:
        branch = self.branch(weight, strength)
        return branch.up @ branch.down


@dataclass(frozen=True, eq=False)
class Orthogonal(Delta):
    """OFT and BOFT: the rows of W are turned, in blocks.

    With Q = B - Bᵀ, each block is turned by the Cayley transform R = (I + Q)(I - Q)⁻¹; at a strength s it goes that far
    of the way from I to R.

    Attributes:
        blocks: B, [n, b, b] (OFT) or [m, n, b, b] (BOFT: m stages, between which rows are shuffled like a butterfly).
        width: in.
        limit: the largest norm of Q over all blocks; 0 for none.
        rescale: [out, 1], a factor of each row, or None.
        squared: the change is multiplied by the strength once more, as the reference has it.
    """

    blocks: Tensor
    width: int
    limit: float = 0.0
    rescale: Tensor | None = None
    squared: bool = False
    needs_weight = True

    def __post_init__(self) -> None:
        shape = list(self.blocks.shape)
        if len(shape) not in (3, 4) or shape[-1] != shape[-2] or 0 in shape:
            raise ValueError(f"oft_blocks {shape} are no square blocks")
        rows, half = self.shape[0], shape[-1] // 2
        if len(shape) == 4 and (shape[-1] % 2 or rows % (2 ** shape[0] * half)):
            raise ValueError(f"oft_blocks {shape} cannot be shuffled over {rows} rows in {shape[0]} stages")
        if self.rescale is not None and self.rescale.numel() != rows:
            raise ValueError(f"rescale {list(self.rescale.shape)} is not one factor for each of {rows} rows")

    @property
    def algorithm(self) -> str:  # type: ignore[override]
        return "OFT" if self.blocks.dim() == 3 else "BOFT"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.blocks.shape[-3] * self.blocks.shape[-1], self.width

    def change(self, weight: Tensor, strength: float) -> Tensor:
        weight = weight.float()
        changed = self._turned(weight, strength) - weight
        return changed * strength if self.squared else changed

    def _turned(self, weight: Tensor, strength: float) -> Tensor:
        turns = self._rotations(weight)
        turns = turns * strength + (1 - strength) * torch.eye(turns.shape[-1], dtype=weight.dtype, device=weight.device)
        if turns.dim() == 3:
            turned = self._blockwise(turns.mT, weight)
        else:
            turned = weight
            for stage, turn in enumerate(turns):
                stride = 2**stage * (turn.shape[-1] // 2)
                shuffled = turned.unflatten(0, (-1, 2, stride)).transpose(1, 2).flatten(0, 2)
                mixed = self._blockwise(turn, shuffled)
                turned = mixed.unflatten(0, (-1, stride, 2)).transpose(1, 2).flatten(0, 2)
        if self.rescale is not None:
            turned = turned * (1 + strength * (_f32(self.rescale, weight).view(-1, 1) - 1))
        return turned

    def _rotations(self, weight: Tensor) -> Tensor:
        blocks = _f32(self.blocks, weight)
        skew = blocks - blocks.mT
        norm = skew.norm() + 1e-8
        if 0 < self.limit < norm:
            skew = skew * (self.limit / norm)
        identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=weight.device)
        return torch.linalg.solve(identity - skew, identity + skew)  # the two factors commute

    @staticmethod
    def _blockwise(turns: Tensor, rows: Tensor) -> Tensor:
        """Each [b, b] of ``turns`` times its b rows."""
        return (turns @ rows.unflatten(0, turns.shape[:2])).flatten(0, 1)


@dataclass(frozen=True, eq=False)
class Full(Delta):
    """A difference as large as the weight itself."""

    algorithm: ClassVar[str] = "difference"
    values: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def change(self, weight: Tensor, strength: float) -> Tensor:
        return _f32(self.values, weight) * strength


@dataclass(frozen=True, eq=False)
class Replacement(Delta):
    """Values that take the weight's place, whatever the strength."""

    algorithm: ClassVar[str] = "replacement"
    values: Tensor
    needs_weight = True

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def change(self, weight: Tensor, strength: float) -> Tensor:
        return _f32(self.values, weight) - weight.float()

    def merge(self, weight: Tensor, strength: float) -> Tensor:
        return _f32(self.values, weight)


@dataclass(frozen=True, eq=False)
class Dora(Delta):
    """DoRA: V = W + dW, its rows or columns brought to given lengths.

    Attributes:
        inner: dW.
        magnitude: [out, 1] lengths of rows, or [1, in] of columns.
        exact: rows of V are measured, as in training; the reference divides by the lengths of the rows of W.
    """

    inner: Delta
    magnitude: Tensor
    exact: bool = False
    needs_weight = True

    def __post_init__(self) -> None:
        rows, width = self.inner.shape
        if tuple(self.magnitude.shape) not in ((rows, 1), (1, width)):
            raise ValueError(f"dora_scale {list(self.magnitude.shape)} fits neither {rows} rows nor {width} columns")

    @property
    def algorithm(self) -> str:  # type: ignore[override]
        return f"DoRA of {self.inner.algorithm}"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def rank(self) -> int | None:
        return self.inner.rank if self.by_rows else None

    @property
    def by_rows(self) -> bool:
        return self.magnitude.shape[0] == self.shape[0]

    def _factor(self, weight: Tensor, changed: Tensor | None) -> Tensor:
        """What V is multiplied with; ``changed`` is V, which is not needed where W is measured."""
        measured = weight.float() if changed is None else changed
        length = measured.norm(dim=1 if self.by_rows else 0, keepdim=True)
        return _f32(self.magnitude, weight) / (length + EPSILON)

    def change(self, weight: Tensor, strength: float) -> Tensor:
        changed = self.inner.merge(weight, 1.0)
        factor = self._factor(weight, changed if self.exact or not self.by_rows else None)
        return (changed * factor - weight.float()) * strength

    def branch(self, weight: Tensor | None, strength: float) -> Branch | None:
        inner = self.inner.branch(weight, 1.0) if self.by_rows else None
        if inner is None or weight is None:
            return None
        factor = self._factor(weight, weight.float() + inner.up @ inner.down if self.exact else None)
        return Branch(inner.down, inner.up * factor * strength, (factor.view(-1) - 1) * strength)


@dataclass(frozen=True, eq=False)
class Swapped(Delta):
    """A delta whose file has the two halves of the rows in the other order."""

    inner: Delta

    @property
    def algorithm(self) -> str:  # type: ignore[override]
        return self.inner.algorithm

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def rank(self) -> int | None:
        return self.inner.rank

    @property
    def needs_weight(self) -> bool:  # type: ignore[override]
        return self.inner.needs_weight

    def change(self, weight: Tensor, strength: float) -> Tensor:
        return _halves(self.inner.change(_halves(weight), strength))

    def merge(self, weight: Tensor, strength: float) -> Tensor:
        return _halves(self.inner.merge(_halves(weight), strength))

    def branch(self, weight: Tensor | None, strength: float) -> Branch | None:
        inner = self.inner.branch(None if weight is None else _halves(weight), strength)
        if inner is None:
            return None
        return Branch(inner.down, _halves(inner.up), None if inner.gain is None else _halves(inner.gain))


def check_product(left: str, a: Tensor, right: str, b: Tensor) -> None:
    """
    Raises:
        ValueError: the matrices cannot be multiplied, or their rank is out of all proportion.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"{left} {list(a.shape)} and {right} {list(b.shape)} have no rank in common")
    if not 0 < a.shape[1] <= MAX_RANK:
        raise ValueError(f"the rank {a.shape[1]:,} of {left} is not in 1..{MAX_RANK:,}")


def _f32(tensor: Tensor, like: Tensor | None) -> Tensor:
    return tensor.to(None if like is None else like.device, torch.float32)


def _product(factors: tuple[Tensor, ...], device: torch.device) -> Tensor:
    first, *rest = (factor.to(device, torch.float32) for factor in factors)
    return first @ rest[0] if rest else first


def _halves(rows: Tensor) -> Tensor:
    """The two halves of the rows in the other order."""
    return torch.cat(rows.chunk(2)[::-1])
