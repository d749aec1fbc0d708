"""Where networks of detectors look at pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..upscalers.resampling import HOST

Free = Callable[[], int]
"""Bytes of the device that may be taken now."""


def all_of_it() -> int:
    return 1 << 62


class Place(NamedTuple):
    """
    Attributes:
        device: that networks of our own visit.
        free: what may be taken of it; networks that need more look on the CPU.
        pinned: page-locked memory may hold them.
    """

    device: torch.device = HOST
    free: Free = all_of_it
    pinned: bool = True


ON_CPU = Place()
