"""Attention behind one call and a table of backends.

q, k, v are ``[B, N, S, K]`` (batch, heads, tokens, head dim); the result is ``[B, S, N*K]``, the layout
that the following linear reads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .kernels import attention as programs
from .kernels.hopper import usable

FUSED = 256
"""Dims of a head that kernels hold together with its scores; wider ones they would keep in memory."""
_QUERIES = 4096  # at once where they do not

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


def _auto(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    plain = bias is None and not causal and not torch.is_grad_enabled()
    if plain and q.is_cuda and q.dtype.itemsize == 2:
        if q.shape[-1] > FUSED:
            return in_parts(q, k, v, scale)
        if programs.take(q, k, v, scale) and available(q.device):
            return programs.attend(q, k, v, scale)
    return _sdpa(q, k, v, bias, causal, scale)


@cache
def available(device: torch.device) -> bool:
    """Whether a device has our own programs; asked before a model is ready, as they may have to be compiled."""
    return usable(programs.programs, device, "attention is torch's, which takes a tenth longer")


def in_parts(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Attention as products of matrices for some queries at a time, their scores in float32.

    Eight bytes for each score of a part are taken. In the autoencoder that is two feature maps of its finest level,
    whatever the picture's size, at a time when none of that level is there.
    """
    keys, values = k.flatten(0, 1).transpose(1, 2), v.flatten(0, 1)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    parts = q.flatten(0, 1).split(_QUERIES, 1)
    return torch.cat([_part(part, keys, values, factor) for part in parts], 1).unflatten(0, q.shape[:2])


def _part(q: Tensor, keys: Tensor, values: Tensor, factor: float) -> Tensor:
    """Weights are rounded before they are divided by their sum, which is that of the rounded ones: the largest of a row
    is 1 then, and exact, and those of a row sum to 1."""
    scores = _in_float32(q, keys).mul_(factor)
    weights = scores.sub_(scores.amax(-1, keepdim=True)).exp_().to(values.dtype)
    total = weights.sum(-1, keepdim=True, dtype=torch.float32)
    return _in_float32(weights, values).div_(total).to(values.dtype)


def _in_float32(a: Tensor, b: Tensor) -> Tensor:
    """A product of batches of matrices, summed and kept in float32."""
    return torch.bmm(a, b, out_dtype=torch.float32) if a.is_cuda and a.dtype.itemsize == 2 else a.float() @ b.float()


BACKENDS: dict[str, Attention] = {
    "auto": _auto,
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
