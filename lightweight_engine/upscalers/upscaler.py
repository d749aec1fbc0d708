"""What an upscaler is, and those that need no network.

Every upscaler works on levels (uint8 ``[3, H, W]``) and returns them on the device that they came from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .resampling import Filter, Size, resample, resample_levels, scaled, to_image, to_levels

MULTIPLE = 8
_ROUNDS = 3  # a network of 4x is run at most this often to reach what is asked


class Upscaler(Protocol):
    """Enlarges pictures.

    Attributes:
        name: what people choose it by.
        scale: of one pass of its network; 1 where it reaches every size at once.
    """

    @property
    def name(self) -> str: ...

    @property
    def scale(self) -> int: ...

    def upscale(self, levels: Tensor, by: float) -> Tensor:
        """Levels ``[3, H, W]`` at ``by`` times their size, cut to multiples of 8 pixels."""
        ...


@dataclass(frozen=True)
class Resampling:
    """An upscaler without a network; without a filter it leaves pictures alone, and Lanczos does the work after it."""

    name: str
    filter: Filter | None = None
    scale: int = 1

    def upscale(self, levels: Tensor, by: float) -> Tensor:
        return repeated(lambda picture: self._once(picture, by), levels, by)

    def _once(self, levels: Tensor, by: float) -> Tensor:
        if self.filter is None:
            return levels
        size = scaled(size_of(levels), by)
        if self.filter == Filter.LANCZOS:
            return resample_levels(levels, size)
        return to_levels(resample(to_image(levels), size, self.filter)).to(levels.device)


NONE = Resampling("None")
PLAIN = (NONE, Resampling("Lanczos", Filter.LANCZOS), Resampling("Nearest", Filter.NEAREST))


def repeated(once: Callable[[Tensor], Tensor], levels: Tensor, by: float) -> Tensor:
    """Levels at ``by`` times their size: one pass after another until they are large enough, then Lanczos.

    At a scale of 1 exactly, one pass runs all the same.
    """
    width, height = scaled(size_of(levels), by, MULTIPLE)
    target = max(width, MULTIPLE), max(height, MULTIPLE)
    for round in range(_ROUNDS):
        size = size_of(levels)
        reached = size[0] >= target[0] and size[1] >= target[1]
        if reached and (round > 0 or by != 1):
            break
        levels = once(levels)
        if size_of(levels) == size:
            break
    return resample_levels(levels, target)


def enlarged(levels: Tensor, size: Size, upscaler: Upscaler | None) -> Tensor:
    """Levels at ``size`` (width, height): by the upscaler where they are smaller, the rest by Lanczos."""
    width, height = size_of(levels)
    by = max(size[0] / width, size[1] / height)
    if upscaler is not None and by > 1:
        levels = upscaler.upscale(levels, by)
    return resample_levels(levels, size)


def size_of(levels: Tensor) -> Size:
    return levels.shape[2], levels.shape[1]
