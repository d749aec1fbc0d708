"""What the programs for Hopper's GPUs share: where they are to be had, and who computes which part of attention.

Blocks as many as the card has multiprocessors take one job (all keys for some queries of a head) after another, and
cut those that would be left for a few. The other half of this is in ``hopper.cuh``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from ctypes import Structure, c_int, c_longlong, c_void_p
from functools import cache, lru_cache
from typing import Any

import torch

from .cuda import CudaError, CudaProgram

logger = logging.getLogger(__name__)

CAPABILITY = (9, 0)
DIM = 128
"""Numbers of a head."""
GROUPS = 2
"""Of 128 threads that compute, in each block; one more fetches."""
QUERIES = 64 * GROUPS
"""Of a job."""
LEAST_TILES = 2
"""That a block takes of a job that is cut: each time it has queries to fetch, and sums to put by."""
_RECORD = 17 * 4 * 128  # floats, of a group


class Plan(Structure):
    """``jobs`` of a place in a head of a picture each, with their ``tiles`` of keys; those behind ``whole`` are cut,
    and each block has a ``share`` of their tiles."""

    _fields_ = tuple((name, c_int) for name in ("jobs", "places", "heads", "tiles", "whole", "share"))


class Result(Structure):
    _fields_ = (("start", c_void_p), ("batch", c_longlong), ("row", c_longlong), ("tokens", c_int))


def usable(programs: Callable[[torch.device], Any], device: torch.device, otherwise: str) -> bool:
    """Whether a device has such programs, which are compiled now where no cache has them.

    Args:
        otherwise: what is done without, told in a warning where a GPU of this type cannot have them.
    """
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) != CAPABILITY:
        return False
    try:
        programs(device)
    except (CudaError, OSError) as error:
        logger.warning("%s: %s", otherwise, error)
        return False
    return True


def attention_programs(file: str, device: torch.device, shared: int, *others: str) -> dict[str, CudaProgram]:
    """``attend``, ``merge`` and others of a file by their names; compiled where no cache has them, in about a second.

    Args:
        shared: bytes of shared memory that ``attend`` takes.

    Raises:
        CudaError: they cannot be.
    """
    names = {"attend": shared, "merge": 0, **dict.fromkeys(others, 0)}
    return {name: CudaProgram(file, name, device, nbytes) for name, nbytes in names.items()}


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(256)
def plan(batch: int, heads: int, tokens: int, tile: int, blocks: int) -> Plan:
    """For attention of so many tokens over themselves, in tiles of so many keys, by so many blocks."""
    places, tiles = -(-tokens // QUERIES), -(-tokens // tile)
    jobs = batch * heads * places
    left = jobs % blocks
    share = max(LEAST_TILES, -(-left * tiles // blocks))
    cut = left if 10 * share <= 9 * tiles else 0  # nearly as many tiles as a job has gain nothing
    return Plan(jobs, places, heads, tiles, jobs - cut, share)


def record_bytes(plan: Plan, blocks: int) -> int:
    """Room for what comes of parts of jobs, of which a block has two at most."""
    return 2 * blocks * GROUPS * _RECORD * 4 if plan.whole < plan.jobs else 0


def result(address: int, tokens: int, width: int) -> Result:
    """``[B, S, N*K]`` of bfloat16 that lies closely."""
    return Result(address, 2 * tokens * width, 2 * width, tokens)


def start(programs: dict[str, CudaProgram], plan: Plan, blocks: int, work: Structure, shared: int) -> None:
    """Queue ``attend``, and ``merge`` for jobs that are cut."""
    cut = plan.jobs - plan.whole
    grid = blocks if cut else min(plan.jobs, blocks)
    programs["attend"]((grid, 1, 1), 128 * (GROUPS + 1), work, shared=shared)
    if cut:
        programs["merge"]((cut, 1, 1), 128 * GROUPS, work)
