"""Where weights are stored in another type than they are computed in.

Networks are written with plain ``nn.Linear``; the functions here swap the modules from outside, so that ``forward`` of
a block does not change.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .packed import Packed, Spec


class CastLinear(nn.Linear):
    """A linear whose 16-bit weight is cast to the activation's dtype at each use."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class CastEmbedding(nn.Embedding):
    """An embedding whose rows are cast to ``compute_dtype``, which then runs through the network."""

    compute_dtype = torch.float32

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).to(self.compute_dtype)


class PackedLinear(nn.Module):
    """A linear whose weight stays in a storage format and becomes numbers at each use.

    Its buffers are the parts of the packed matrix, so that whatever moves a module's tensors moves these too.
    """

    def __init__(self, packed: Packed, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.spec: Spec = packed.spec
        self.out_features, self.in_features = packed.shape
        for name, tensor in packed.parts.items():
            self.register_buffer(name, tensor)
        self.bias = bias

    @property
    def packed(self) -> Packed:
        """The weight with its tensors, wherever they lie now."""
        return Packed(self.spec, {name: getattr(self, name) for name in self.spec.parts})

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.packed.dequantize(input.dtype), bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, storage={self.spec.name}"


def numbers(linear: nn.Linear | PackedLinear, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The weight [out, in] of a linear as numbers on a device, whatever it is stored as."""
    if isinstance(linear, PackedLinear):
        return linear.packed.to(device).dequantize(dtype)
    return linear.weight.detach().to(device=device, dtype=dtype)


CASTING: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: CastLinear, nn.Embedding: CastEmbedding}


def store(model: nn.Module, name: str, value: Tensor | Packed) -> None:
    """Give the parameter ``name`` of ``model`` its value; a packed weight turns its linear into a ``PackedLinear``."""
    path, _, leaf = name.rpartition(".")
    if isinstance(value, Packed):
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, PackedLinear(value, model.get_submodule(path).bias))  # type: ignore[arg-type]
    else:
        setattr(model.get_submodule(path), leaf, nn.Parameter(value, requires_grad=False))


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
