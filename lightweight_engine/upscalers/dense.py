"""ESRGAN's network of dense blocks, with convolutions for tensor cores: as exact as the reference's, which are in TF32.

A dense block is one map in half precision: each convolution reads the channels before it and writes its own beside
them. What is summed from block to block is float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backend.convolutions import Convolution, Maps, Sums

GROWTH = 32  # channels that a convolution adds inside a block
SLOPE = 0.2  # of leaky ReLU
FACTOR = 0.2  # of a block's result in a sum
_WIDTHS = (32, 64, 128)
_INNER = 4  # convolutions of a block that add channels; one more makes its result
_SUB = "model.1.sub"  # where spandrel has them
_CHAIN = 3  # blocks to a sum of their own


class DenseNetwork(nn.Module):
    """A network of spandrel's in this form, for inference only.

    Args:
        state: its tensors, by the names that they have there.
        blocks: chains of blocks.
        doublings: of the size, at the end.
        shuffle: pixels of a side that become channels before.
    """

    first: Tensor
    first_bias: Tensor

    def __init__(self, state: dict[str, Tensor], blocks: int, doublings: int, shuffle: int) -> None:
        super().__init__()
        self.shuffle = shuffle
        self.width = len(state["model.0.weight"])

        def taken(name: str) -> Convolution:
            return Convolution(state[f"{name}.weight"], state[f"{name}.bias"])

        # Of the first convolution, which reads three channels, torch's takes no time; all others read half precision.
        first = state["model.0.weight"].detach().float()
        self.register_buffer("first", first.contiguous(memory_format=torch.channels_last))
        self.register_buffer("first_bias", state["model.0.bias"].detach().float())
        self.blocks = nn.ModuleList(
            nn.ModuleList(map(taken, _names_of_block(f"{_SUB}.{chain}.RDB{block + 1}")))
            for chain in range(blocks)
            for block in range(_CHAIN)
        )
        self.joined = taken(f"{_SUB}.{blocks}")
        *doubling, fine, last = map(taken, _names_of_end(doublings))
        self.doubling, self.fine, self.last = nn.ModuleList(doubling), fine, last

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures ``[B, C, H, W]``, of sides that ``shuffle`` divides, to float32 ``[B, N, H', W']``.

        What does not fit half precision is infinite or no number in the result.
        """
        x = pictures.float()
        if self.shuffle > 1:
            x = F.pixel_unshuffle(x, self.shuffle)
        maps = self._trunk(x.contiguous(memory_format=torch.channels_last))
        for convolution in self.doubling:
            maps = _made(convolution, maps, doubled=True)
        maps = _made(self.fine, maps)
        made = torch.empty(*maps.inside.shape[:3], self.last.made, device=x.device)
        self.last(maps, made)
        return made.permute(0, 3, 1, 2)

    def _trunk(self, x: Tensor) -> Maps:
        """All that is done at the size of the picture: what the blocks made of the first maps, and those."""
        first = F.conv2d(x, self.first, self.first_bias, padding=1).permute(0, 2, 3, 1).contiguous()
        batch, height, width, _ = first.shape
        here, there = (_Growing.empty((batch, height, width), self.width, x.device) for _ in range(2))
        here.start.copy_(first)
        origin, trunk = first.clone(), torch.empty_like(first)
        for number, block in enumerate(self.blocks):
            place = number % _CHAIN
            if place == _CHAIN - 1:
                sums = Sums(trunk, FACTOR, origin=origin, keep=origin)
            else:
                sums = Sums(trunk if place else origin, FACTOR, keep=trunk)
            *inner, last = block.children()
            for convolution, read, written in zip(inner, here.read[:-1], here.written, strict=True):
                convolution(read, written, slope=SLOPE)
            last(here.read[-1], there.start, sums=sums)
            here, there = there, here
        joined = Maps.empty((batch, height, width), self.width, device=x.device)
        self.joined(here.read[0], joined.inside, sums=Sums(first, 1.0))
        return joined


@dataclass(frozen=True)
class _Growing:
    """The maps of a block: what each of its convolutions reads of them, and where the inner ones write."""

    read: list[Maps]
    written: list[Tensor]
    start: Tensor

    @classmethod
    def empty(cls, size: tuple[int, int, int], width: int, device: torch.device) -> _Growing:
        ends = [width + number * GROWTH for number in range(_INNER + 1)]
        maps = Maps.empty(size, ends[-1], device=device)
        written = [maps.channels(end, end + GROWTH).inside for end in ends[:-1]]
        return cls([maps.channels(0, end) for end in ends], written, maps.channels(0, width).inside)


def _made(convolution: nn.Module, maps: Maps, *, doubled: bool = False) -> Maps:
    """What a convolution that keeps the number of channels makes of maps."""
    batch, height, width, channels = maps.inside.shape
    scale = 2 if doubled else 1
    made = Maps.empty((batch, height * scale, width * scale), channels, device=maps.whole.device)
    convolution(maps, made.inside, slope=SLOPE, doubled=doubled)
    return made


def _names_of_block(prefix: str) -> list[str]:
    return [f"{prefix}.conv{number + 1}.0" for number in range(_INNER + 1)]


def _names_of_end(doublings: int) -> list[str]:
    """The convolutions behind the trunk: one with leaky ReLU for each doubling, and two more with one between them."""
    numbers = [*(3 + 3 * number for number in range(doublings)), 2 + 3 * doublings, 4 + 3 * doublings]
    return [f"model.{number}" for number in numbers]


def dense_network(model: nn.Module) -> DenseNetwork | None:
    """A network of spandrel's in this form; None of one that has other parts, or weights beyond half precision."""
    state = model.state_dict()
    if "model.0.weight" not in state:
        return None
    width, inputs = state["model.0.weight"].shape[:2]
    blocks = len({name.split(".")[3] for name in state if name.startswith(f"{_SUB}.")}) - 1
    doublings = sum(isinstance(module, nn.Upsample) for module in model.modules())
    expected = dict(_shapes(width, inputs, blocks, doublings))
    if {name: tuple(tensor.shape) for name, tensor in state.items()} != expected or not _is_plain(model):
        return None
    packed = (state[name] for name, shape in expected.items() if len(shape) == 4 and name != "model.0.weight")
    if width not in _WIDTHS or any(weight.abs().max() > torch.finfo(torch.float16).max for weight in packed):
        return None
    return DenseNetwork(state, blocks, doublings, int(getattr(model, "shuffle_factor", None) or 1)).eval()


def _shapes(width: int, inputs: int, blocks: int, doublings: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The names and shapes of a plain network for pictures in colour."""
    inner = [(width + number * GROWTH, GROWTH) for number in range(_INNER)]
    sizes = {"model.0": (inputs, width), f"{_SUB}.{blocks}": (width, width)}
    for chain in range(blocks):
        for block in range(_CHAIN):
            names = _names_of_block(f"{_SUB}.{chain}.RDB{block + 1}")
            sizes |= dict(zip(names, [*inner, (width + _INNER * GROWTH, width)], strict=True))
    *others, last = _names_of_end(doublings)
    sizes |= dict.fromkeys(others, (width, width)) | {last: (width, 3)}
    for name, (read, made) in sizes.items():
        yield f"{name}.weight", (made, read, 3, 3)
        yield f"{name}.bias", (made,)


def _is_plain(model: nn.Module) -> bool:
    """Whether what has no weights is as in the published networks."""
    modules = list(model.modules())
    slopes = {module.negative_slope for module in modules if isinstance(module, nn.LeakyReLU)}
    enlarging = {(module.mode, module.scale_factor) for module in modules if isinstance(module, nn.Upsample)}
    return slopes == {SLOPE} and enlarging <= {("nearest", 2.0)}


def build_programs(device: torch.device) -> None:
    """Run every program that networks of the published width need, so that they are compiled and kept."""
    state = {name: torch.zeros(shape) for name, shape in _shapes(64, 3, blocks=1, doublings=2)}
    with torch.inference_mode():
        DenseNetwork(state, blocks=1, doublings=2, shuffle=1).to(device)(torch.zeros(1, 3, 8, 8, device=device))
