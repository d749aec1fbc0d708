"""Whether a service grows: mixed jobs for a while, and the slope of memory and descriptors.

    python -m benchmarks.soak --minutes 20

A real service on the demonstration model draws plainly, with LoRAs that change, with a hires pass, with the detailer,
from a picture, and enlarges; jobs are cancelled, interrupted and skipped, callers hang up, and watch with previews.
Resident memory and descriptors of front and worker are sampled; the slope is that of least squares over the samples
after the warm-up. The plain picture has to be the same every time.
"""

from __future__ import annotations

import argparse
import base64
import collections
import hashlib
import http.client
import io
import itertools
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.report import publish
from benchmarks.served import Served, serving
from lightweight_engine.backend.processes import resident_bytes

MIB = 1 << 20
CLIENTS = 2
SAMPLE_SECONDS = 5.0
WARM_UP = 0.25  # of the time, which the slope leaves out: caches fill, and allocators find their size
KEPT_MIB = 2  # of finished pictures, so that the front has as many as it keeps early on
SERVE = ("--threads", "1", "--set", f"keep_results_mib={KEPT_MIB}")

SMALL = {"prompt": "a smiling woman with red hair", "width": 64, "height": 64, "steps": 2, "seed": 1, "subseed": 0}
LONG = {**SMALL, "width": 256, "height": 256, "steps": 200, "num_outputs": 2}
DRAWN: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "lora hat": {"loras": ["hat"]},
    "hires": {"hr_scale": 1.5, "hr_steps": 2, "hr_upscaler": "4x_tiny", "denoising_strength": 0.5},
    "lora night": {"loras": ["night:0.8"]},
    "detailer": {"width": 256, "height": 256, "adetailer": True},
    "both loras": {"loras": ["hat", "night"], "cfg_scale": 2.0, "negative_prompt": "hat"},
    "batch": {"num_outputs": 3, "batch_size": 2, "sampler": "Euler a", "save_stages": True},
}


def picture() -> str:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "teal").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def sample(pids: Mapping[str, int]) -> dict[str, float]:
    """MiB and descriptors of each process."""
    found: dict[str, float] = {}
    for name, pid in pids.items():
        found[f"{name} MiB"] = resident_bytes(pid) / MIB
        found[f"{name} descriptors"] = len(os.listdir(f"/proc/{pid}/fd"))
    return found


@dataclass
class Callers:
    """Those who send jobs, in turn of all kinds, until the time is over."""

    served: Served
    end: float
    done: collections.Counter[str] = field(default_factory=collections.Counter)
    wrong: list[str] = field(default_factory=list)
    _turn: Iterator[int] = field(default_factory=itertools.count)
    _plain: set[str] = field(default_factory=set)

    def run(self) -> None:
        threads = [threading.Thread(target=self._call) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if len(self._plain) != 1:
            self.wrong.append(f"the plain picture came out in {len(self._plain)} ways")

    def _call(self) -> None:
        kinds = list(KINDS.items())
        while time.monotonic() < self.end:
            name, action = kinds[next(self._turn) % len(kinds)]
            try:
                action(self)
                self.done[name] += 1
            except Exception as error:  # noqa: BLE001 - of any kind: it is told at the end, and the others go on
                self.wrong.append(f"{name}: {error!r:.200}")

    def draw(self, name: str) -> None:
        told = self.expect(200, "POST", "/generate", {**SMALL, **DRAWN[name]})
        if name == "plain":
            self._plain.add(hashlib.sha256(told["images"][0].encode()).hexdigest())

    def start_from_picture(self) -> None:
        self.expect(200, "POST", "/generate", {**SMALL, "image": picture(), "denoising_strength": 0.6})

    def enlarge(self) -> None:
        self.expect(200, "POST", "/upscale", {"images": [picture()], "upscaler": "4x_tiny"})

    def refuse(self) -> None:
        self.expect(422, "POST", "/generate", {**SMALL, "steps": 0})

    def end_early(self, how: str) -> None:
        """A long job is started, and ended by ``how`` as soon as it is sampled."""
        job = self.started()
        method, path = ("DELETE", f"/jobs/{job}") if how == "cancel" else ("POST", f"/jobs/{job}/{how}")
        self.expect(200, method, path)
        if how == "skip":  # of two batches one is left
            self.until(job, lambda told: told["progress"].get("image_index") == 1 or told["finished"])
            self.served.ask("POST", f"/jobs/{job}/interrupt")
        told = self.until(job, lambda told: told["finished"])
        state = "cancelled" if how == "cancel" else "succeeded"
        if told["state"] != state:
            raise AssertionError(f"{told['state']} instead of {state}")

    def hang_up(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.served.port)
        connection.request("POST", "/generate", json.dumps(LONG), {"Content-Type": "application/json"})
        time.sleep(0.5)
        connection.close()

    def watch(self) -> None:
        job = self.expect(202, "POST", "/jobs?preview_every=1", {**SMALL, "steps": 8})["id"]
        connection = http.client.HTTPConnection("127.0.0.1", self.served.port, timeout=300)
        connection.request("GET", f"/jobs/{job}/events")
        events = connection.getresponse().read()
        connection.close()
        if b"event: result" not in events:
            raise AssertionError("no result among the events")

    def started(self) -> str:
        job = self.expect(202, "POST", "/jobs", LONG)["id"]
        self.until(job, lambda told: told["progress"].get("stage") == "sample")
        return job

    def until(self, job: str, look: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        while not look(told := self.expect(200, "GET", f"/jobs/{job}")):
            time.sleep(0.05)
        return told

    def expect(self, status: int, method: str, path: str, body: Any = None) -> Any:
        found, told = self.served.ask(method, path, body)
        if found != status:
            raise AssertionError(f"{method} {path}: {found} instead of {status}: {told!r:.150}")
        return told


KINDS: Mapping[str, Callable[[Callers], None]] = {
    **{name: lambda callers, name=name: callers.draw(name) for name in DRAWN},
    "from a picture": Callers.start_from_picture,
    "enlarged": Callers.enlarge,
    "cancelled": lambda callers: callers.end_early("cancel"),
    "interrupted": lambda callers: callers.end_early("interrupt"),
    "skipped": lambda callers: callers.end_early("skip"),
    "hung up": Callers.hang_up,
    "watched": Callers.watch,
    "refused": Callers.refuse,
}


def sampled(served: Served, end: float) -> list[tuple[float, dict[str, float]]]:
    """(minutes, sample) until the time is over."""
    pids = {"front": served.pid, "worker": served.logged("the worker is ready")["pid"]}
    begin, samples = time.monotonic(), []
    while time.monotonic() < end:
        samples.append(((time.monotonic() - begin) / 60, sample(pids)))
        time.sleep(SAMPLE_SECONDS)
    return samples


def row_of(name: str, samples: list[tuple[float, dict[str, float]]], settled: float) -> dict[str, Any]:
    """What became of one measure; its slope after ``settled`` minutes."""
    later = [(minutes, sample[name]) for minutes, sample in samples if minutes >= settled]
    minutes, values = [row[0] for row in later], [row[1] for row in later]
    return {
        "what": name,
        "first": samples[0][1][name],
        "after_warm_up": values[0],
        "last": values[-1],
        "most": max(sample[name] for _, sample in samples),
        "slope_a_minute": statistics.linear_regression(minutes, values).slope,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), *SERVE, threads=1) as served:
        served.logged("the worker is ready")  # before it, each job would be answered 503
        end = time.monotonic() + 60 * args.minutes
        callers = Callers(served, end)
        calling = threading.Thread(target=callers.run)
        calling.start()
        samples = sampled(served, end)
        calling.join()
    rows = [row_of(name, samples, WARM_UP * args.minutes) for name in samples[0][1]]
    jobs = sum(callers.done.values())
    publish("soak", rows, minutes=args.minutes, jobs=jobs, kinds=dict(callers.done), wrong=callers.wrong[:20])
    sys.exit(1 if callers.wrong else 0)


if __name__ == "__main__":
    main()
