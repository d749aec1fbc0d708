"""Convolutions of 3x3 that round as tensor cores do in TF32: factors to 10 bits, sums in float32.

Half precision has the same bits and a smaller range. Weights and maps are kept in it, sums that go on from layer to
layer in float32. The plain-torch body is the twin that the programs are tested against.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels
from .kernels import convolution as programs
from .kernels.convolution import Lines, Maps, Shape, Sums

__all__ = ["Convolution", "Maps", "Sums"]


class Convolution(nn.Module):
    """A convolution of 3x3 with a border of zeros, its weights packed as the programs read them.

    Args:
        weight: ``[N, C, 3, 3]``, C a multiple of 32.
        bias: ``[N]``.
        shape: how programs cut it; None takes the usual one.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, shape: Shape | Lines | None = None) -> None:
        super().__init__()
        self.made = len(weight)
        self.shape = shape or programs.shape_of(self.made)
        self.register_buffer("weight", _packed(weight.detach(), self.shape.group))
        self.register_buffer("bias", bias.detach().float())

    def forward(
        self, x: Maps, out: Tensor, *, slope: float = 1.0, doubled: bool = False, sums: Sums | None = None
    ) -> None:
        """Write the convolution, leaky ReLU of it and a sum to ``out``.

        Args:
            x: in float16.
            out: ``[B, H, W, N]``, as ``kernels.convolution.convolve`` has it.
            slope: of negative numbers.
            doubled: ``x`` is enlarged to twice its size before, by its nearest pixel.
            sums: taken after the activation.
        """
        if have_programs(x):
            programs.convolve(x, self.weight, self.bias, out, slope=slope, doubled=doubled, sums=sums, shape=self.shape)
        else:
            self._plain(x, out, slope, doubled, sums)

    def _plain(self, x: Maps, out: Tensor, slope: float, doubled: bool, sums: Sums | None) -> None:
        maps = x.inside.permute(0, 3, 1, 2).float()
        if doubled:
            maps = F.interpolate(maps, scale_factor=2, mode="nearest")
        weight = _unpacked(self.weight, self.made).float()
        made = F.leaky_relu(F.conv2d(maps, weight, self.bias, padding=1), slope).permute(0, 2, 3, 1)
        if sums is not None:
            made = sums.trunk + sums.factor * made
            made = made if sums.origin is None else sums.origin + sums.factor * made
            if sums.keep is not None:
                sums.keep.copy_(made)
        out.copy_(made)


def have_programs(x: Maps) -> bool:
    """Whether programs convolve these maps."""
    return x.whole.is_cuda and kernels.available()


def _packed(weight: Tensor, group: int) -> Tensor:
    """``[N, C, 3, 3]`` as ``[3, group + 2, C, group, block]``: what each neighbour of a group makes of each pixel."""
    made, channels = weight.shape[:2]
    taps = weight.half().permute(2, 3, 1, 0).contiguous()
    packed = taps.new_zeros(3, group + 2, channels, group, programs.block_of(made, group))
    for neighbour in range(group):
        packed[:, neighbour : neighbour + 3, :, neighbour, :made] = taps
    return packed


def _unpacked(packed: Tensor, made: int) -> Tensor:
    """The weights ``[N, C, 3, 3]`` of the first neighbour."""
    return packed[:, :3, :, 0, :made].permute(3, 2, 0, 1)
