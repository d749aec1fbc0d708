"""Convolutions for the programs in half precision, for interpreter and GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightweight_engine.backend.convolutions import Convolution, Maps, Sums
from lightweight_engine.backend.kernels.convolution import Lines, Shape

WIDTH = 192  # channels of the maps that all read the first ones of


@dataclass(frozen=True)
class Case:
    """A convolution of maps ``[batch, height, width, read]`` to ``made`` channels.

    Attributes:
        beside: it writes into the maps that it reads, behind what it reads; else into others of float32.
        sums: 1 to add to a trunk, 2 to an origin as well; negative where the sum is written over what was added to.
    """

    batch: int
    height: int
    width: int
    read: int
    made: int
    slope: float = 1.0
    beside: bool = False
    doubled: bool = False
    sums: int = 0
    shape: Shape | Lines | None = None


CASES: dict[str, Case] = {
    "one pixel": Case(1, 1, 1, 64, 32),
    "first of a block": Case(2, 5, 7, 64, 32, slope=0.2, beside=True),
    "second": Case(1, 9, 33, 96, 32, slope=0.2, beside=True),
    "third, one line": Case(2, 1, 40, 128, 32, slope=0.2, beside=True),
    "fourth, one column": Case(2, 11, 1, 160, 32, slope=0.2, beside=True),
    "last of a block": Case(2, 10, 17, 192, 64, sums=1),
    "last of a block, in place": Case(2, 3, 18, 192, 64, sums=-1),
    "last of a chain": Case(1, 8, 16, 192, 64, sums=2),
    "last of a chain, in place": Case(3, 5, 19, 192, 64, sums=-2),
    "lines that fill no patch": Case(2, 41, 70, 64, 32, slope=0.2, beside=True, shape=Lines(columns=32, rows=3)),
    "lines, the fewest": Case(3, 9, 65, 32, 64, sums=1, shape=Lines(segments=1, rows=2, made=64)),
    "lines, deep, over an origin": Case(2, 23, 33, 64, 64, sums=-2, shape=Lines(4, 32, 5, 64, 64, 8, copied=16)),
    "lines, by shared memory": Case(2, 21, 19, 96, 64, sums=-1, shape=Lines(rows=4, weights_copied=16, held=False)),
    "patches": Case(2, 9, 33, 96, 32, slope=0.2, beside=True, shape=Shape()),
    "patches, in place": Case(3, 5, 19, 192, 64, sums=-2, shape=Shape(group=1, warps=8)),
    "doubled": Case(2, 5, 9, 64, 64, slope=0.2, doubled=True),
    "doubled, odd patches": Case(
        1, 6, 7, 64, 32, slope=0.2, doubled=True, shape=Shape(group=1, rows=1, columns=16, depth=64, warps=4)
    ),
    "colours": Case(2, 7, 21, 64, 3),
    "few channels": Case(1, 4, 5, 32, 32, slope=0.2, beside=True),
    "groups of four": Case(1, 5, 11, 64, 32, shape=Shape(group=4, rows=4, columns=16, depth=64)),
    "groups of one, deep": Case(1, 9, 17, 192, 64, sums=2, shape=Shape(1, 16, 16, 64, 8, 3, 16)),
}


@dataclass(frozen=True)
class Given:
    """What a case convolves, each on one device: the maps, the convolution, what it is added to, and where it goes."""

    maps: Maps
    convolution: Convolution
    sums: Sums | None
    out: Maps


def given(label: str, device: str = "cpu") -> Given:
    """The same numbers at every call."""
    case, random = CASES[label], torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    weight = draw(case.made, case.read, 3, 3) * (9 * case.read) ** -0.5
    convolution = Convolution(weight, draw(case.made), case.shape).to(device)
    maps = Maps.empty((case.batch, case.height, case.width), WIDTH, device=torch.device(device))
    maps.inside.copy_(draw(case.batch, case.height, case.width, WIDTH))
    scale = 2 if case.doubled else 1
    size = (case.batch, case.height * scale, case.width * scale)
    sums = None
    if case.sums:
        trunk, origin = (draw(*size, case.made).to(device) for _ in range(2))
        base = origin if abs(case.sums) == 2 else trunk
        keep = base if case.sums < 0 else torch.zeros_like(base)
        sums = Sums(trunk, 0.2, origin if abs(case.sums) == 2 else None, keep)
    if case.beside:
        out = maps.channels(case.read, case.read + case.made)
    else:
        out = Maps.empty(size, case.made, torch.float32, torch.device(device))
    return Given(maps, convolution, sums, out)


def made(label: str, call: Callable[..., None], device: str = "cpu") -> list[Tensor]:
    """What a case wrote, borders and other channels included; ``call`` is that of ``Convolution.forward``, unbound."""
    case, each = CASES[label], given(label, device)
    call(
        each.convolution,
        each.maps.channels(0, case.read),
        each.out.inside,
        slope=case.slope,
        doubled=case.doubled,
        sums=each.sums,
    )
    beside = (
        [] if each.sums is None else [t for t in (each.sums.trunk, each.sums.origin, each.sums.keep) if t is not None]
    )
    return [tensor.cpu() for tensor in (each.maps.whole, each.out.whole, *beside)]
