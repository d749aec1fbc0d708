"""From a picture to what a YOLO network sees, and from its output to boxes and masks on the picture.

Boxes are x1, y1, x2, y2 in pixels. Pixels are uint8 [H, W, 3], RGB. Resizing gives the bytes of OpenCV's
``INTER_LINEAR`` (fixed point, 11 bits), which the reference detects on.

Source: pipelines.md §d; the arithmetic of OpenCV's resize (Apache-2.0).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

STRIDE = 32
PAD_LEVEL = 114
OVERLAP = 0.7  # of two boxes of one class, above which the weaker is dropped
MOST = 300
MOST_CANDIDATES = 30_000
CLASS_OFFSET = 7680  # moves the boxes of each class apart, so that only those of one class meet
COEFFICIENT_BITS = 11
AT_ONCE = 16  # masks


@dataclass(frozen=True)
class Letterbox:
    """Where a picture lies in the rectangle that a network sees.

    Attributes:
        source, resized: width and height of the picture, and of it inside the rectangle.
        left, top: the border before it.
        size: width and height of the rectangle, multiples of ``STRIDE``.
    """

    source: tuple[int, int]
    resized: tuple[int, int]
    left: int
    top: int
    size: tuple[int, int]

    @classmethod
    def of(cls, width: int, height: int, longest: int) -> Letterbox:
        """The smallest rectangle around a picture whose longer side is made ``longest`` pixels."""
        longest = max(math.ceil(longest / STRIDE), 1) * STRIDE
        ratio = min(longest / height, longest / width)
        resized = (max(round(width * ratio), 1), max(round(height * ratio), 1))
        borders = [(longest - side) % STRIDE for side in resized]
        left, top = (round(border / 2 - 0.1) for border in borders)
        return cls((width, height), resized, left, top, (resized[0] + borders[0], resized[1] + borders[1]))

    def apply(self, pixels: Tensor) -> Tensor:
        """Resize a picture [H, W, 3] and put it into the rectangle, on its device."""
        width, height = self.size
        boxed = pixels.new_full((height, width, 3), PAD_LEVEL)
        inner = pixels if self.resized == self.source else resize_linear(pixels, *self.resized)
        boxed[self.top : self.top + self.resized[1], self.left : self.left + self.resized[0]] = inner
        return boxed

    def restore(self, boxes: Tensor) -> Tensor:
        """Boxes [n, 4] in the rectangle as boxes on the picture, cut at its edges."""
        borders = boxes.new_tensor((self.left, self.top)).repeat(2)
        gains = boxes.new_tensor([new / old for new, old in zip(self.resized, self.source, strict=True)]).repeat(2)
        return ((boxes - borders) / gains).clamp(min=0).minimum(boxes.new_tensor(self.source).repeat(2))


def resize_linear(pixels: Tensor, width: int, height: int) -> Tensor:
    """Resize [H, W, C] as OpenCV's ``INTER_LINEAR`` does, to the byte: columns first, in whole numbers."""
    if pixels.shape[0] == 2 * height and pixels.shape[1] == 2 * width:  # OpenCV averages where both sides halve
        quads = pixels.reshape(height, 2, width, 2, -1).sum((1, 3), dtype=torch.int32)
        return ((quads + 2) >> 2).byte()
    device = pixels.device
    x0, x1, xa, xb = (torch.from_numpy(each).to(device) for each in _taps(pixels.shape[1], width, clamp=True))
    y0, y1, ya, yb = (torch.from_numpy(each).to(device) for each in _taps(pixels.shape[0], height, clamp=False))

    def across(rows: Tensor) -> Tensor:
        wide = pixels.index_select(0, rows).int()
        return (wide.index_select(1, x0) * xa[:, None] + wide.index_select(1, x1) * xb[:, None]) >> 4

    upper, lower = (across(y0) * ya[:, None, None]) >> 16, (across(y1) * yb[:, None, None]) >> 16
    return ((upper + lower + 2) >> 2).byte()


def _taps(old: int, new: int, *, clamp: bool) -> tuple[NDArray[np.int32], ...]:
    """For each new place the two old ones that it lies between, and their weights, of 2 ** COEFFICIENT_BITS."""
    place = ((np.arange(new) + 0.5) * (1 / (new / old)) - 0.5).astype(np.float32)
    first = np.floor(place).astype(np.int32)
    part = place - first.astype(np.float32)
    if clamp:
        part = np.where((first < 0) | (first >= old - 1), np.float32(0), part)
    scale = np.float32(1 << COEFFICIENT_BITS)
    weights = (np.rint(side * scale).astype(np.int32) for side in (np.float32(1) - part, part))
    return (np.clip(first, 0, old - 1), np.clip(first + 1, 0, old - 1), *weights)


class Found(NamedTuple):
    """Detections in order of their scores: boxes [n, 4], scores [n], classes [n], coefficients [n, M]."""

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    coefficients: Tensor


def select(decoded: Tensor, classes: int, confidence: float, wanted: list[int] | None = None) -> Found:
    """The boxes that stand out: best class above ``confidence``, no two of a class on one spot, at most ``MOST``.

    Args:
        decoded: [4 + K + M, N], as ``YOLOv8.decode`` gives it for a picture.
        classes: K.
        wanted: only these classes; None is all.
    """
    scores, best = decoded[4 : 4 + classes].max(dim=0)
    keep = scores > confidence
    if wanted is not None:
        keep &= torch.isin(best, torch.tensor(wanted, dtype=best.dtype, device=best.device))
    order = torch.argsort(scores[keep], descending=True, stable=True)[:MOST_CANDIDATES]
    chosen = keep.nonzero()[:, 0][order]
    centre, half = decoded[:2, chosen].T, decoded[2:4, chosen].T / 2
    boxes, kinds = torch.cat((centre - half, centre + half), dim=1), best[chosen]
    kept = suppress(boxes + kinds[:, None] * CLASS_OFFSET)
    return Found(boxes[kept], scores[chosen][kept], kinds[kept], decoded[4 + classes :, chosen].T[kept])


def suppress(boxes: Tensor) -> Tensor:
    """Which boxes [n, 4], strongest first, are left once each has removed the weaker ones that it mostly covers."""
    left = torch.arange(len(boxes), device=boxes.device)
    kept = []
    while len(left) and len(kept) < MOST:
        kept.append(left[0])
        overlap = _overlaps(boxes[left[0]], boxes[left])
        overlap[0] = 1
        left = left[overlap <= OVERLAP]
    return torch.stack(kept) if kept else left


def _overlaps(box: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of a box with others [n, 4]."""
    inner = (torch.minimum(box[2:], others[:, 2:]) - torch.maximum(box[:2], others[:, :2])).clamp(min=0).prod(dim=1)
    areas = (others[:, 2:] - others[:, :2]).prod(dim=1)
    union = areas + (box[2:] - box[:2]).prod() - inner
    return torch.where(union > 0, inner / union, torch.zeros_like(union))


def masks_of(found: Found, prototypes: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks of detections in the rectangle: bool [n, height, width], on the host.

    Args:
        prototypes: [M, height / 4, width / 4].
        size: width and height of the rectangle.
    """
    width, height = size
    x, y = torch.arange(width)[None, None], torch.arange(height)[None, :, None]
    masks = [torch.zeros(0, height, width, dtype=torch.bool)]
    # A few at once: three hundred at full size would take half a gigabyte.
    for boxes, coefficients in zip(found.boxes.split(AT_ONCE), found.coefficients.split(AT_ONCE), strict=True):
        if len(boxes):
            small = torch.einsum("nm,mhw->nhw", coefficients, prototypes)
            large = F.interpolate(small[None], (height, width), mode="bilinear", align_corners=False)[0]
            x1, y1, x2, y2 = boxes[:, :, None, None].unbind(dim=1)
            masks.append((large > 0) & (x >= x1) & (x < x2) & (y >= y1) & (y < y2))
    return torch.cat(masks)
