"""The encoder of T5 v1.1, with the parameter names of the published files.

No attention mask: Flux attends to the padding. Source: the T5 v1.1 paper and transformers (Apache-2.0).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backend.attention import attention
from ..backend.together import ReadsTogether
from .blocks import repeated
from .params import T5Params


def relative_buckets(length: int, num_buckets: int, max_distance: int, device: torch.device | None = None) -> Tensor:
    """Bucket numbers ``[T, T]`` of key minus query: exact for near tokens, logarithmic for far ones, by direction."""
    position = torch.arange(length, device=device)
    relative = position[None, :] - position[:, None]
    half = num_buckets // 2
    exact = half // 2
    distance = relative.abs()
    far = (
        exact
        + (torch.log(distance.float().clamp(min=1) / exact) / math.log(max_distance / exact) * (half - exact)).long()
    )
    return (relative > 0).long() * half + torch.where(distance < exact, distance, far.clamp(max=half - 1))


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, eps=1e-6)


class SelfAttention(ReadsTogether):
    together = ("q", "k", "v")

    def __init__(self, params: T5Params, with_bias: bool) -> None:
        super().__init__()
        inner = params.num_heads * params.head_dim
        self.q = nn.Linear(params.hidden_size, inner, bias=False)
        self.k = nn.Linear(params.hidden_size, inner, bias=False)
        self.v = nn.Linear(params.hidden_size, inner, bias=False)
        self.o = nn.Linear(inner, params.hidden_size, bias=False)
        self.head_dim = params.head_dim
        if with_bias:
            self.relative_attention_bias = nn.Embedding(params.num_buckets, params.num_heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (each.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for each in self.products(x))
        return self.o(attention(q, k, v, bias=bias, scale=1.0))


class AttentionLayer(nn.Module):
    def __init__(self, params: T5Params, with_bias: bool) -> None:
        super().__init__()
        self.SelfAttention = SelfAttention(params, with_bias)
        self.layer_norm = RMSNorm(params.hidden_size)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x + self.SelfAttention(self.layer_norm(x), bias)


class GatedMLP(ReadsTogether):
    together = ("wi_0", "wi_1")

    def __init__(self, params: T5Params) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(params.hidden_size, params.mlp_hidden, bias=False)
        self.wi_1 = nn.Linear(params.hidden_size, params.mlp_hidden, bias=False)
        self.wo = nn.Linear(params.mlp_hidden, params.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.products(x)
        return self.wo(F.gelu(gate, approximate="tanh") * value)


class MLPLayer(nn.Module):
    def __init__(self, params: T5Params) -> None:
        super().__init__()
        self.DenseReluDense = GatedMLP(params)
        self.layer_norm = RMSNorm(params.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x))


class Block(nn.Module):
    def __init__(self, params: T5Params, with_bias: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList([AttentionLayer(params, with_bias), MLPLayer(params)])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        attend, mlp = self.layer
        return mlp(attend(x, bias))


class Encoder(nn.Module):
    def __init__(self, params: T5Params) -> None:
        super().__init__()
        self.block = nn.ModuleList(Block(params, with_bias=True) for _ in range(min(1, params.num_layers)))
        self.block.extend(repeated(params.num_layers - 1, lambda: Block(params, with_bias=False)))
        self.final_layer_norm = RMSNorm(params.hidden_size)


class T5Encoder(nn.Module):
    """Token ids ``[B, T]`` to hidden states ``[B, T, D]``."""

    def __init__(self, params: T5Params) -> None:
        super().__init__()
        self.params = params
        self.shared = nn.Embedding(params.vocab_size, params.hidden_size)
        self.encoder = Encoder(params)

    def position_bias(self, length: int) -> Tensor:
        """The relative bias ``[1, N, T, T]``, held by block 0 and shared by all; contiguous, as attention asks of one
        where it keeps no scores."""
        table = self.get_submodule("encoder.block.0.layer.0.SelfAttention.relative_attention_bias")
        assert isinstance(table, nn.Embedding)
        buckets = relative_buckets(length, self.params.num_buckets, self.params.max_distance, table.weight.device)
        return table(buckets).permute(2, 0, 1)[None].contiguous()

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.nan_to_num(self.shared(ids))
        bias = self.position_bias(ids.shape[1]).to(x.dtype)
        for block in self.encoder.block:
            x = block(x, bias)
        return self.encoder.final_layer_norm(x)
