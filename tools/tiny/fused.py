"""Compiled twins of the transformer's elementwise groups, for training on a GPU.

Uncompiled, norms and rotations read and write the queries and keys a dozen times, which is most of a training step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightweight_engine.flux import transformer

log = logging.getLogger("tiny")


def qk_norm_rotate(qkv: Tensor, query_scale: Tensor, key_scale: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``QKNorm.forward`` in real numbers; ``table`` is ``[S, K/2, 2]``, cosines and sines."""
    q, k, v = qkv.unflatten(-1, (3, -1, query_scale.shape[0])).permute(2, 0, 3, 1, 4)

    def turned(x: Tensor, scale: Tensor) -> Tensor:
        normed = (F.rms_norm(x.float(), x.shape[-1:], eps=1e-6).to(x.dtype) * scale).float().unflatten(-1, (-1, 2))
        a, b, cos, sin = normed[..., 0], normed[..., 1], table[..., 0], table[..., 1]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)

    return turned(q, query_scale), turned(k, key_scale), v


def _method(function: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: transformer.QKNorm, qkv: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return function(qkv, self.query_norm.scale, self.key_norm.scale, torch.view_as_real(rotary))

    return forward


def use_compiled(device: torch.device) -> None:
    """Put compiled functions in the place of the plain ones, on a GPU only, once; what does not compile stays plain."""
    if device.type != "cuda" or not isinstance(transformer.norm_modulate, FunctionType):
        return
    torch._dynamo.config.suppress_errors = True
    torch._dynamo.config.recompile_limit = 32
    transformer.QKNorm.forward = _method(torch.compile(qk_norm_rotate))  # type: ignore[method-assign]
    transformer.norm_modulate = torch.compile(transformer.norm_modulate)
    transformer.gelu_beside = torch.compile(transformer.gelu_beside)
    log.info("norms and rotations are compiled")
