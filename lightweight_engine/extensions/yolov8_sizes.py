"""Sizes of a YOLOv8 network: read from the shapes of its tensors, or computed by the published rules. Loads no torch.

Source: the layer list that published files carry beside their weights, and pipelines.md §d.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import UnsupportedCheckpointError

BINS = 16  # of the distribution of one side of a box
WORKSPACE = 640 << 20
"""Bytes that cuDNN takes for a convolution of float32 at most: 535 MiB were seen on an H200, of a small network."""

# Layers by their place in the list.
STAGES = (0, 1, 3, 5, 7)  # halve the size
BACKBONE_BLOCKS = (2, 4, 6, 8)
POOLING = 9
NECK_BLOCKS = (12, 15, 18, 21)
NECK_STRIDES = (16, 19)
HEAD = 22

# Width of each stage and repeats of each block before scaling, and the published scales: depth, width, widest stage.
BASE_WIDTHS = (64, 128, 256, 512, 1024)
BASE_DEPTHS = (3, 6, 6, 3, 3, 3, 3, 3)
SCALES = {
    "n": (1 / 3, 0.25, 1024),
    "s": (1 / 3, 0.5, 1024),
    "m": (2 / 3, 0.75, 768),
    "l": (1.0, 1.0, 512),
    "x": (1.0, 1.25, 512),
}


@dataclass(frozen=True)
class MaskSizes:
    """Sizes of the segmentation parts: prototypes M, width of their layers, width of the coefficients' layers."""

    prototypes: int = 32
    width: int = 256
    coefficient_width: int = 32


@dataclass(frozen=True)
class YOLOv8Sizes:
    """What shapes tell of a network.

    Attributes:
        widths: channels of the five stages.
        depths: repeats of the four blocks of the backbone, then of the neck.
        box_width, class_width: channels inside the two branches of the head.
        masks: None for a network that only detects.
        normalised: batch norms stand beside the convolutions; False where they were folded into them.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    classes: int
    box_width: int
    class_width: int
    bins: int = BINS
    masks: MaskSizes | None = None
    normalised: bool = True

    @classmethod
    def scaled(
        cls, classes: int, *, depth: float, width: float, widest: int = 1024, segmentation: bool = False
    ) -> YOLOv8Sizes:
        """The sizes that the published rules give for a scale, as for ``SCALES`` or narrower."""
        widths = tuple(math.ceil(min(base, widest) * width / 8) * 8 for base in BASE_WIDTHS)
        prototypes = MaskSizes.prototypes
        return cls(
            widths=widths,
            depths=tuple(max(round(base * depth), 1) for base in BASE_DEPTHS),
            classes=classes,
            box_width=max(16, widths[2] // 4, 4 * BINS),
            class_width=max(widths[2], min(classes, 100)),
            masks=MaskSizes(prototypes, widths[2], max(widths[2] // 4, prototypes)) if segmentation else None,
        )

    def room(self, size: tuple[int, int]) -> int:
        """Bytes that the network works in on a GPU at most, weights apart, at a (width, height) and in float32.

        Of the maps those of the first block take most, all links of its chain being there beside what joins them, or
        those that prototypes of masks are made of. Others that stay meanwhile are an eighth as large.
        """
        first, second = self.widths[:2]
        links = (2 + self.depths[0]) * second // 2
        prototypes = self.masks.width if self.masks else 0
        channels = max(3 + first / 2, (2 * links + 3 * second) / 16, 4 * prototypes / 16)
        return int(1.125 * 4 * size[0] * size[1] * channels) + WORKSPACE

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> YOLOv8Sizes:
        """
        Raises:
            UnsupportedCheckpointError: these are not the tensors of a YOLOv8 network; says the first that is missing.
        """
        head = f"model.{HEAD}"
        try:
            return cls(
                widths=tuple(shapes[f"model.{layer}.conv.weight"][0] for layer in STAGES),
                depths=tuple(_repeats(shapes, layer) for layer in (*BACKBONE_BLOCKS, *NECK_BLOCKS)),
                classes=shapes[f"{head}.cv3.0.2.weight"][0],
                box_width=shapes[f"{head}.cv2.0.0.conv.weight"][0],
                class_width=shapes[f"{head}.cv3.0.0.conv.weight"][0],
                bins=shapes[f"{head}.dfl.conv.weight"][1],
                masks=_mask_sizes(shapes, head),
                normalised="model.0.bn.weight" in shapes,
            )
        except KeyError as error:
            raise UnsupportedCheckpointError(f"it is no YOLOv8 network: it has no tensor {error}") from None
        except IndexError:
            raise UnsupportedCheckpointError("it is no YOLOv8 network: a tensor has too few dimensions") from None


def _repeats(shapes: Mapping[str, tuple[int, ...]], layer: int) -> int:
    return next(n for n in range(len(shapes) + 1) if f"model.{layer}.m.{n}.cv1.conv.weight" not in shapes)


def _mask_sizes(shapes: Mapping[str, tuple[int, ...]], head: str) -> MaskSizes | None:
    if f"{head}.proto.cv3.conv.weight" not in shapes:
        return None
    prototypes, width = shapes[f"{head}.proto.cv3.conv.weight"][:2]
    return MaskSizes(prototypes, width, shapes[f"{head}.cv4.0.0.conv.weight"][0])
