"""Which detections are left after each filter, and in which order."""

from __future__ import annotations

from goldens import Case

from lightweight_engine.extensions.detailer_masks import area, in_order, top, within_ratio


def check(case: Case) -> None:
    size, boxes = tuple(case["image"]), [tuple(box) for box in case["bboxes"]]
    left = within_ratio(boxes, size, case["min_ratio"], case["max_ratio"])
    assert left == case["after_ratio"]
    values = [area(boxes[number]) if case["by"] == "Area" else case["confidences"][number] for number in left]
    left = [left[place] for place in top(values, case["k"])]
    assert left == case["after_topk"]
    left = [left[place] for place in in_order([boxes[number] for number in left], size, case["sort"])]
    assert left == case["after_sort"]
