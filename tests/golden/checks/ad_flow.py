"""The whole detailer with the detector and the painter of the data: what is detected and painted, and with what.

The painter adds 1 to the red of the first pixel, so that the picture shows which mask was painted on which picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from goldens import Case
from PIL import Image

from lightweight_engine.errors import ModelNotFoundError
from lightweight_engine.extensions.adetailer import ADetailer, DetailerOptions, Outer, Repaint
from lightweight_engine.extensions.detailer_args import read_passes
from lightweight_engine.extensions.detailer_infotext import detailer_infotext
from lightweight_engine.extensions.detection import Detection
from lightweight_engine.extensions.detectors import DetectorLibrary
from lightweight_engine.upscalers.picture import Picture

START = (10, 20, 30)
JOB = {"steps": 20, "cfg_scale": 1.0, "distilled_cfg_scale": 2.2, "sampler_name": "Euler", "scheduler": "Simple"}
JOB |= {"prompt": "main", "negative_prompt": "neg", "seed": 100, "width": 512, "height": 640, "styles": []}

# Options of the reference, and ours.
OPTIONS = {
    "ad_bbox_sortby": "order",
    "ad_dynamic_denoise_power": "dynamic_denoise_power",
    "ad_match_inpaint_bbox_size": "match_size",
    "ad_same_seed_for_each_tab": "same_seed",
}


def first_pixel(image: Image.Image) -> list[int]:
    return np.asarray(image)[0, 0].tolist()


class Recorder:
    """Detectors that see what the data says, and a painter; both write down what they were asked."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.events: list[dict[str, Any]] = []
        self.painted = 0

    def find(self, name: str) -> Recorded:
        if name not in ("face_yolov8n.pt", "hand_yolov8n.pt", *self.case["detections"]):
            DetectorLibrary([]).find(name)
        return Recorded(self, name)

    def paint(self, job: Repaint) -> Image.Image | None:
        self.painted += 1
        if self.painted == self.case.get("interrupt_at"):
            return None
        self.events.append(self._event(job))
        result = job.image.copy()
        red, green, blue = first_pixel(result)
        result.putpixel((0, 0), (red + 1, green, blue))
        return result

    def _event(self, job: Repaint) -> dict[str, Any]:
        box = job.mask.getbbox()
        return {
            "event": "inpaint",
            "prompt": job.prompt,
            "negative": job.negative_prompt,
            "seed": job.seed,
            "subseed": job.subseed,
            "denoising_strength": pytest.approx(job.denoising_strength, rel=1e-9),
            "width": job.size[0],
            "height": job.size[1],
            "steps": job.steps,
            "cfg_scale": job.cfg_scale,
            "distilled_cfg_scale": job.distilled_cfg_scale,
            "sampler": job.sampler,
            "scheduler": job.scheduler,
            "mask_blur": job.mask_blur,
            "full_res": job.only_masked,
            "padding": job.padding,
            "noise_mult": 1.0 if job.noise_multiplier is None else job.noise_multiplier,
            "mask_bbox": list(box) if box else None,
            "mask_nonzero": int(np.count_nonzero(np.asarray(job.mask))),
            "init_px": first_pixel(job.image),
            "init_size": list(job.image.size),
        }


class Recorded:
    classes = ()
    nbytes = 0

    def __init__(self, recorder: Recorder, name: str) -> None:
        self.recorder, self.name = recorder, name

    def detect(self, picture: Picture, confidence: float, classes: Sequence[str] = ()) -> list[Detection]:
        image = picture.image
        event = {
            "event": "detect",
            "confidence": confidence,
            "classes": ",".join(classes),
            "image_size": list(image.size),
            "image_mode": image.mode,
            "image_px": first_pixel(image),
        }
        self.recorder.events.append(event)
        rows = self.recorder.case["detections"].get(self.name, [])
        return [Detection(tuple(row["bbox"]), row["conf"], "thing") for row in rows]

    def check_classes(self, classes: Sequence[str]) -> None:
        pass


def check(case: Case) -> None:
    expected = case["result"]
    recorder = Recorder(case)
    ours = {OPTIONS[name]: value for name, value in case.get("opts", {}).items()}
    detailer = ADetailer(recorder, DetailerOptions(**ours, compat="forge"))
    image = Image.new("RGB", tuple(case["image"]), START)
    passes = read_passes(case["args"], "forge")
    if expected["error"]:
        with pytest.raises(ModelNotFoundError, match=passes.active[0].ad_model):
            detailer.detail(image, passes, _outer(case), recorder.paint)
        return
    result = detailer.detail(image, passes, _outer(case), recorder.paint)
    assert bool(passes.active) == expected["enabled"]
    assert result.is_changed == expected["processed"]
    infotext = expected["extra_params"] or {}
    found = detailer_infotext(passes)
    assert found == infotext and list(found) == list(infotext)
    assert first_pixel(result.image) == expected["final_px"]
    assert recorder.events == [_ours(event, recorder) for event in expected["events"]]


def _ours(event: dict[str, Any], recorder: Recorder) -> dict[str, Any]:
    """An event without what is the same in all of them, because ours has no choice there."""
    if event["event"] == "detect":
        return {name: value for name, value in event.items() if name != "model"}
    settled = {"fill": 1, "invert": 0, "resize_mode": 0, "batch_size": 1, "n_iter": 1}
    settled |= {"override_settings": {}, "restore_faces": False}
    assert {name: event[name] for name in settled} == settled
    assert event["styles"] == recorder.case.get("p", {}).get("styles", [])
    return {name: value for name, value in event.items() if name not in (*settled, "styles")}


def _outer(case: Case) -> Outer:
    job = JOB | case.get("p", {})
    count = case.get("n", 1)
    return Outer(
        prompts=tuple(f"{job['prompt']}#{number}" for number in range(count)),
        negative_prompts=(job["negative_prompt"],) * count,
        seeds=tuple(job["seed"] + number for number in range(count)),
        subseeds=tuple(900 + number for number in range(count)),
        size=(job["width"], job["height"]),
        steps=job["steps"],
        cfg_scale=job["cfg_scale"],
        distilled_cfg_scale=job["distilled_cfg_scale"],
        sampler=job["sampler_name"],
        scheduler=job["scheduler"],
        index=case.get("iteration", 0) * case.get("batch_size", 1) + case.get("batch_index", 0),
    )
