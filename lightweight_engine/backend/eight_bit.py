"""Products of 8-bit floats: the rows of what goes in and the rows of the weight each have a scale of their own.

A GPU with such units does them about twice as fast as products in 16 bits. Weights keep theirs (``fp8_rows``), inputs
are rounded as they are made: whoever writes what a linear reads asks ``read_in_eight_bits`` and hands over ``Rows``.

Source: FP8 Formats for Deep Learning (Micikevicius et al. 2022); torch's ``scaled_mm``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels
from .fp8 import Float8, quantize_rows
from .kernels import fused as programs
from .linear import PackedLinear
from .packed import Packed

LARGEST = 448.0
MULTIPLE = 16

# (rows, out, in) of products that cuBLAS has refused: few rows of very wide matrices. They are done in 16 bits.
_WITHOUT: set[tuple[int, ...]] = set()


@dataclass(frozen=True, eq=False)
class Rows:
    """What a linear reads, in 8 bits.

    Attributes:
        values: float8_e4m3fn ``[..., in]``.
        scale: float32 ``[..., 1]``; ``values * scale`` are the numbers.
        dtype: that the linear answers in.
    """

    values: Tensor
    scale: Tensor
    dtype: torch.dtype

    def numbers(self) -> Tensor:
        """The numbers in float32."""
        return self.values.float() * self.scale

    def times(self, weight: Packed, bias: Tensor | None) -> Tensor:
        """The product with a weight ``[out, in]`` in ``fp8_rows``: ``[..., out]`` in ``dtype``."""
        bias = None if bias is None else bias.to(self.dtype)
        sizes = (self.values.numel() // weight.shape[1], *weight.shape)
        made = None if not self.values.is_cuda or sizes in _WITHOUT else self._product(weight, bias, sizes)
        if made is None:
            made = F.linear(self.numbers().to(self.dtype), weight.dequantize(self.dtype), bias)
        return made.view(*self.values.shape[:-1], -1)

    def _product(self, weight: Packed, bias: Tensor | None, sizes: tuple[int, ...]) -> Tensor | None:
        """By the GPU's units; None where its library has nothing for these sizes."""
        try:
            # Sums are kept in the tensor cores' 22 bits: 0.003 of a result, where the rounding to 8 bits is 0.03.
            return F.scaled_mm(
                self.values.flatten(0, -2),
                weight.parts["values"].t(),
                self.scale.flatten(0, -2),
                F.ScalingType.RowWise,
                weight.parts["scale"][None],
                F.ScalingType.RowWise,
                bias=bias,
                output_dtype=self.dtype,
                use_fast_accum=True,
            )
        except RuntimeError as error:
            if "NOT_SUPPORTED" not in str(error):
                raise
        _WITHOUT.add(sizes)
        return None


def in_rows(x: Tensor) -> Rows:
    """The nearest 8-bit floats of ``[..., in]``, the largest of a row being the largest that there is."""
    if x.is_cuda and kernels.available():
        values, scale = programs.in_rows(x if x.dim() == 3 else x.reshape(1, -1, x.shape[-1]))
        return Rows(values.view(x.shape), scale.view(*x.shape[:-1], 1), x.dtype)
    wide = x.float()
    largest = wide.abs().amax(-1, keepdim=True)
    scale = torch.where(largest > 0, largest / torch.full_like(largest, LARGEST), 1.0)
    return Rows((wide / scale).to(programs.EIGHT_BITS), scale, x.dtype)


@dataclass(frozen=True, eq=False)
class InEightBits:
    """A linear that is nothing but a product in 8 bits; a ``forward`` in place of a module's own."""

    weight: Packed
    bias: Tensor | None

    def __call__(self, x: Tensor | Rows) -> Tensor:
        return (x if isinstance(x, Rows) else in_rows(x)).times(self.weight, self.bias)


class EightBitLinear(PackedLinear):
    """A linear in ``fp8_rows`` that multiplies as it is stored."""

    multiplies_as_stored = True

    def forward(self, input: Tensor | Rows) -> Tensor:
        return InEightBits(self.packed, self.bias)(input)


def takes(shape: tuple[int, ...]) -> bool:
    """Whether there are products with a matrix of this shape."""
    return all(side % MULTIPLE == 0 for side in shape)


def read_in_eight_bits(linear: nn.Module) -> bool:
    """Whether a linear reads ``Rows``: nothing else than one product acts on its inputs."""
    acting = linear.__dict__.get("forward")
    return isinstance(linear, EightBitLinear) if acting is None else isinstance(acting, InEightBits)


def multiply_as_stored(model: nn.Module) -> None:
    """Let linears in ``fp8_rows`` do so; those that LoRAs act beside round their inputs themselves."""
    for module in model.modules():
        if type(module) is PackedLinear and isinstance(module.spec, Float8) and module.spec.by_rows:
            module.__class__ = EightBitLinear


@cache
def available(device: torch.device) -> bool:
    """Whether a GPU does such products: asked of the GPU itself, as it depends on its type and on torch's build."""
    if device.type != "cuda":
        return False
    try:
        rows = in_rows(torch.ones(MULTIPLE, MULTIPLE, dtype=torch.bfloat16, device=device))
        rows.times(quantize_rows(torch.ones(MULTIPLE, MULTIPLE, device=device)), None)
        torch.cuda.synchronize(device)
    except (RuntimeError, NotImplementedError, AttributeError):
        return False
    return not _WITHOUT & {(MULTIPLE, MULTIPLE, MULTIPLE)}
