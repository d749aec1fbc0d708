"""Where the time of a production job goes: text, passes, decoding, enlarging, detector, details, saving.

    python -m benchmarks.job

The demonstration model draws the job of the production service with a LoRA. Every outermost call of a network is timed,
by whatever it is; what is left of the job is time outside all networks.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.report import publish
from lightweight_engine import Config, GenerationRequest, LightweightEngine
from lightweight_engine.apps.demo import JOB, PRODUCTION
from lightweight_engine.core.replay import save_result

# Class of an outermost module -> what it is a part of; every other one is of the transformer.
NETWORKS = {
    "T5Encoder": "text encoders", "CLIPText": "text encoders", "Encoder": "encoding", "Decoder": "decoding",
    "YOLOv8": "detector", "RRDBNet": "upscaler",
}  # fmt: skip
TRANSFORMER = "transformer"


@dataclass
class Watch:
    """Seconds in outermost calls of modules, by network."""

    seconds: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    _depth: int = 0
    _start: float = 0.0

    def enter(self, *_: Any) -> None:
        if self._depth == 0:
            self._start = now()
        self._depth += 1

    def leave(self, module: nn.Module, *_: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            name = NETWORKS.get(type(module).__name__, TRANSFORMER)
            self.seconds[name] = self.seconds.get(name, 0.0) + now() - self._start
            self.calls[name] = self.calls.get(name, 0) + 1


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def watched() -> Iterator[Watch]:
    watch = Watch()
    hooks = (
        nn.modules.module.register_module_forward_pre_hook(watch.enter),
        nn.modules.module.register_module_forward_hook(watch.leave),
    )
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()


def measure(engine: LightweightEngine, request: GenerationRequest) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder, watched() as watch:
        start = now()
        result = engine.run(request)
        drawn = now()
        save_result(result, Path(folder))
        end = now()
    total, inside = end - start, sum(watch.seconds.values())
    rows = [
        {"where": name, "seconds": seconds, "share": seconds / total, "calls": watch.calls[name]}
        for name, seconds in watch.seconds.items()
    ]
    rows.append({"where": "saving", "seconds": end - drawn, "share": (end - drawn) / total, "calls": 1})
    outside = total - inside
    rows.append({"where": "outside all networks, saving included", "seconds": outside, "share": outside / total})
    stages = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in result.timings.items())
    rows.append({"where": f"the job ({stages})", "seconds": total, "share": 1.0})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        engine = LightweightEngine(Config(models_dir=Path(folder), device="cpu", offline=True))
        engine.setup()
        request = GenerationRequest(prompt=PRODUCTION, seed=100, steps=args.steps, **{**JOB, "save_stages": False})
        engine.run(request)  # files are hashed, networks and detectors read
        engine._embeddings.clear()  # so that the text is encoded in the measured job
        publish("job", measure(engine, request))


if __name__ == "__main__":
    main()
