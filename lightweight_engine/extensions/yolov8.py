"""YOLOv8 for detection and segmentation: a network whose sizes are read from tensor shapes, and which can be trained.

Parameter names are those of published files (``model.0.conv.weight`` … ``model.22.cv2.0.0.conv.weight``); the numbers
in them are places in the list of layers, so places without parameters (upsampling, joining) stay empty. Of letters:
B batch, C channels, N anchor points of all levels, K classes, M mask coefficients.

Source: the layer list that published files carry beside their weights, and pipelines.md §d.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UnsupportedCheckpointError
from .yolov8_sizes import (
    BACKBONE_BLOCKS,
    HEAD,
    NECK_BLOCKS,
    NECK_STRIDES,
    POOLING,
    STAGES,
    MaskSizes,
    YOLOv8Sizes,
)

STRIDES = (8, 16, 32)
NORM_EPSILON = 1e-3
NORM_MOMENTUM = 0.03
COUNTER = "num_batches_tracked"  # of a batch norm, which only training reads
PRIOR = 0.01  # probability of each class before training, so that the many empty points do not drown the others


class Raw(NamedTuple):
    """What the head gives, for each level: ``boxes`` [B, 4·bins, h, w] and ``classes`` [B, K, h, w] are logits.

    ``coefficients`` [B, M, h, w] and ``prototypes`` [B, M, H/4, W/4] are of segmentation networks, else empty and None.
    """

    boxes: list[Tensor]
    classes: list[Tensor]
    coefficients: list[Tensor]
    prototypes: Tensor | None


class Conv(nn.Module):
    """Convolution that keeps the size (over the stride), batch norm where it is not folded in, SiLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, *, norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=not norm)
        self.bn = nn.BatchNorm2d(outputs, NORM_EPSILON, NORM_MOMENTUM) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    def __init__(self, width: int, *, shortcut: bool, norm: bool) -> None:
        super().__init__()
        self.cv1 = Conv(width, width, 3, norm=norm)
        self.cv2 = Conv(width, width, 3, norm=norm)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.shortcut else y


class C2f(nn.Module):
    """Half of the channels goes through a chain of bottlenecks; the output sees every link of the chain."""

    def __init__(self, inputs: int, outputs: int, depth: int, *, shortcut: bool, norm: bool) -> None:
        super().__init__()
        half = outputs // 2
        self.cv1 = Conv(inputs, 2 * half, 1, norm=norm)
        self.cv2 = Conv((2 + depth) * half, outputs, 1, norm=norm)
        self.m = nn.ModuleList(Bottleneck(half, shortcut=shortcut, norm=norm) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        links = list(self.cv1(x).chunk(2, dim=1))
        for bottleneck in self.m:
            links.append(bottleneck(links[-1]))
        return self.cv2(torch.cat(links, dim=1))


class SPPF(nn.Module):
    """Pools of growing reach, as three small ones in a row."""

    def __init__(self, width: int, *, norm: bool) -> None:
        super().__init__()
        self.cv1 = Conv(width, width // 2, 1, norm=norm)
        self.cv2 = Conv(width // 2 * 4, width, 1, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        pools = [self.cv1(x)]
        for _ in range(3):
            pools.append(F.max_pool2d(pools[-1], 5, stride=1, padding=2))
        return self.cv2(torch.cat(pools, dim=1))


class Distances(nn.Module):
    """The expectation of a distribution over bins. Its weights are the numbers of the bins, and are not trained."""

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(bins, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.data = torch.arange(bins, dtype=torch.float32, device=self.conv.weight.device).view(
            1, -1, 1, 1
        )

    def forward(self, logits: Tensor) -> Tensor:
        """[B, 4·bins, N] to [B, 4, N]: left, top, right, bottom, in cells."""
        batch, channels, points = logits.shape
        bins = logits.view(batch, 4, channels // 4, points).transpose(1, 2)
        return self.conv(bins.softmax(dim=1)).view(batch, 4, points)


class Prototypes(nn.Module):
    """Masks at a quarter of the size, which the coefficients of a detection mix."""

    def __init__(self, inputs: int, sizes: MaskSizes, *, norm: bool) -> None:
        super().__init__()
        self.cv1 = Conv(inputs, sizes.width, 3, norm=norm)
        self.upsample = nn.ConvTranspose2d(sizes.width, sizes.width, 2, 2)
        self.cv2 = Conv(sizes.width, sizes.width, 3, norm=norm)
        self.cv3 = Conv(sizes.width, sizes.prototypes, 1, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(self.cv2(self.upsample(self.cv1(x))))


class Head(nn.Module):
    """Boxes, classes and, for segmentation, coefficients: a branch each for every level."""

    def __init__(self, inputs: Sequence[int], sizes: YOLOv8Sizes) -> None:
        super().__init__()
        norm = sizes.normalised
        self.cv2 = _branches(inputs, sizes.box_width, 4 * sizes.bins, norm=norm)
        self.cv3 = _branches(inputs, sizes.class_width, sizes.classes, norm=norm)
        self.dfl = Distances(sizes.bins)
        self.has_masks = sizes.masks is not None
        if sizes.masks is not None:
            self.proto = Prototypes(inputs[0], sizes.masks, norm=norm)
            self.cv4 = _branches(inputs, sizes.masks.coefficient_width, sizes.masks.prototypes, norm=norm)
        for branch in self.cv3:
            nn.init.constant_(branch[-1].bias, math.log(PRIOR / (1 - PRIOR)))  # type: ignore[index]

    def forward(self, levels: Sequence[Tensor]) -> Raw:
        def each(branches: nn.ModuleList) -> list[Tensor]:
            return [branch(x) for branch, x in zip(branches, levels, strict=True)]

        coefficients, prototypes = (each(self.cv4), self.proto(levels[0])) if self.has_masks else ([], None)
        return Raw(each(self.cv2), each(self.cv3), coefficients, prototypes)


def _branches(inputs: Sequence[int], width: int, outputs: int, *, norm: bool) -> nn.ModuleList:
    return nn.ModuleList(
        nn.Sequential(Conv(n, width, 3, norm=norm), Conv(width, width, 3, norm=norm), nn.Conv2d(width, outputs, 1))
        for n in inputs
    )


class YOLOv8(nn.Module):
    """The network. ``forward`` gives logits, for training; ``decode`` makes boxes and scores of them."""

    def __init__(self, sizes: YOLOv8Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        norm = sizes.normalised
        w = (3, *sizes.widths)
        _, _, _, p3, p4, p5 = w
        layers: dict[int, nn.Module] = {}
        for stage, layer in enumerate(STAGES):
            layers[layer] = Conv(w[stage], w[stage + 1], 3, 2, norm=norm)
        for width, layer, depth in zip(sizes.widths[1:], BACKBONE_BLOCKS, sizes.depths[:4], strict=True):
            layers[layer] = C2f(width, width, depth, shortcut=True, norm=norm)
        layers[POOLING] = SPPF(p5, norm=norm)
        necks = ((p5 + p4, p4), (p4 + p3, p3), (p3 + p4, p4), (p4 + p5, p5))
        for (inputs, outputs), layer, depth in zip(necks, NECK_BLOCKS, sizes.depths[4:], strict=True):
            layers[layer] = C2f(inputs, outputs, depth, shortcut=False, norm=norm)
        for width, layer in zip((p3, p4), NECK_STRIDES, strict=True):
            layers[layer] = Conv(width, width, 3, 2, norm=norm)
        layers[HEAD] = Head((p3, p4, p5), sizes)
        self.model = nn.ModuleList(layers.get(layer, nn.Identity()) for layer in range(HEAD + 1))

    def forward(self, x: Tensor) -> Raw:
        """Pixels [B, 3, H, W] in 0..1, H and W multiples of 32."""
        layer = self.model
        p3 = layer[4](layer[3](layer[2](layer[1](layer[0](x)))))
        p4 = layer[6](layer[5](p3))
        p5 = layer[9](layer[8](layer[7](p4)))
        n4 = layer[12](torch.cat((_doubled(p5), p4), dim=1))
        n3 = layer[15](torch.cat((_doubled(n4), p3), dim=1))
        m4 = layer[18](torch.cat((layer[16](n3), n4), dim=1))
        m5 = layer[21](torch.cat((layer[19](m4), p5), dim=1))
        return layer[HEAD]((n3, m4, m5))

    def decode(self, raw: Raw) -> Tensor:
        """[B, 4 + K + M, N]: centre and size of each box in pixels, scores in 0..1, coefficients as they are."""
        distances = self.model[HEAD].dfl(_joined(raw.boxes))  # type: ignore[operator]
        points, strides = anchor_points([tuple(level.shape[2:]) for level in raw.boxes], distances.device)
        near, far = points - distances[:, :2], points + distances[:, 2:]
        boxes = torch.cat(((near + far) / 2, far - near), dim=1) * strides
        parts = [boxes, _joined(raw.classes).sigmoid()]
        return torch.cat([*parts, _joined(raw.coefficients)] if raw.coefficients else parts, dim=1)


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


def _joined(levels: Sequence[Tensor]) -> Tensor:
    return torch.cat([level.flatten(2) for level in levels], dim=2)


def anchor_points(sizes: Sequence[tuple[int, ...]], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Centres of the cells of all levels, x and y in cells [2, N], and the pixels that a cell has [1, N]."""
    points, strides = [], []
    for (height, width), stride in zip(sizes, STRIDES, strict=True):
        rows, columns = (torch.arange(n, dtype=torch.float32, device=device) + 0.5 for n in (height, width))
        points.append(torch.stack((columns.repeat(height), rows.repeat_interleave(width))))
        strides.append(torch.full((1, height * width), float(stride), device=device))
    return torch.cat(points, dim=1), torch.cat(strides, dim=1)


def fold_norms(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with every batch norm folded into the convolution before it, in float32."""
    folded = {name: tensor.float() for name, tensor in state.items()}
    for name in state:
        prefix, norm, _ = name.rpartition("bn.weight")
        if norm:
            folded.pop(f"{prefix}bn.{COUNTER}", None)
            weight, bias, mean, variance = (
                folded.pop(f"{prefix}bn.{part}") for part in ("weight", "bias", "running_mean", "running_var")
            )
            scale = weight / torch.sqrt(variance + NORM_EPSILON)
            folded[f"{prefix}conv.weight"] = folded[f"{prefix}conv.weight"] * scale.view(-1, 1, 1, 1)
            folded[f"{prefix}conv.bias"] = bias - mean * scale
    return folded


def skeleton(shapes: Mapping[str, tuple[int, ...]]) -> YOLOv8:
    """The network that tensors of these shapes make up, without its numbers (on the meta device).

    Raises:
        UnsupportedCheckpointError: a tensor is missing, left over, or of a shape that does not fit the others.
    """
    empty = next((name for name, shape in shapes.items() if 0 in shape), None)
    if empty is not None:
        raise UnsupportedCheckpointError(f"it is no YOLOv8 network: {empty} has no numbers")
    try:
        with torch.device("meta"):
            network = YOLOv8(YOLOv8Sizes.from_shapes(shapes))
    except (RuntimeError, ValueError, ZeroDivisionError) as error:
        raise UnsupportedCheckpointError(f"it is no YOLOv8 network: {str(error)[:200]}") from None
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    for name in sorted({*expected, *shapes}):
        ours, theirs = expected.get(name), shapes.get(name)
        if ours != theirs and not name.endswith(COUNTER):
            raise UnsupportedCheckpointError(
                f"it is no YOLOv8 network: {name} is {_described(theirs)} where {_described(ours)} is expected"
            )
    return network


def _described(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else f"of the shape {list(shape)}"


def build(state: Mapping[str, Tensor]) -> YOLOv8:
    """The network of a state dict, with its norms folded in, float32, ready to detect.

    Raises:
        UnsupportedCheckpointError: see ``skeleton``.
    """
    sizes = skeleton({name: tuple(tensor.shape) for name, tensor in state.items()}).sizes
    with torch.device("meta"):
        network = YOLOv8(replace(sizes, normalised=False))
    network.load_state_dict(fold_norms(state), assign=True)
    return network.eval().requires_grad_(False)
