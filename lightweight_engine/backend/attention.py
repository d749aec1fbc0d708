"""Attention behind one call and a table of backends.

q, k, v are ``[B, N, S, K]`` (batch, heads, tokens, head dim); the result is ``[B, S, N*K]``, the layout
that the following linear reads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool, float | None], Tensor]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, scale=scale)


def _only(kernel: SDPBackend) -> Attention:
    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float | None) -> Tensor:
        with sdpa_kernel(kernel):
            return _sdpa(q, k, v, bias, causal, scale)

    return attend


def _reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    """The textbook formula in float32: the twin that every other row is tested against."""
    scores = q.float() @ k.float().transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias.float()
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return (scores.softmax(-1) @ v.float()).to(q.dtype)


BACKENDS: dict[str, Attention] = {
    "auto": _sdpa,
    "cudnn": _only(SDPBackend.CUDNN_ATTENTION),
    "flash": _only(SDPBackend.FLASH_ATTENTION),
    "efficient": _only(SDPBackend.EFFICIENT_ATTENTION),
    "reference": _reference,
}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention.

    Args:
        q, k, v: ``[B, N, S, K]``.
        bias: added to the scores, broadcastable to ``[B, N, S, S]``.
        causal: a token sees only itself and those before it.
        scale: of the scores; ``None`` is ``K ** -0.5``.
        backend: a key of ``BACKENDS``.

    Returns:
        ``[B, S, N*K]``.
    """
    out = BACKENDS[backend](q, k, v, bias, causal, scale)
    return out.transpose(1, 2).flatten(2)
