"""Where the time of a production job goes: text, passes, decoding, enlarging, detector, details, saving.

    python -m benchmarks.job

The demonstration model draws the job of the production service with a LoRA. Every call of a network is timed; what is
left of the job is time outside all networks.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise, starmap
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from spandrel.architectures.ESRGAN.__arch.RRDB import RRDBNet

from benchmarks.report import publish
from lightweight_engine import Config, GenerationRequest, LightweightEngine
from lightweight_engine.apps.demo import JOB, PRODUCTION
from lightweight_engine.core.replay import save_result
from lightweight_engine.extensions.yolov8 import YOLOv8
from lightweight_engine.flux.autoencoder import Decoder, Encoder
from lightweight_engine.flux.clip import CLIPText
from lightweight_engine.flux.t5 import T5Encoder
from lightweight_engine.flux.transformer import Flux
from lightweight_engine.flux.velocity import Velocity
from lightweight_engine.upscalers.dense import DenseNetwork

STEPS = ("transformer", "modulation of its steps")
"""What steps of the transformer consist of: a pass computes how all of its steps are modulated before the first."""
NETWORKS: tuple[tuple[str, type, str], ...] = (
    (STEPS[0], Velocity, "__call__"),  # which replays what was recorded, past the network's own forward
    (STEPS[1], Flux, "modulations"),
    ("T5", T5Encoder, "forward"),
    ("CLIP", CLIPText, "forward"),
    ("encoding", Encoder, "forward"),
    ("decoding", Decoder, "forward"),
    ("detector", YOLOv8, "forward"),
    ("upscaler", RRDBNet, "forward"),
    ("upscaler", DenseNetwork, "forward"),  # what the one before is on a GPU
)
"""What is timed: its name in the table, a class and its method."""
WORTH_TELLING = 0.0005
"""Share of a job from which what passes between two networks has a row."""


@dataclass
class Watch:
    """The times of calls, by network; on a GPU by its own clock, so that nothing waits for the measurement."""

    spans: dict[str, list[tuple[Any, Any]]] = field(default_factory=dict)

    def timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = mark()
            result = method(*args, **kwargs)
            self.spans.setdefault(name, []).append((start, mark()))
            return result

        return call

    def seconds(self) -> dict[str, float]:
        now()
        return {name: sum(starmap(between, spans)) for name, spans in self.spans.items()}

    def pauses(self) -> dict[tuple[str, str], list[float]]:
        """Seconds from the end of a call to the beginning of the next, by the networks of both."""
        calls = [(name, *span) for name, spans in self.spans.items() for span in spans]
        _, origin, _ = calls[0]
        calls.sort(key=lambda call: between(origin, call[1]))
        found: dict[tuple[str, str], list[float]] = {}
        for (before, _, end), (after, begin, _) in pairwise(calls):
            found.setdefault((before, after), []).append(between(end, begin))
        return found


def mark() -> Any:
    """A point in time, of the GPU's work where there is one."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def watched() -> Iterator[Watch]:
    watch = Watch()
    with ExitStack() as stack:
        for name, owner, method in NETWORKS:
            timed = watch.timed(name, getattr(owner, method))
            stack.enter_context(mock.patch.object(owner, method, timed))
        yield watch


def measure(engine: LightweightEngine, request: GenerationRequest) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder, watched() as watch:
        start = now()
        result = engine.run(request)
        drawn = now()
        save_result(result, Path(folder))
        end = now()
    seconds = watch.seconds()
    total, inside = end - start, sum(seconds.values())
    rows = [
        {"where": name, "seconds": each, "share": each / total, "calls": len(watch.spans[name])}
        for name, each in seconds.items()
    ]
    rows.append({"where": "saving", "seconds": end - drawn, "share": (end - drawn) / total, "calls": 1})
    outside = total - inside
    rows.append({"where": "outside all networks, saving included", "seconds": outside, "share": outside / total})
    rows += [
        {
            "where": f"of it, from {before} to {after}",
            "seconds": sum(found),
            "share": sum(found) / total,
            "calls": len(found),
        }
        for (before, after), found in watch.pauses().items()
        if sum(found) >= WORTH_TELLING * total
    ]
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
