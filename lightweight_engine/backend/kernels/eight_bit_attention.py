"""Starts the programs of ``eight_bit_attention.cu`` on Hopper. Their twin is in ``..eight_bit_attention``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from ctypes import Structure, c_float, c_int, c_longlong, c_void_p
from functools import cache

import torch
from torch import Tensor

from .cuda import CudaProgram, multiprocessors

DIM = 128  # of a head
TILE = 128  # tokens that are laid out together

# As in eight_bit_attention.cu.
_THREADS, _GROUPS, _SHARED = 512, 2, 221392
_SCORES = DIM**-0.5 / math.log(2)


class _Stream(Structure):
    _fields_ = (("fused", c_void_p), ("gains", c_void_p * 2), ("batch", c_longlong), ("row", c_longlong))


class _Work(Structure):
    _fields_ = (
        ("streams", _Stream * 2),
        ("first_tokens", c_int),
        ("tokens", c_int),
        ("tiles", c_int),
        ("heads", c_int),
        ("jobs", c_int),
        ("score_scale", c_float),
        ("rotary", c_void_p),
        ("images", c_void_p * 3),
        ("query_scales", c_void_p),
        ("key_scales", c_void_p),
        ("value_peaks", c_void_p),
        ("result", c_void_p),
        ("result_batch", c_longlong),
        ("result_row", c_longlong),
    )


@cache
def programs(device: torch.device) -> dict[str, CudaProgram]:
    """Those of a GPU by their names; compiled where no cache has them, in about a second.

    Raises:
        CudaError: they cannot be.
    """
    shared = {"find_peaks": 0, "prepare": 0, "attend": _SHARED}
    return {name: CudaProgram("eight_bit_attention.cu", name, device, nbytes) for name, nbytes in shared.items()}


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
    tiles = -(-tokens // TILE)
    made = batch * count * tiles
    images = torch.empty((3, made, TILE * DIM), dtype=torch.int8, device=device)
    scales = torch.empty(made * (TILE + 5), dtype=torch.float32, device=device)
    angles = torch.view_as_real(rotary)
    out = torch.empty((batch, tokens, width), dtype=first.dtype, device=device)
    work = _Work(
        (_Stream * 2)(_stream(*streams[0]), _stream(*streams[-1])),
        first.shape[1],
        tokens,
        tiles,
        count,
        made,
        _SCORES,
        angles.data_ptr(),
        (c_void_p * 3)(*(images.data_ptr() + kind * made * TILE * DIM for kind in range(3))),
        *(scales.data_ptr() + 4 * start for start in (0, made * TILE, made * (TILE + 4))),
        out.data_ptr(),
        2 * out.stride(0),
        2 * out.stride(1),
    )
    ready = programs(device)
    with torch.cuda.device_of(first):
        ready["find_peaks"]((count, tiles, batch), _THREADS, work)
        ready["prepare"]((count, tiles, batch), _THREADS, work)
        ready["attend"]((min(made, multiprocessors(device)), 1, 1), 128 * (_GROUPS + 1), work, shared=_SHARED)
    return out


def _stream(qkv: Tensor, query_gain: Tensor, key_gain: Tensor) -> _Stream:
    gains = (c_void_p * 2)(query_gain.data_ptr(), key_gain.data_ptr())
    return _Stream(qkv.data_ptr(), gains, 2 * qkv.stride(0), 2 * qkv.stride(1))
