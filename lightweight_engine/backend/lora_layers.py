"""LoRAs beside the layers that they change: the weights stay as they are, in whatever format they are stored.

A module gets a ``forward`` of its own for as long as a LoRA is attached; taking that away leaves no trace. Changes of
low rank are one branch, products of Kronecker two small ones; a change of full rank is made anew at each use, from the
weight as numbers, as keeping it would cost as much as the network. Where that cost is wanted, weights are kept at hand:
as numbers, read and changed once. Where a GPU can add a branch to a packed weight as that becomes numbers, it does so
in place of a ``forward``: the linear stays one product. What is attached stays on the device, also where the layers
themselves pass through.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .eight_bit import EightBitLinear, InEightBits, in_rows
from .fp8 import quantize_rows
from .kernels.dequantize import RANKS
from .linear import SHORT, AsNumbers, PackedLinear, numbers, passing_numbers
from .lora import Branch, Change, KroneckerProduct, merged, on_device, side_branch
from .packed import Added, Spec

Changes = Sequence[tuple[Change, float]]
"""Changes of one parameter at their strengths, in their order."""

FLOAT = 4

# Tokens that a layer is reckoned to work on at once, and that a Kronecker product takes at once.
TOKENS, PIECE = 8192, 1024


@dataclass(frozen=True)
class Cost:
    """What attached changes take of the device.

    Attributes:
        held: bytes, for as long as they are attached.
        room: bytes more, while the layer works that needs most.
    """

    held: int = 0
    room: int = 0

    def beside(self, other: Cost) -> Cost:
        """Of both together, whose layers work one after the other."""
        return Cost(self.held + other.held, max(self.room, other.room))


NO_COST = Cost()


class Attached:
    """Changes that are attached to the modules of a network; ``close`` takes them away.

    Args:
        acting: modules with what acts: a ``forward`` in place of their own, or what is ``added`` to their weights.
    """

    def __init__(self, acting: Sequence[tuple[Any, Callable[..., Any] | Added]] = ()) -> None:
        self._places = [(module, "added" if isinstance(each, tuple) else "forward") for module, each in acting]
        self._settle()
        for (module, name), (_, each) in zip(self._places, acting, strict=True):
            setattr(module, name, each)

    def close(self) -> None:
        self._settle()
        for module, name in self._places:
            delattr(module, name)
        self._places.clear()

    def _settle(self) -> None:
        """Weights that were unpacked ahead are of the LoRAs so far."""
        for ahead in {module.ahead for module, name in self._places if name == "added"} - {None}:
            ahead.settle()


def attach(
    network: nn.Module,
    changes: Mapping[str, Changes],
    *,
    device: torch.device,
    dtype: torch.dtype,
    at_hand: Collection[str] = (),
) -> Attached:
    """Let a network compute with changed parameters, by their names.

    Args:
        device: where the network computes; branches are put there.
        dtype: that it computes in.
        at_hand: weights of linears that are kept as numbers, changed or not.
    """
    by_module: dict[str, dict[str, Changes]] = {}
    for name in [*changes, *at_hand]:
        path, _, leaf = name.rpartition(".")
        by_module.setdefault(path, {})[leaf] = changes.get(name, ())
    made: list[tuple[Any, Callable[..., Any] | Added]] = []
    for path, leaves in by_module.items():
        module = network.get_submodule(path)
        moved = {leaf: [(on_device(change, device), s) for change, s in rows] for leaf, rows in leaves.items()}
        if f"{path}.weight" in at_hand:
            build = _at_hand
        else:
            build = _linear if isinstance(module, nn.Linear | PackedLinear) else _substituted
        made.append((module, build(module, moved, device, dtype)))
    return Attached(made)  # all or none


def cost(changes: Mapping[str, Changes], shapes: Mapping[str, tuple[int, ...]], itemsize: int) -> Cost:
    """What ``attach`` will take, from shapes alone; room is that of branches also where a GPU adds them to weights.

    Args:
        itemsize: bytes of a number in the dtype that the network computes in.
    """
    total = NO_COST
    for name, rows in changes.items():
        total = total.beside(_cost_of(rows, shapes[name], itemsize))
    return total


def _cost_of(changes: Changes, shape: tuple[int, ...], itemsize: int) -> Cost:
    deltas = [change.delta for change, _ in changes]
    if len(shape) == 1:
        return Cost(2 * FLOAT * shape[0])
    tensors = sum(delta.nbytes for delta in deltas)
    thin = [delta.rank for delta in deltas if delta.rank is not None]
    products = [delta for delta in deltas if isinstance(delta, KroneckerProduct)]
    if len(thin) + len(products) < len(deltas) or (products and any(delta.needs_weight for delta in deltas)):
        return Cost(tensors, 4 * FLOAT * shape[0] * shape[1])
    held = sum(thin) * sum(shape) + 2 * shape[0] * bool(thin) + sum(product.elements for product in products)
    weight = FLOAT * shape[0] * shape[1] if any(delta.needs_weight for delta in deltas) else 0
    piece = max((product.piece for product in products), default=0)
    return Cost(held * itemsize, max(tensors + 2 * weight, sum(thin) * TOKENS * itemsize, piece * PIECE * itemsize))


def build_programs(network: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Run each program that adds changes to weights of a network as they become numbers: it is compiled, and kept.

    Args:
        dtype: that the network computes in.
    """
    linears = [each for each in network.modules() if isinstance(each, PackedLinear)]
    linears.sort(key=lambda each: -each.out_features * each.in_features)
    for linear in {_kind(each.spec): each for each in linears}.values():  # the smallest of each kind
        if not _takes_added(linear, device, dtype):
            continue
        weight, (rows, columns) = linear.packed.to(device), linear.packed.shape
        for rank in RANKS:
            up, down = (torch.zeros(shape, dtype=dtype, device=device) for shape in ((rank, rows), (rank, columns)))
            weight.dequantize(dtype, (up.t(), down))


def _kind(spec: Spec) -> Hashable:
    """What tells programs for weights of a format apart, beside their size."""
    return spec.name, *((leaf, dtype) for leaf, (_, dtype) in spec.parts.items())


# --- linears ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Beside:
    """The ``forward`` of a linear with a branch and Kronecker products beside it.

    Attributes:
        branch: in the dtype that is computed in; its gain is 1 + gain.
        bias: in place of the module's own, where that is changed.
    """

    module: Any
    branch: Branch | None
    products: tuple[_Product, ...]
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        bias = self.module.bias if self.bias is None else self.bias
        bias = None if bias is None else bias.to(x.dtype)
        y = self._in_eight_bits(rows, bias) if isinstance(self.module, EightBitLinear) else self._in_full(rows, bias)
        for product in self.products:
            product.add(rows, y)
        return y.view(*x.shape[:-1], -1)

    def _in_full(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        weight, branch = passing_numbers(self.module, rows), self.branch
        if branch is None:
            return F.linear(rows, weight, bias)
        # The large product is added to the small one as it is written, which saves passes over the output.
        y = F.linear(F.linear(rows, branch.down), branch.up, bias)
        return y.addmm_(rows, weight.T) if branch.gain is None else y.addcmul_(rows @ weight.T, branch.gain)

    def _in_eight_bits(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        branch = self.branch
        if branch is None:
            return in_rows(rows).times(self.module.packed, bias)
        if branch.gain is None:
            return in_rows(rows).times(self.module.packed, bias).addmm_(F.linear(rows, branch.down), branch.up.T)
        y = F.linear(F.linear(rows, branch.down), branch.up, bias)
        return y.addcmul_(in_rows(rows).times(self.module.packed, None), branch.gain)


@dataclass(frozen=True, eq=False)
class _Product:
    """A Kronecker product times x, by two small products and without the large matrix."""

    first: Tensor
    second: Tensor
    rows: slice

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add the product of x [L, in] to y [L, out]."""
        grid = (self.first.shape[1], self.second.shape[1])
        for inputs, outputs in zip(x[:, : grid[0] * grid[1]].split(PIECE), y[:, self.rows].split(PIECE), strict=True):
            outputs += (self.first @ inputs.unflatten(-1, grid) @ self.second.T).flatten(-2)


def _linear(
    module: Any, leaves: Mapping[str, Changes], device: torch.device, dtype: torch.dtype
) -> Callable[..., Any] | Added:
    """The ``forward`` of a changed linear, or what is added to its weight."""
    changes = leaves.get("weight", ())
    bias = _bias(module, leaves, device)
    products = [(change, s) for change, s in changes if isinstance(change.delta, KroneckerProduct)]
    others = [(change, s) for change, s in changes if not isinstance(change.delta, KroneckerProduct)]
    if products and any(change.delta.needs_weight for change, _ in changes):
        products, others = [], list(changes)
    shape = (module.out_features, module.in_features)
    branch = side_branch(others, shape, lambda: numbers(module, torch.float32, device))
    if branch is None and others:
        return _Recomputed(module, tuple(changes), bias)
    if branch is not None and not products and bias is None and _goes_inside(branch, module, device, dtype):
        up = branch.up.t().contiguous().to(dtype)  # as programs read it
        return up.t(), branch.down.to(dtype)
    parts = tuple(_product(change, strength, shape[0], device, dtype) for change, strength in products)
    return _Beside(module, None if branch is None else _in_dtype(branch, dtype), parts, bias)


def _goes_inside(branch: Branch, module: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a branch is added to the weight of its linear as that becomes numbers, which it does at each use."""
    fits = branch.gain is None and branch.down.shape[1] == module.in_features
    return fits and _takes_added(module, device, dtype)


def _takes_added(module: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a linear's weight becomes numbers of ``dtype`` at each use, by a program that can add to them."""
    if not isinstance(module, PackedLinear) or module.multiplies_as_stored or dtype not in SHORT:
        return False
    return module.spec.takes_added(device)


def _bias(module: Any, leaves: Mapping[str, Changes], device: torch.device) -> Tensor | None:
    """The changed bias in float32; None where it is not changed."""
    return merged(module.bias.detach().to(device), leaves["bias"]) if "bias" in leaves else None


def _in_dtype(branch: Branch, dtype: torch.dtype) -> Branch:
    gain = None if branch.gain is None else (1 + branch.gain).to(dtype)
    return Branch(branch.down.to(dtype), branch.up.to(dtype), gain)


def _product(change: Change, strength: float, rows: int, device: torch.device, dtype: torch.dtype) -> _Product:
    assert isinstance(change.delta, KroneckerProduct)
    first, second = change.delta.matrices(device)
    return _Product(first.to(dtype), (second * strength).to(dtype), slice(*(change.rows or (0, rows))))


@dataclass(frozen=True, eq=False)
class _Recomputed:
    """The ``forward`` of a linear whose weight is changed at each use."""

    module: Any
    changes: Changes
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        weight = merged(numbers(self.module, torch.float32, x.device), self.changes)
        bias = self.module.bias if self.bias is None else self.bias
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _at_hand(
    module: Any, leaves: Mapping[str, Changes], device: torch.device, dtype: torch.dtype
) -> AsNumbers | InEightBits:
    """The ``forward`` of a linear whose weight, changed or not, is kept as what products read."""
    bias = _bias(module, leaves, device)
    bias = module.bias if bias is None else bias
    bias = None if bias is None else bias.detach().to(device, dtype)
    weight = _changed(module, leaves.get("weight", ()), device, dtype)
    return InEightBits(quantize_rows(weight), bias) if isinstance(module, EightBitLinear) else AsNumbers(weight, bias)


def _changed(module: Any, changes: Changes, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The weight of a linear as numbers, changed: the sum is rounded once."""
    branch = None
    if not any(change.delta.needs_weight for change, _ in changes):
        shape = (module.out_features, module.in_features)
        branch = side_branch(changes, shape, lambda: numbers(module, torch.float32, device))
    if branch is not None and branch.down.shape[1] == module.in_features and branch.gain is None:
        return torch.addmm(numbers(module, dtype, device), branch.up.to(dtype), branch.down.to(dtype))
    if not changes:
        return numbers(module, dtype, device)
    return merged(numbers(module, torch.float32, device), changes).to(dtype)


# --- other parameters ---------------------------------------------------------------------------------------------


def _substituted(
    module: nn.Module, leaves: Mapping[str, Changes], device: torch.device, dtype: torch.dtype
) -> Callable[..., Any]:
    """The ``forward`` of a module that sees other values of its parameters, in ``dtype``, while it runs."""
    values: dict[str, nn.Parameter] = {}
    for leaf, changes in leaves.items():
        value = merged(module.get_parameter(leaf).detach().to(device), changes).to(dtype)
        values[leaf] = nn.Parameter(value, requires_grad=False)
    forward = type(module).forward.__get__(module)

    def run(*args: Any, **kwargs: Any) -> Any:
        kept = {leaf: module._parameters[leaf] for leaf in values}
        module._parameters.update(values)
        try:
            return forward(*args, **kwargs)
        finally:
            module._parameters.update(kept)

    return run
