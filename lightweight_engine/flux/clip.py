"""The text model of CLIP, with the parameter names of the published files. Source: transformers (Apache-2.0)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..backend.attention import attention
from .blocks import repeated
from .params import CLIPParams


class Embeddings(nn.Module):
    def __init__(self, params: CLIPParams) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(params.vocab_size, params.hidden_size)
        self.position_embedding = nn.Embedding(params.max_positions, params.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class SelfAttention(nn.Module):
    def __init__(self, params: CLIPParams) -> None:
        super().__init__()
        dim = params.hidden_size
        self.num_heads = params.num_heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for proj in projections)
        return self.out_proj(attention(q, k, v, causal=True))


class MLP(nn.Module):
    def __init__(self, params: CLIPParams) -> None:
        super().__init__()
        self.fc1 = nn.Linear(params.hidden_size, params.mlp_hidden)
        self.fc2 = nn.Linear(params.mlp_hidden, params.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        return self.fc2(hidden * torch.sigmoid(1.702 * hidden))  # CLIP's "quick" GELU


class Layer(nn.Module):
    def __init__(self, params: CLIPParams) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(params.hidden_size, eps=1e-5)
        self.self_attn = SelfAttention(params)
        self.layer_norm2 = nn.LayerNorm(params.hidden_size, eps=1e-5)
        self.mlp = MLP(params)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, params: CLIPParams) -> None:
        super().__init__()
        self.layers = nn.ModuleList(repeated(params.num_layers, lambda: Layer(params)))


class TextTransformer(nn.Module):
    def __init__(self, params: CLIPParams) -> None:
        super().__init__()
        self.embeddings = Embeddings(params)
        self.encoder = Encoder(params)
        self.final_layer_norm = nn.LayerNorm(params.hidden_size, eps=1e-5)


class CLIPText(nn.Module):
    """Token ids ``[B, 77]`` to hidden states and the pooled vector that Flux reads."""

    def __init__(self, params: CLIPParams) -> None:
        super().__init__()
        self.params = params
        self.text_model = TextTransformer(params)

    def hidden_states(self, ids: Tensor, skip: int = 1) -> tuple[Tensor, Tensor]:
        """The outputs ``[B, T, D]`` of the last layer and of the ``skip``-th last one, before the final norm."""
        x = self.text_model.embeddings(ids)
        states = []
        for layer in self.text_model.encoder.layers:
            x = layer(x)
            states.append(x)
        return x, states[-skip]

    def forward(self, ids: Tensor, end_id: int) -> Tensor:
        """The pooled vector ``[B, D]``: the final-normed state at the first ``end_id`` of each row."""
        last, _ = self.hidden_states(ids)
        first_end = (ids == end_id).int().argmax(dim=-1)
        return self.text_model.final_layer_norm(last[torch.arange(len(ids), device=ids.device), first_end])
