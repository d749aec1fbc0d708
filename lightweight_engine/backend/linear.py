"""Where weights are stored in another type than they are computed in.

Networks are written with plain ``nn.Linear``; the functions here swap the modules from outside, so that ``forward`` of
a block does not change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import in_pieces
from .packed import Added, Packed, Spec

if TYPE_CHECKING:
    from .ahead import Ahead

SHORT = (torch.bfloat16, torch.float16)
"""What products of a GPU can activate as they write it."""


class CastLinear(nn.Linear):
    """A linear whose 16-bit weight is cast to the activation's dtype at each use, or multiplied by its pieces."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        if in_pieces.serves(input, self.weight):
            made = in_pieces.product(input, self.weight)
            return made if bias is None else made.add_(bias)
        return F.linear(input, self.weight.to(input.dtype), bias)


class CastEmbedding(nn.Embedding):
    """An embedding whose rows are cast to ``compute_dtype``, which then runs through the network."""

    compute_dtype = torch.float32

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).to(self.compute_dtype)


class PackedLinear(nn.Module):
    """A linear whose weight stays in a storage format and becomes numbers at each use.

    Its buffers are the parts of the packed matrix, so that whatever moves a module's tensors moves these too.

    Attributes:
        ahead: unpacks for it and its neighbours.
        added: what LoRAs add to the weight as it becomes numbers for a product, on the device that computes.
        multiplies_as_stored: it has no use for numbers.
    """

    spec: Spec
    _parts: tuple[str, ...]
    out_features: int
    in_features: int
    bias: nn.Parameter | None
    ahead: Ahead | None = None
    added: Added | None = None
    multiplies_as_stored = False

    def __init__(self, packed: Packed, bias: nn.Parameter | None) -> None:
        super().__init__()
        out_features, in_features = packed.shape
        # Past the checks of ``nn.Module``, which take longer than all else here; a start makes five hundred of these.
        self.__dict__.update(
            spec=packed.spec, _parts=tuple(packed.spec.parts), out_features=out_features, in_features=in_features
        )
        self._buffers.update(packed.parts)
        self._parameters["bias"] = bias

    @property
    def packed(self) -> Packed:
        """The weight with its tensors, wherever they lie now."""
        buffers: Any = self._buffers  # asked for at each use, several hundred times a step
        return Packed(self.spec, {name: buffers[name] for name in self._parts})

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, passing_numbers(self, input), bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, storage={self.spec.name}"


def numbers(linear: nn.Linear | PackedLinear, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The weight [out, in] of a linear as numbers on a device, whatever it is stored as, and without what is added."""
    if isinstance(linear, PackedLinear):
        return linear.packed.to(device).dequantize(dtype)
    return linear.weight.detach().to(device=device, dtype=dtype)


def passing_numbers(linear: nn.Linear | PackedLinear, x: Tensor) -> Tensor:
    """The weight that products with ``x`` read, to be used at once: the next call of any may write over it."""
    if not isinstance(linear, PackedLinear):
        return numbers(linear, x.dtype, x.device)
    if linear.ahead is not None and linear.ahead.dtype == x.dtype:
        return linear.ahead.numbers(linear)
    return linear.packed.to(x.device).dequantize(x.dtype, linear.added)


@dataclass(frozen=True, eq=False)
class AsNumbers:
    """A linear whose weight ``[out, in]`` is numbers; also a ``forward`` in place of a module's own."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def rows(self, start: int, stop: int | None) -> AsNumbers:
        """The linear of some of the outputs."""
        return AsNumbers(self.weight[start:stop], None if self.bias is None else self.bias[start:stop])

    def gelu(self, x: Tensor) -> Tensor:
        """GELU (the tanh form) of the result; on a GPU applied as that is written."""
        if self.bias is None or not x.is_cuda or x.dtype not in SHORT:
            return F.gelu(self(x), approximate="tanh")
        # No public name reaches this part of cuBLASLt. It came with torch 1.12; a test on a GPU calls it.
        product: Any = torch._addmm_activation  # pyright: ignore[reportPrivateImportUsage]
        return product(self.bias, x.flatten(0, -2), self.weight.t(), use_gelu=True).view(*x.shape[:-1], -1)

    def beside(self, first: Tensor, second: Tensor) -> Tensor:
        """Of two inputs side by side, without putting them there: one product adds to the other as it is written."""
        width = first.shape[-1]
        y = F.linear(first.flatten(0, -2), self.weight[:, :width], self.bias)
        return y.addmm_(second.flatten(0, -2), self.weight[:, width:].t()).view(*first.shape[:-1], -1)


def is_product(linear: nn.Module) -> bool:
    """Whether a linear is one product with its weight, and nothing more acts on its inputs or outputs."""
    acting = linear.__dict__.get("forward")
    if acting is None:
        return not (isinstance(linear, PackedLinear) and linear.multiplies_as_stored)
    return isinstance(acting, AsNumbers)


def as_numbers(linear: Any, x: Tensor) -> AsNumbers:
    """A linear that ``is_product`` with its ``passing_numbers``."""
    acting = linear.__dict__.get("forward")
    if acting is not None:
        return acting
    bias = None if linear.bias is None else linear.bias.to(x.dtype)
    return AsNumbers(passing_numbers(linear, x), bias)


CASTING: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: CastLinear, nn.Embedding: CastEmbedding}


def store(model: nn.Module, name: str, value: Tensor | Packed, modules: dict[str, nn.Module] | None = None) -> None:
    """Give the parameter ``name`` of ``model`` its value; a packed weight turns its linear into a ``PackedLinear``.

    Args:
        modules: those of the model by path, kept up to date: to find one takes longer than all else that this does.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path) if modules is None else modules[path]
    if not isinstance(value, Packed):
        module._buffers.pop(leaf, None)
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        return
    above, _, child = path.rpartition(".")
    parent = model.get_submodule(above) if modules is None else modules[above]
    parent._modules[child] = made = PackedLinear(value, module.bias)  # type: ignore[arg-type]
    if modules is not None:
        modules[path] = made


def cast_at_use(model: nn.Module, compute_dtype: torch.dtype) -> None:
    """Let every linear and embedding whose weight is not in ``compute_dtype`` keep it, and cast at use.

    Everything else (norms, biases of convolutions) is small and must already be in ``compute_dtype``.
    """
    for module in model.modules():
        swap = CASTING.get(type(module))
        if swap is not None and module.weight.dtype != compute_dtype:
            module.__class__ = swap
            if isinstance(module, CastEmbedding):
                module.compute_dtype = compute_dtype
