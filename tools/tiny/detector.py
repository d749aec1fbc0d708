"""The detectors of faces and hands: sizes of their network, their files, and how their loss assigns points to boxes.

Sources: Feng et al., "TOOD: Task-aligned One-stage Object Detection" (2021), sections 3.2 and 3.3; Li et al.,
"Generalized Focal Loss" (2020), section 3.2, for boxes as distributions; Zheng et al., "Distance-IoU Loss" (2020),
section 3.3, for CIoU. Letters: B pictures, G boxes of a picture, N anchor points of all levels.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightweight_engine.extensions.yolov8 import Raw, YOLOv8, anchor_points
from lightweight_engine.extensions.yolov8_sizes import BINS, YOLOv8Sizes

SIDE = 320
"""Pixels of the square that pictures are fitted into."""

SIZES = YOLOv8Sizes(
    widths=(16, 24, 32, 64, 96), depths=(1, 1, 1, 1, 1, 1, 1, 1), classes=1, box_width=32, class_width=24
)

TOP = 10  # points that a box is assigned to
SCORE_POWER, OVERLAP_POWER = 1.0, 6.0  # alpha and beta of TOOD
BOX_WEIGHT, BINS_WEIGHT = 4.0, 0.5
TINY_NUMBER = 1e-7


def path_of(kind: str, root: Path) -> Path:
    return root / "adetailer" / f"{kind}_tiny.safetensors"


def save_detector(network: YOLOv8, kind: str, root: Path) -> Path:
    """Write a detector in float16, in the layout of published files, with its class and size in the metadata."""
    path = path_of(kind, root)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu() for name, value in network.state_dict().items()}
    tensors = {name: (v.half() if v.is_floating_point() else v).contiguous() for name, v in tensors.items()}
    metadata = {
        "architecture": "yolov8",
        "task": "detect",
        "names": json.dumps({"0": kind}),
        "imgsz": str(SIDE),
        "description": f"tiny: finds the {kind}s of drawn people; trained on drawings made by a program",
        "license": "Apache-2.0",
    }
    save_file(tensors, path, metadata)
    return path


def load_detector(kind: str, root: Path) -> YOLOv8:
    """A saved detector, to be trained further."""
    network, weights = YOLOv8(SIZES), load_file(path_of(kind, root))
    network.load_state_dict({name: v.float() if v.is_floating_point() else v for name, v in weights.items()})
    return network


# --- boxes -------------------------------------------------------------------------------------------------------


def overlaps(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes ``[..., 4]`` (left, top, right, bottom) that broadcast."""
    sides = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    inside = sides.clamp(min=0).prod(-1)
    areas = [(box[..., 2:] - box[..., :2]).clamp(min=0).prod(-1) for box in (a, b)]
    return inside / (areas[0] + areas[1] - inside + TINY_NUMBER)


def complete_overlaps(a: Tensor, b: Tensor) -> Tensor:
    """CIoU: the overlap, less the distance of centres and the difference of proportions."""
    plain = overlaps(a, b)
    around = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    apart = (a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]) / 2
    distance = apart.square().sum(-1) / (around.square().sum(-1) + TINY_NUMBER)
    slants = [torch.atan2(*(box[..., 2:] - box[..., :2]).clamp(min=TINY_NUMBER).unbind(-1)) for box in (a, b)]
    shape = 4 / math.pi**2 * (slants[0] - slants[1]).square()
    with torch.no_grad():
        weight = shape / (1 - plain + shape + TINY_NUMBER)
    return plain - distance - weight * shape


# --- assignment and loss -----------------------------------------------------------------------------------------


class Assigned(NamedTuple):
    """What each point shall say: its box ``[B, N, 4]``, and the score ``[B, N]``, 0 where there is none."""

    boxes: Tensor
    scores: Tensor


@torch.no_grad()
def assign(scores: Tensor, boxes: Tensor, points: Tensor, truth: Tensor, present: Tensor) -> Assigned:
    """Task-aligned assignment: the points inside a box that agree with it best, by score and overlap together.

    Args:
        scores: probabilities ``[B, N]``.
        boxes: predicted, ``[B, N, 4]`` in pixels.
        points: ``[N, 2]`` in pixels.
        truth: ``[B, G, 4]``.
        present: ``[B, G]``, False for rows that fill up.
    """
    overlap = overlaps(truth[:, :, None], boxes[:, None])  # [B, G, N]
    inside = ((points > truth[:, :, None, :2]) & (points < truth[:, :, None, 2:])).all(-1) & present[..., None]
    alignment = scores[:, None] ** SCORE_POWER * overlap**OVERLAP_POWER * inside
    least = alignment.topk(TOP, dim=-1).values[..., -1:]
    chosen = inside & (alignment >= least) & (alignment > 0)
    rivals = torch.where(chosen, overlap, -1.0)
    chosen &= rivals == rivals.amax(1, keepdim=True)  # a point has one box: where several want it, the nearest
    best, at = (chosen * alignment).amax(-1, keepdim=True), (chosen * overlap).amax(-1, keepdim=True)
    wanted = (chosen * alignment / (best + TINY_NUMBER) * at).float()  # [B, G, N]
    score, owner = wanted.max(1)
    return Assigned(truth.gather(1, owner[..., None].expand(-1, -1, 4)), score)


def loss_of(network: YOLOv8, raw: Raw, truth: Tensor, present: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch, and its parts; ``truth`` and ``present`` as in ``assign``."""
    raw = Raw([x.float() for x in raw.boxes], [x.float() for x in raw.classes], [], None)
    centres, strides = anchor_points([tuple(x.shape[2:]) for x in raw.boxes], truth.device)
    points, strides = centres.T, strides[0]
    logits = torch.cat([x.flatten(2) for x in raw.classes], dim=2)[:, 0]
    decoded = network.decode(raw)[:, :4].transpose(1, 2)
    boxes = torch.cat((decoded[..., :2] - decoded[..., 2:] / 2, decoded[..., :2] + decoded[..., 2:] / 2), dim=-1)
    wanted = assign(logits.detach().sigmoid(), boxes.detach(), points * strides[:, None], truth, present)
    total = wanted.scores.sum().clamp(min=1)
    classes = F.binary_cross_entropy_with_logits(logits, wanted.scores, reduction="sum") / total
    hits = wanted.scores > 0
    weight = wanted.scores[hits]
    box = (weight * (1 - complete_overlaps(boxes[hits], wanted.boxes[hits]))).sum() / total
    bins = torch.cat([x.flatten(2) for x in raw.boxes], dim=2).transpose(1, 2)[hits]
    distribution = (weight * bins_loss(bins, _distances(wanted.boxes, points, strides)[hits])).sum() / total
    parts = {"classes": classes, "box": box, "bins": distribution}
    return classes + BOX_WEIGHT * box + BINS_WEIGHT * distribution, parts


def _distances(boxes: Tensor, points: Tensor, strides: Tensor) -> Tensor:
    """From points ``[N, 2]`` to the sides of boxes ``[B, N, 4]``, in cells."""
    boxes = boxes / strides[:, None]
    return torch.cat((points - boxes[..., :2], boxes[..., 2:] - points), dim=-1)


def bins_loss(logits: Tensor, distances: Tensor) -> Tensor:
    """Cross entropy with the two bins about each distance: ``[M, 4 * BINS]`` and ``[M, 4]`` to ``[M]``."""
    distances = distances.clamp(0, BINS - 1.01)
    low = distances.long()
    share = distances - low
    chances = logits.view(-1, 4, BINS).log_softmax(-1)
    below, above = (chances.gather(-1, bin[..., None])[..., 0] for bin in (low, low + 1))
    return -((1 - share) * below + share * above).mean(-1)
