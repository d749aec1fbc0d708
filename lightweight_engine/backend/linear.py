"""Where weights are stored in another type than they are computed in.

Networks are written with plain ``nn.Linear``; ``keep_storage`` swaps the modules from outside, so that ``forward`` of
a block does not change. A storage format is one row in ``STORED``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


STORED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: CastLinear, nn.Embedding: CastEmbedding}


def keep_storage(model: nn.Module, compute_dtype: torch.dtype) -> None:
    """Let every linear and embedding whose weight is not in ``compute_dtype`` keep it, and cast at use.

    Everything else (norms, biases of convolutions) is small and must already be in ``compute_dtype``.
    """
    for module in model.modules():
        swap = STORED.get(type(module))
        if swap is not None and module.weight.dtype != compute_dtype:
            module.__class__ = swap
            if isinstance(module, CastEmbedding):
                module.compute_dtype = compute_dtype
