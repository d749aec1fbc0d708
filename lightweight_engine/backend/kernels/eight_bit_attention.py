"""Starts the programs of ``eight_bit_attention.cu`` on Hopper. Their twin is in ``..eight_bit_attention``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from ctypes import Structure, c_float, c_int, c_longlong, c_void_p
from functools import cache, lru_cache

import torch
from torch import Tensor

from .cuda import CudaProgram
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

TILE = QUERIES  # tokens that are laid out together

# As in eight_bit_attention.cu.
_THREADS, _SHARED = 512, 221424
_SCORES = DIM**-0.5 / math.log(2)


class _Stream(Structure):
    _fields_ = (("fused", c_void_p), ("gains", c_void_p * 2), ("batch", c_longlong), ("row", c_longlong))


class _Work(Structure):
    _fields_ = (
        ("streams", _Stream * 2),
        ("first_tokens", c_int),
        ("tokens", c_int),
        ("plan", Plan),
        ("score_scale", c_float),
        ("rotary", c_void_p),
        ("images", c_void_p * 3),
        ("query_scales", c_void_p),
        ("key_scales", c_void_p),
        ("value_peaks", c_void_p),
        ("result", Result),
        ("records", c_void_p),
    )


@cache
def programs(device: torch.device) -> dict[str, CudaProgram]:
    return attention_programs("eight_bit_attention.cu", device, _SHARED, "find_peaks", "prepare")


def take(streams: Sequence[tuple[Tensor, Tensor, Tensor]]) -> bool:
    """Whether the programs read what lies as these do: heads of 128 in bfloat16, 16 bytes at a time."""
    parts = [part for stream in streams for part in stream]
    starts = [part.data_ptr() for part in parts]
    steps = [2 * step for part in parts for step in part.stride()[:-1]]
    return (
        all(part.dtype == torch.bfloat16 and part.stride(-1) == 1 for part in parts)
        and all(place % 16 == 0 for place in starts + steps)
        and all(len(gain) == DIM for _, *gains in streams for gain in gains)
    )


def attend(streams: Sequence[tuple[Tensor, Tensor, Tensor]], rotary: Tensor) -> Tensor:
    """Attention ``[B, S, N*K]`` over streams one behind another.

    Args:
        streams: one or two that ``take`` says yes to; of each the projection ``[B, S, 3*N*K]`` and the gains ``[K]`` of
            its queries and keys.
        rotary: complex64 ``[S, K/2]`` for all of them.
    """
    first = streams[0][0]
    batch, width, device = len(first), first.shape[-1] // 3, first.device
    count, tokens = width // DIM, sum(qkv.shape[1] for qkv, _, _ in streams)
    blocks = multiprocessors(device)
    parts = plan(batch, count, tokens, TILE, blocks)
    out = torch.empty((batch, tokens, width), dtype=first.dtype, device=device)
    room = torch.empty(sum(_room(parts, blocks)), dtype=torch.uint8, device=device)
    places = tuple(_place(stream) for stream in (streams[0], streams[-1]))
    work = _work(
        places, first.shape[1], batch, tokens, width, blocks, rotary.data_ptr(), out.data_ptr(), room.data_ptr()
    )
    ready = programs(device)
    with torch.cuda.device_of(first):
        ready["find_peaks"]((count, parts.tiles, batch), _THREADS, work)
        ready["prepare"]((count, parts.tiles, batch), _THREADS, work)
        start(ready, parts, blocks, work, _SHARED)
    return out


def _room(parts: Plan, blocks: int) -> tuple[int, ...]:
    """Bytes of queries, keys and values, of the scales of both, of what comes of parts of jobs, and of peaks."""
    image = parts.jobs * TILE * DIM
    return image, image, image, parts.jobs * TILE * 4, parts.jobs * 16, record_bytes(parts, blocks), parts.jobs * 4


Place = tuple[int, int, int, int, int]


def _place(stream: tuple[Tensor, Tensor, Tensor]) -> Place:
    """Where a stream lies: its projection and gains, and how far a picture and a token are from the next."""
    qkv, query_gain, key_gain = stream
    return qkv.data_ptr(), query_gain.data_ptr(), key_gain.data_ptr(), qkv.stride(0), qkv.stride(1)


@lru_cache(1024)  # memory is taken again and again, and a host has other things to do
def _work(
    places: tuple[Place, ...],
    first_tokens: int,
    batch: int,
    tokens: int,
    width: int,
    blocks: int,
    rotary: int,
    out: int,
    room: int,
) -> _Work:
    parts = plan(batch, width // DIM, tokens, TILE, blocks)
    starts = itertools.accumulate(_room(parts, blocks)[:-1], initial=room)
    queries, keys, values, query_scales, key_scales, records, peaks = starts
    streams = (
        _Stream(qkv, (c_void_p * 2)(query_gain, key_gain), 2 * batch_step, 2 * row_step)
        for qkv, query_gain, key_gain, batch_step, row_step in places
    )
    return _Work(
        (_Stream * 2)(*streams),
        first_tokens,
        tokens,
        parts,
        _SCORES,
        rotary,
        (c_void_p * 3)(queries, keys, values),
        query_scales,
        key_scales,
        peaks,
        result(out, tokens, width),
        records,
    )
