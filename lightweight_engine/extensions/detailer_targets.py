"""What a pass paints of what a detector found: which detections, in which order, and their masks.

Source: pipelines.md §d.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from ..labels import Compat
from .detailer_args import ADetailerArgs
from .detailer_masks import BoxF, Order, Size, area, box_mask, dilate_erode, in_order, merge, offset, top, within_ratio
from .detection import Detection


@dataclass(frozen=True, eq=False)
class Target:
    """A mask, and the box that its strength and size follow."""

    box: BoxF
    mask: Image.Image


def targets_of(
    found: Sequence[Detection], args: ADetailerArgs, size: Size, order: Order, compat: Compat = "fixed"
) -> list[Target]:
    """The masks of a pass, in the order in which they are painted.

    Args:
        size: of the picture.
    """
    left = chosen(found, args, size, order)
    return changed([Target(each.box, each.mask or box_mask(each.box, size)) for each in left], args, compat)


def chosen(found: Sequence[Detection], args: ADetailerArgs, size: Size, order: Order) -> list[Detection]:
    """Detections of the right share of the picture, of these the top k, in order."""
    boxes = [each.box for each in found]
    left = [found[n] for n in within_ratio(boxes, size, args.ad_mask_min_ratio, args.ad_mask_max_ratio)]
    by_area = args.ad_mask_filter_method == "Area"
    left = [left[n] for n in top([area(each.box) if by_area else each.score for each in left], args.ad_mask_k)]
    return [left[n] for n in in_order([each.box for each in left], size, order)]


def changed(targets: Sequence[Target], args: ADetailerArgs, compat: Compat = "fixed") -> list[Target]:
    """Targets with their masks moved, grown or shrunk, and merged. What has nothing left of its mask is dropped.

    With "forge" boxes are not dropped with their masks nor merged, so that a mask may have the box of another.
    """
    boxes = [target.box for target in targets]
    left = [Target(each.box, _reshaped(each.mask, args, compat)) for each in targets]
    if args.ad_dilate_erode or compat != "forge":
        left = [each for each in left if each.mask.getbbox()]
    if compat == "forge":
        masks = merge([each.mask for each in left], args.ad_mask_merge_invert)
        return [Target(box, mask) for box, mask in zip(boxes, masks, strict=False)]
    if args.ad_mask_merge_invert == "None":
        return left
    merged = merge([each.mask for each in left], args.ad_mask_merge_invert)
    return [Target(box, mask) for mask in merged if (box := mask.getbbox())]


def _reshaped(mask: Image.Image, args: ADetailerArgs, compat: Compat) -> Image.Image:
    if args.ad_x_offset or args.ad_y_offset:
        mask = offset(mask, args.ad_x_offset, args.ad_y_offset, compat)
    return dilate_erode(mask, args.ad_dilate_erode)


def drawn(image: Image.Image, found: Sequence[Detection], targets: Sequence[Target]) -> Image.Image:
    """A picture with what was found on it: masks tinted, boxes with name and score."""
    tinted = image.convert("RGB")
    for target in targets:
        half = target.mask.point([level // 2 for level in range(256)])
        tinted.paste(Image.new("RGB", image.size, "red"), mask=half)
    pen = ImageDraw.Draw(tinted)
    for each in found:
        pen.rectangle(each.box, outline="lime", width=max(min(image.size) // 256, 1))
        pen.text((each.box[0] + 3, each.box[1] + 2), f"{each.label} {each.score:.2f}", fill="lime")
    return tinted
