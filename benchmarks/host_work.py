"""What the host does in the production job, at full picture size: ``python -m benchmarks.host_work``

Networks have the published number of layers and next to no width, so that it runs without a GPU. They are timed apart,
as is what a GPU does itself: levels of pixels, and resampling. Each part is told without the parts inside it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image

from benchmarks.full_job import UPSCALER, ListedDetectors, write_upscaler
from benchmarks.fullsize import PATHS, Sizes, scratch_folder, shapes_of, write_model
from benchmarks.job import NETWORKS
from benchmarks.lora_swap import write_lora
from benchmarks.observe import engine_of, model_of
from benchmarks.report import publish
from lightweight_engine import GenerationRequest, LightweightEngine
from lightweight_engine.backend.devices import keep_freed_memory
from lightweight_engine.core import detailing, engine, images, jobs, networks, processing, replay, start_pictures
from lightweight_engine.extensions.detection import YOLODetector
from lightweight_engine.flux.params import AutoencoderParams, CLIPParams, FluxParams, T5Params
from lightweight_engine.upscalers import upscaler

SIZES = Sizes(
    FluxParams(
        vec_in_dim=64, context_in_dim=96, hidden_size=16, mlp_hidden=16, num_heads=1, axes_dim=(4, 6, 6),
    ),
    T5Params(vocab_size=256, hidden_size=96, num_heads=4, head_dim=24, mlp_hidden=192),
    CLIPParams(vocab_size=256, hidden_size=64, num_heads=2, mlp_hidden=128),
    AutoencoderParams(widths=(32, 32, 32, 32)),
)  # fmt: skip
FEW_STEPS = '{"ad_steps": 4}'
FIELDS: dict[str, Any] = {
    "width": 768, "height": 1344, "steps": 2, "distilled_cfg_scale": 3.7, "enable_hr": True, "hr_steps": 1,
    "hr_scale": 1.3, "hr_upscaler": UPSCALER, "denoising_strength": 0.3, "loras": ("one",), "adetailer": True,
    "adetailer_args": FEW_STEPS, "adetailer_args_hands": FEW_STEPS,
}  # fmt: skip
PARTS: dict[str, tuple[Any, str]] = {
    "planning": (engine, "plan_job"),
    "start pictures": (jobs, "read_start"),
    "pictures of pixels": (processing, "to_images"),
    "put in their place": (start_pictures.StartPictures, "finish"),
    "detection": (YOLODetector, "detect"),
    "masks of detections": (detailing.ADetailer, "find_targets"),
    "text of a picture": (engine, "describe"),
    "versions": (engine, "versions"),
    "saving": (replay, "save_result"),
}
"""What is timed: an owner and its function."""
ELSEWHERE: dict[str, tuple[Any, str]] = {
    "encoding pixels": (processing, "start_of"),
    "decoding": (processing, "decode_latent"),
    "enlarging": (processing, "hires_start"),
    "sampling": (processing, "walk"),
    "resampling": (Image.Image, "resize"),
    "resampling of levels": (upscaler, "resample_levels"),
    "levels of pixels": (images, "to_uint8"),
    **{f"{name}, {owner.__name__}": (owner, method) for name, owner, method in NETWORKS},
}
"""What a GPU does, or waits for."""


@dataclass
class Part:
    """What a part took, without the parts inside it."""

    calls: int = 0
    seconds: float = 0.0


@dataclass
class Watch:
    parts: dict[str, Part] = field(default_factory=dict)
    inside: list[float] = field(default_factory=list)
    """Seconds of the parts inside each of those that run."""

    def timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.inside.append(0.0)
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                took = time.perf_counter() - start
                part = self.parts.setdefault(name, Part())
                part.calls += 1
                part.seconds += took - self.inside.pop()
                if self.inside:
                    self.inside[-1] += took

        return call


@contextmanager
def watched() -> Iterator[Watch]:
    watch = Watch()
    with ExitStack() as stack:
        for name, (owner, method) in (PARTS | ELSEWHERE).items():
            timed = watch.timed(name, getattr(owner, method))
            stack.enter_context(mock.patch.object(owner, method, timed))
        yield watch


@contextmanager
def as_beside_a_gpu() -> Iterator[None]:
    """What is freed is kept, as the host does where a GPU has the memory that counts."""
    with (
        mock.patch.object(networks, "return_freed_memory", keep_freed_memory),
        mock.patch.object(networks, "trim_heap", lambda: None),
    ):
        yield


def measure(drawer: LightweightEngine, request: GenerationRequest) -> dict[str, Part]:
    with tempfile.TemporaryDirectory() as folder, watched() as watch:
        start = time.perf_counter()
        replay.save_result(drawer.run(request), Path(folder))
        total = time.perf_counter() - start
    parts = {name: watch.parts.get(name, Part()) for name in PARTS}
    parts["between these"] = Part(1, total - sum(part.seconds for part in watch.parts.values()))
    return parts


def rows_of(runs: Sequence[dict[str, Part]]) -> list[dict[str, Any]]:
    """The least that each part took in some runs: what else the machine did is in the others."""
    least = {name: min((run[name] for run in runs), key=lambda part: part.seconds) for name in runs[0]}
    rows = [{"part": name, "ms": 1e3 * part.seconds, "calls": part.calls} for name, part in least.items()]
    return [*rows, {"part": "all of it", "ms": sum(row["ms"] for row in rows)}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    device = torch.device("cpu")
    with scratch_folder() as name, as_beside_a_gpu():
        folder = Path(name)
        write_model(folder, SIZES, device)
        write_upscaler(folder / "ESRGAN" / f"{UPSCALER}.safetensors", filters=8, blocks=1)
        shapes = shapes_of("transformer", SIZES.transformer)
        write_lora(folder / "Lora" / "one.safetensors", shapes, 16, torch.bfloat16, device)
        paths = {role: folder / path for role, path in PATHS.items()}
        drawer, _ = engine_of(model_of(paths, folder), device="cpu", models_dir=folder)
        drawer._detectors = ListedDetectors(device)
        request = GenerationRequest(prompt="a person waves in front of a lighthouse", seed=1, **FIELDS)
        drawer.run(request)  # files are read, caches filled
        runs = [measure(drawer, request) for _ in range(args.runs)]
        publish("host_work", rows_of(runs), runs=args.runs)


if __name__ == "__main__":
    main()
