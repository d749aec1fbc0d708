"""Starts the programs of ``attention.cu`` on Hopper. Their twin is the reference of ``..attention``."""

from __future__ import annotations

import math
from ctypes import Structure, c_float, c_void_p
from functools import cache, lru_cache

import torch
from torch import Tensor

from .cuda import CudaProgram, TensorMap, tensor_map
from .hopper import (
    DIM,
    QUERIES,
    Plan,
    Result,
    attention_programs,
    multiprocessors,
    plan,
    record_bytes,
    result,
    start,
)

TILE = 176
"""Keys."""

# As in attention.cu.
_HALF, _SHARED = 64, 213096


class _Work(Structure):
    _fields_ = (
        ("queries", TensorMap),
        ("keys", TensorMap),
        ("values", TensorMap),
        ("plan", Plan),
        ("score_scale", c_float),
        ("result", Result),
        ("records", c_void_p),
    )


@cache
def programs(device: torch.device) -> dict[str, CudaProgram]:
    return attention_programs("attention.cu", device, _SHARED)


def take(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> bool:
    """Whether the programs compute this: heads of 128 in bfloat16, read 16 bytes at a time, all of as many tokens."""
    return (
        q.shape == k.shape == v.shape
        and q.shape[-1] == DIM
        and q.numel() > 0
        and (scale is None or scale > 0)  # the largest score is sought before it is scaled
        and all(map(_is_read, (q, k, v)))
    )


def _is_read(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.data_ptr() % 16 == 0 and _lies_well(x.shape, x.stride())


@lru_cache(1024)
def _lies_well(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    return strides[-1] == 1 and all(step > 0 and step % 16 == 0 for step in _steps(shape, strides))


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Attention ``[B, N, S, K]`` over all of as many tokens, which lies as ``[B, S, N, K]``.

    Args:
        q, k, v: ``[B, N, S, K]``; ``take`` says yes to all arguments.
        scale: of the scores; ``None`` is ``K ** -0.5``.
    """
    batch, heads, tokens, _ = q.shape
    blocks = multiprocessors(q.device)
    parts = plan(batch, heads, tokens, TILE, blocks)
    out = torch.empty((batch, tokens, heads, DIM), dtype=q.dtype, device=q.device)
    room = torch.empty(record_bytes(parts, blocks), dtype=torch.uint8, device=q.device)
    places = tuple((each.data_ptr(), each.stride()) for each in (q, k, v))
    work = _work(q.device, places, q.shape, blocks, scale or DIM**-0.5, out.data_ptr(), room.data_ptr())
    with torch.cuda.device_of(q):
        start(programs(q.device), parts, blocks, work, _SHARED)
    return out.transpose(1, 2)


@lru_cache(1024)  # memory is taken again and again, and a host has other things to do
def _work(
    device: torch.device,
    places: tuple[tuple[int, tuple[int, ...]], ...],
    shape: torch.Size,
    blocks: int,
    scale: float,
    out: int,
    room: int,
) -> _Work:
    batch, heads, tokens, _ = shape
    boxes = [
        tensor_map(device, address, shape[::-1], _steps(shape, strides), (_HALF, size, 1, 1))
        for (address, strides), size in zip(places, (QUERIES, TILE, TILE), strict=True)
    ]
    parts = plan(batch, heads, tokens, TILE, blocks)
    return _Work(*boxes, parts, scale / math.log(2), result(out, tokens, heads * DIM), room)


def _steps(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Bytes from a token, a head and a picture to the next; where there is none, any will do."""
    return tuple(2 * (step if size > 1 else DIM) for size, step in zip(shape[2::-1], strides[2::-1], strict=True))
