"""Compiled twins of the transformer's elementwise groups, for training on a GPU.

Uncompiled, norms and rotations read and write the queries and keys a dozen times, which is most of a training step.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import FunctionType

import torch
from torch import Tensor

from lightweight_engine.backend import fused
from lightweight_engine.backend.fused import Stream, plain_heads
from lightweight_engine.flux import transformer

log = logging.getLogger("tiny")


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """``backend.fused.rotate`` in real numbers; ``table`` is ``[S, K/2, 2]``, cosines and sines."""
    pairs = x.float().unflatten(-1, (-1, 2))
    a, b, cos, sin = pairs[..., 0], pairs[..., 1], table[..., 0], table[..., 1]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)


def heads(streams: Sequence[Stream], table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``backend.fused.heads`` likewise."""
    return plain_heads(streams, table, rotate)


def use_compiled(device: torch.device) -> None:
    """Put compiled functions in the place of the plain ones, on a GPU only, once; what does not compile stays plain."""
    if device.type != "cuda" or not isinstance(fused.norm_modulate, FunctionType):
        return
    torch._dynamo.config.suppress_errors = True
    torch._dynamo.config.recompile_limit = 32
    compiled = torch.compile(heads)
    transformer.heads = lambda streams, rotary: compiled(streams, torch.view_as_real(rotary))
    fused.norm_modulate = transformer.norm_modulate = torch.compile(fused.norm_modulate)
    transformer.gelu_beside = torch.compile(transformer.gelu_beside)
    log.info("norms and rotations are compiled")
