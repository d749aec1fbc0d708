"""Detection by a trained YOLOv8: what the network sees, what it answers, and the boxes on the picture."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import torch
from goldens import Case, golden_dir
from PIL import Image

from lightweight_engine.backend.checkpoint import open_checkpoint
from lightweight_engine.extensions.boxes import OVERLAP, Letterbox
from lightweight_engine.extensions.detection import YOLODetector
from lightweight_engine.extensions.detector_files import DetectorFile
from lightweight_engine.extensions.detector_networks import open_yolov8


@cache
def detectors() -> tuple[YOLODetector, ...]:
    """All networks of the data; a case does not say which of them it is of."""
    found = []
    for path in sorted((golden_dir() / "pipelines" / "models_yolo").glob("*.safetensors")):
        about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        names = tuple(about["names"][str(number)] for number in range(len(about["names"])))
        found.append(open_yolov8(path.stem, DetectorFile(open_checkpoint(path), names, about["train_imgsz"])))
    return tuple(found)


def check(case: Case) -> None:
    image = Image.fromarray(case.array(f"img_{case.id}"))
    boxed = Letterbox.of(*image.size, case["imgsz"]).apply(torch.from_numpy(np.array(image)))
    assert list(boxed.shape[:2]) == case["net_hw"]
    assert np.array_equal(boxed.permute(2, 0, 1), case.array(f"letterbox_{case.id}"))
    assert case["iou"] == OVERLAP
    raw = torch.from_numpy(case.array(f"raw_{case.id}"))
    detector = next(each for each in detectors() if 4 + len(each.classes) == raw.shape[1])
    with torch.inference_mode():
        decoded, _ = detector.network(boxed.permute(2, 0, 1)[None] / 255)
    torch.testing.assert_close(decoded[None], raw, rtol=0, atol=1e-3)
    detector.image_size = case["imgsz"]
    found = detector.detect(image, case["conf"])
    assert [detector.classes.index(each.label) for each in found] == case["cls"]
    np.testing.assert_allclose([each.score for each in found], case["scores"], rtol=0, atol=1e-3)
    np.testing.assert_allclose([each.box for each in found], case["boxes"], rtol=0, atol=0.05)
