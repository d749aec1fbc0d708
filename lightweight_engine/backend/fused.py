"""What a transformer block does between its products: each group one function, and on a GPU one pass over memory.

The plain-torch body is what a CPU and training run, and the twin that the programs in ``kernels.fused`` are tested
against. Those round once where the twins round at each operation, and may write to what a product has just made.

Letters: B batch, S tokens, D hidden, N heads, K head dim, M width of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels
from .eight_bit import Rows, in_rows, read_in_eight_bits
from .kernels import fused as programs
from .linear import SHORT, as_numbers, is_product

EPS = 1e-6
LARGEST_HALF = 32768

Stream = tuple[Tensor, Tensor, Tensor]
"""A fused projection ``[B, S, 3*N*K]`` and the gains ``[K]`` of its queries and its keys."""


def _in_one_pass(x: Tensor) -> bool:
    return x.is_cuda and not torch.is_grad_enabled() and kernels.available()


class ResidualStream:
    """Tokens ``[B, S, D]`` that layers read through a norm and add to.

    What is added waits for the next norm, so that a GPU does both in one pass over memory, between blocks too.
    """

    def __init__(self, tokens: Tensor) -> None:
        self._tokens = tokens
        self._waiting: tuple[Tensor, Tensor] | None = None
        self._limit = 0

    @property
    def tokens(self) -> Tensor:
        """All that was added is in them."""
        if self._waiting is not None:
            self._tokens = _sum(self._tokens, self._waiting, self._limit)
            self._waiting = None
        return self._tokens

    def add(self, gate: Tensor, update: Tensor, *, clip: bool = False) -> None:
        """Add ``gate * update``, ``[B, 1, D]`` and ``[B, S, D]``.

        Args:
            clip: keep a sum in float16 away from infinity, as the reference does.
        """
        self._tokens = self.tokens
        self._waiting = gate, update
        self._limit = LARGEST_HALF if clip and update.dtype == torch.float16 else 0

    def normed(self, shift: Tensor, scale: Tensor, reader: nn.Module | None = None) -> Tensor | Rows:
        """``norm_modulate`` of the tokens."""
        if self._waiting is None or not _in_one_pass(self._tokens):
            return norm_modulate(self.tokens, shift, scale, reader)
        rows = programs.EIGHT_BITS if _are_read(reader) else None
        self._tokens, normed, scales = programs.residual_norm(
            self._tokens, self._waiting, (shift, scale), limit=self._limit, rows=rows
        )
        self._waiting = None
        return Rows(normed, scales, self._tokens.dtype) if rows else normed


def _sum(x: Tensor, added: tuple[Tensor, Tensor], limit: int) -> Tensor:
    """``x + gate * update``, within a limit other than 0."""
    if _in_one_pass(x):
        return programs.residual_norm(x, added, None, limit=limit)[0]
    total = torch.addcmul(x, *added)
    return total.clamp(-limit, limit) if limit else total


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, reader: nn.Module | None = None) -> Tensor | Rows:
    """Layer norm without weights, then ``(1 + scale) * x + shift``; ``x`` is ``[B, S, D]``, a vector ``[B, 1, D]``.

    Args:
        reader: the linear that reads the result, which is ``Rows`` where it reads those.
    """
    rows = _are_read(reader)
    if _in_one_pass(x):
        _, normed, scales = programs.residual_norm(x, None, (shift, scale), rows=programs.EIGHT_BITS if rows else None)
        return Rows(normed, scales, x.dtype) if rows else normed
    normed = torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale)
    return in_rows(normed) if rows else normed


def _are_read(reader: nn.Module | None) -> bool:
    return reader is not None and not torch.is_grad_enabled() and read_in_eight_bits(reader)


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    """RMS norm over the last dimension, in float32."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=EPS).to(x.dtype) * gain


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate adjacent pairs of the last dimension of ``x`` ``[..., S, K]`` in float32, and cast back.

    Args:
        rotary: complex64 ``[S, K/2]``.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotary).flatten(-2).to(x.dtype)


def heads(streams: Sequence[Stream], rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normed and rotated queries and keys, and values, each ``[B, N, S, K]``, of streams one behind another.

    Args:
        streams: their projections may be written to.
        rotary: complex64 ``[S, K/2]`` for all of them.
    """
    dim = streams[0][1].shape[0]
    if _in_one_pass(streams[0][0]) and not dim & (dim - 1):
        return programs.heads(streams, rotary)
    return plain_heads(streams, rotary, rotate)


def plain_heads(
    streams: Sequence[Stream], rotary: Tensor, rotate: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """``heads`` in plain torch.

    Args:
        rotary: a row for each token, in whatever form ``rotate`` takes.
        rotate: queries or keys by the rows of their tokens.
    """
    parts, start = [], 0
    for qkv, query_gain, key_gain in streams:
        angles = rotary[start : start + qkv.shape[1]]
        q, k, v = qkv.unflatten(-1, (3, -1, query_gain.shape[0])).permute(2, 0, 3, 1, 4)
        parts.append((rotate(rms_norm(q, query_gain), angles), rotate(rms_norm(k, key_gain), angles), v))
        start += qkv.shape[1]
    if len(parts) == 1:
        return parts[0]
    q, k, v = (torch.cat(each, dim=2) for each in zip(*parts, strict=True))
    return q, k, v


def linear_gelu(linear: nn.Module, x: Tensor | Rows, reader: nn.Module | None = None) -> Tensor | Rows:
    """GELU (the tanh form) of a linear's result; ``reader`` as in ``norm_modulate``."""
    if isinstance(x, Tensor) and are_products(x, linear) and not _are_read(reader):
        return as_numbers(linear, x).gelu(x)
    made = linear(x)
    if not _are_read(reader):
        return F.gelu(made, approximate="tanh")
    if _in_one_pass(made):
        return Rows(*programs.in_rows(None, made), made.dtype)
    return in_rows(F.gelu(made, approximate="tanh"))


def are_products(x: Tensor, *linears: nn.Module) -> bool:
    """Whether linears may be taken apart into products that do more as they write; so on a GPU in 16 bits."""
    return _in_one_pass(x) and x.dtype in SHORT and all(map(is_product, linears))


def gelu_beside(attended: Tensor, fused: Tensor, reader: nn.Module | None = None) -> Tensor | Rows:
    """The attention's output beside the activated half of the MLP, ``[B, S, D + M]``; ``reader`` as above.

    Args:
        attended: ``[B, S, D]``.
        fused: ``[B, S, 3*D + M]``, queries, keys, values and MLP; it may be written to.
    """
    half = fused[..., 3 * attended.shape[-1] :]
    if _are_read(reader):
        if _in_one_pass(fused):
            return Rows(*programs.in_rows(attended, half), fused.dtype)
        return in_rows(torch.cat((attended, F.gelu(half, approximate="tanh")), dim=-1))
    if _in_one_pass(fused):
        return programs.gelu_beside(attended, fused)
    return torch.cat((attended, F.gelu(half, approximate="tanh")), dim=-1)
