"""Where the time of the production job goes at full size: ``python -m benchmarks.full_job``

Random weights as large as the published ones, a random ESRGAN of the usual size, and YOLOv8n networks that look at the
picture while a fixed list says what they found, as random weights find nothing. A GPU is needed. The job is that of the
service: 768x1344, 50 steps, a hires pass of 10, a LoRA, faces, hands.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.fullsize import PATHS, SMALL, Entry, Sizes, scratch_folder, shapes_of, write_model, write_safetensors
from benchmarks.job import STEPS, measure
from benchmarks.lora_swap import write_lora
from benchmarks.observe import engine_of, model_of
from benchmarks.report import publish
from lightweight_engine import GenerationRequest
from lightweight_engine.core.describe import device_name
from lightweight_engine.extensions.detection import Detection, Detector, YOLODetector
from lightweight_engine.extensions.detector_list import Entry as File
from lightweight_engine.extensions.detector_networks import visiting
from lightweight_engine.extensions.detector_place import Place
from lightweight_engine.extensions.detectors import DetectorLibrary
from lightweight_engine.extensions.yolov8 import YOLOv8
from lightweight_engine.extensions.yolov8_sizes import YOLOv8Sizes
from lightweight_engine.upscalers.picture import Picture

UPSCALER = "4x-UltraSharp"
BOXES = {  # in shares of the picture's width and height, with a score
    "face_yolov8n.pt": [((0.40, 0.12, 0.60, 0.26), 0.91)],
    "hand_yolov8n.pt": [((0.20, 0.60, 0.33, 0.70), 0.83), ((0.66, 0.58, 0.80, 0.69), 0.78)],
}


@dataclass(frozen=True, eq=False)
class Listed:
    """A detector that runs its network, and finds what a list says."""

    name: str
    network: YOLODetector
    classes: tuple[str, ...] = ("face",)

    @property
    def nbytes(self) -> int:
        return self.network.nbytes

    def detect(self, picture: Picture, confidence: float, classes: Sequence[str] = ()) -> list[Detection]:
        self.network.detect(picture, confidence, classes)
        scale = (*picture.size, *picture.size)
        rows = ((tuple(s * e for s, e in zip(box, scale, strict=True)), score) for box, score in BOXES[self.name])
        return [Detection(box, score, "face") for box, score in rows]  # type: ignore[arg-type]

    def check_classes(self, classes: Sequence[str]) -> None:
        self.network.check_classes(classes)


class ListedDetectors(DetectorLibrary):
    """Detectors of the published size for the names of the job."""

    def __init__(self, device: torch.device) -> None:
        super().__init__([], device)
        self._made = {name: listed(name, device) for name in BOXES}

    def names(self) -> list[str]:
        return list(BOXES)

    def require(self, name: str) -> File:
        return File(name, Path(name))

    def find(self, name: str) -> Detector:
        return self._made[name]


def listed(name: str, device: torch.device) -> Detector:
    network = YOLOv8(YOLOv8Sizes.scaled(1, depth=1 / 3, width=0.25)).eval()
    return Listed(name, visiting(name, network, ("face",), 640, Place(device)))


def write_upscaler(path: Path, filters: int = 64, blocks: int = 23) -> None:
    """An ESRGAN, of 64 channels and 23 blocks as the published 4x ones are."""
    from spandrel.architectures.ESRGAN.__arch.RRDB import RRDBNet

    torch.manual_seed(1)
    state = RRDBNet(num_filters=filters, num_blocks=blocks, scale=4).state_dict()
    entries = {name: Entry(each.dtype, tuple(each.shape), partial(torch.clone, each)) for name, each in state.items()}
    write_safetensors(path, entries)


def rows_of(folder: Path, storage: str, fields: dict[str, Any]) -> list[dict[str, Any]]:
    """The table of one storage format: the second of two jobs, which differ in their prompt alone.

    As in a service, the text of the prompt is new, and the empty negative one, which the detailer asks for in every
    job, is not.
    """
    paths = {role: folder / path for role, path in PATHS.items()}
    engine, networks = engine_of(model_of(paths, folder), device="auto", storage_dtype=storage, models_dir=folder)
    engine._detectors = ListedDetectors(networks.device)
    first = GenerationRequest(prompt="a person reads on a bench in a park", seed=1, **fields)
    request = first.model_copy(update={"prompt": "a person waves in front of a lighthouse"})
    measure(engine, first)  # networks are read, programs built, algorithms of convolutions chosen
    told = {"storage": storage, "hr_scale": fields["hr_scale"]}
    rows = [{**told, **row} for row in measure(engine, request)]
    steps = sum(row["share"] for row in rows if row["where"] in STEPS)
    engine.close()
    return [
        *rows,
        {**told, "where": "everything but transformer steps", "share": 1 - steps},
        {**told, "where": "the job, x its steps", "share": 1 / steps},
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storages", nargs="*", default=["nf4", "bf16"])
    parser.add_argument(
        "--hr-scales", nargs="*", type=float, default=[1.0, 1.3], help="of the hires pass; 1.0 runs no upscaler"
    )
    parser.add_argument("--quick", action="store_true", help="small networks, on a CPU too: whether it runs")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = SMALL if args.quick else Sizes()
    side: dict[str, Any] = {"width": 128, "height": 128, "steps": 4} if args.quick else {"width": 768, "height": 1344}
    fields = {
        "distilled_cfg_scale": 3.7, "enable_hr": True, "hr_steps": 10, "hr_upscaler": UPSCALER,
        "denoising_strength": 0.3, "adetailer": True, "loras": ("one",), **side,
    }  # fmt: skip
    with scratch_folder() as name:
        folder = Path(name)
        write_model(folder, sizes, device)
        write_upscaler(folder / "ESRGAN" / f"{UPSCALER}.safetensors")
        shapes = shapes_of("transformer", sizes.transformer)
        write_lora(folder / "Lora" / "one.safetensors", shapes, 16, torch.bfloat16, device)
        rows = [
            row
            for storage in args.storages
            for scale in args.hr_scales
            for row in rows_of(folder, storage, {**fields, "hr_scale": scale})
        ]
    publish("full_job_quick" if args.quick else "full_job", rows, device=device_name(device))


if __name__ == "__main__":
    main()
