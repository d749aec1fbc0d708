"""Starts the program of ``attention.cu`` on Hopper. Its twin is the reference of ``..attention``."""

from __future__ import annotations

import math
from ctypes import Structure, c_float, c_int, c_longlong, c_void_p
from functools import cache

import torch
from torch import Tensor

from .cuda import CudaProgram, TensorMap, multiprocessors, tensor_map

DIM = 128  # of a head

# As in attention.cu.
_GROUPS, _TILE, _HALF, _SHARED = 2, 176, 64, 213072
_BLOCK = 64 * _GROUPS


class _Work(Structure):
    _fields_ = (
        ("queries", TensorMap),
        ("keys", TensorMap),
        ("values", TensorMap),
        ("tokens", c_int),
        ("blocks", c_int),
        ("heads", c_int),
        ("jobs", c_int),
        ("score_scale", c_float),
        ("result", c_void_p),
        ("result_batch", c_longlong),
        ("result_row", c_longlong),
    )


@cache
def program(device: torch.device) -> CudaProgram:
    """That of a GPU; compiled where no cache has it, in about a second.

    Raises:
        CudaError: it cannot be.
    """
    return CudaProgram("attention.cu", "attend", device, _SHARED)


def take(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> bool:
    """Whether the program computes this: heads of 128 in bfloat16, read 16 bytes at a time, all of as many tokens."""
    return (
        q.shape == k.shape == v.shape
        and q.shape[-1] == DIM
        and q.numel() > 0
        and (scale is None or scale > 0)  # the largest score is sought before it is scaled
        and all(map(_is_read, (q, k, v)))
    )


def _is_read(x: Tensor) -> bool:
    return (
        x.dtype == torch.bfloat16
        and x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(step > 0 and step % 16 == 0 for step in _steps(x))
    )


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Attention ``[B, N, S, K]`` over all of as many tokens, which lies as ``[B, S, N, K]``.

    Args:
        q, k, v: ``[B, N, S, K]``; ``take`` says yes to all arguments.
        scale: of the scores; ``None`` is ``K ** -0.5``.
    """
    batch, heads, tokens, _ = q.shape
    blocks = -(-tokens // _BLOCK)
    jobs = batch * heads * blocks
    out = torch.empty((batch, tokens, heads, DIM), dtype=q.dtype, device=q.device)
    work = _Work(
        _boxes(q, _BLOCK),
        _boxes(k, _TILE),
        _boxes(v, _TILE),
        tokens,
        blocks,
        heads,
        jobs,
        (DIM**-0.5 if scale is None else scale) / math.log(2),
        out.data_ptr(),
        2 * out.stride(0),
        2 * out.stride(1),
    )
    with torch.cuda.device_of(q):
        grid = (min(jobs, multiprocessors(q.device)), 1, 1)
        program(q.device)(grid, 128 * (_GROUPS + 1), work, shared=_SHARED)
    return out.transpose(1, 2)


def _boxes(x: Tensor, tokens: int) -> TensorMap:
    """``x`` by so many tokens of a head, half of their dims."""
    batch, heads, count, dim = x.shape
    return tensor_map(x.data_ptr(), (dim, count, heads, batch), _steps(x), (_HALF, tokens, 1, 1))


def _steps(x: Tensor) -> tuple[int, ...]:
    """Bytes from a token, a head and a picture to the next; where there is none, any will do."""
    return tuple(2 * (step if size > 1 else DIM) for size, step in zip(x.shape[2::-1], x.stride()[2::-1], strict=True))
