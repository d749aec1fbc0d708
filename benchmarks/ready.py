"""Time from the start of a process to a model that is ready, beside that of torch alone. ``python -m benchmarks.ready``

A random model at full size lies in memory-backed storage, its transformer in nf4, as a warm page cache has it; its T5
is in nf4 too, 10 GB in all, or in 16 bits, 17 GB; its tokenizers are as long as the published ones. Each program runs
in a fresh process, in turn with the others: ``import torch``; the same with the GPU's context and one kernel; ours as
the command line starts it, up to an engine whose weights are on the device. ``--quick`` tries it out on a small model,
on a CPU too.
"""

from __future__ import annotations

import argparse
import compileall
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.report import publish, spread

TORCH = "import torch"
CONTEXT = TORCH + "\nif torch.cuda.is_available(): torch.ones(1, device='cuda'); torch.cuda.synchronize()"
HOST = "torch with its context"
PACKAGE = Path(__file__).resolve().parents[1] / "lightweight_engine"

# Says when what follows is done, in seconds since the process was told to start.
STAMPS = """
import json, sys, time
marks, begin = {}, float(sys.argv[1])
def mark(name): marks[name] = time.time() - begin
mark("python")
"""

READY = (
    STAMPS
    + """
from lightweight_engine.config import EngineConfig
config = EngineConfig(**json.loads(sys.argv[2]))
mark("settings")
%s
if torch.cuda.is_available(): torch.cuda.synchronize()
mark("ready")
held = {role: loaded.placed.nbytes for role, loaded in engine.networks._loaded.items()}
from lightweight_engine.backend.early_fetch import early_fetch
print(json.dumps({"marks": marks, "device": str(engine.networks.device), "held": held,
                  "fetched": early_fetch().fetched,
                  "stored": engine.models.parts["transformer"].storage}))
"""
)
COMMAND = """
from lightweight_engine.apps.console import Console
from lightweight_engine.apps.session import start_engine
engine = start_engine(Console(quiet=True), config)
import torch
"""
PLAINLY = """
import torch
mark("torch")
from lightweight_engine.core.engine import LightweightEngine
mark("engine")
engine = LightweightEngine(config)
engine.setup()
"""


def seconds(code: str, settings: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """How long a program takes, its exit left out where it says when it is ready, and what it prints."""
    begin, wall = time.time(), time.perf_counter()
    command = [sys.executable, "-c", code, str(begin), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    took = time.perf_counter() - wall
    if done.returncode:
        raise SystemExit(done.stderr)
    told = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}
    return told["marks"]["ready"] if told else took, told


def timed(code: str) -> str:
    """A program that only tells when its last line is done."""
    return STAMPS + code + "\nmark('ready')\nprint(json.dumps({'marks': marks}))"


def write_files(folder: Path, small: bool) -> int:
    """A models folder with the transformer in nf4, and T5 both so and not; returns its bytes.

    In a process that gives the GPU back.
    """
    code = (
        "import sys, torch\nfrom pathlib import Path\n"
        "from benchmarks.fullsize import SMALL, Sizes, write_model, write_packed, write_tokenizers\n"
        "device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')\n"
        f"paths = write_model(Path({str(folder)!r}), {'SMALL' if small else 'Sizes()'}, device)\n"
        "for role in ('transformer', 't5'): write_packed(paths[role], ['nf4'], device)\n"
        "paths['transformer'].unlink()\n"
        f"write_tokenizers(Path({str(folder)!r}))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def programs() -> dict[str, tuple[str, str]]:
    """Name -> code, and the T5 that it is to load."""
    return {
        "import torch": (timed(TORCH), ""),
        HOST: (timed(CONTEXT), ""),
        "ready": (READY % COMMAND, "t5-nf4.safetensors"),
        "ready, T5 in 16 bits": (READY % COMMAND, "t5.safetensors"),
        "ready, without a head start": (READY % PLAINLY, "t5-nf4.safetensors"),
    }


Runs = dict[str, list[tuple[float, dict[str, Any]]]]
"""Program -> seconds of each run, and what it told of itself."""


def measure(folder: Path, runs: int) -> Iterator[Runs]:
    """All runs so far, after each round; a first round does not count."""
    settings = {
        "models_dir": str(folder), "cache_dir": str(folder / "cache"), "offline": True, "device": "auto",
    }  # fmt: skip
    found: Runs = {name: [] for name in programs()}
    compileall.compile_dir(PACKAGE, quiet=1)  # as an installed package is; Python may be told to keep nothing
    for run in range(-1, runs):
        for name, (code, t5) in programs().items():
            took = seconds(code, {**settings, "t5": t5})
            if run >= 0:
                found[name].append(took)
        if run >= 0:
            yield found


def rows_of(found: Runs) -> list[dict[str, Any]]:
    torch = spread([took for took, _ in found[HOST]])["median"]
    rows = []
    for name, runs in found.items():
        times, last = spread([took for took, _ in runs]), runs[-1][1]
        steps = {
            step: spread([told["marks"][step] for _, told in runs])["median"] for step in last["marks"]
        }  # fmt: skip
        facts = {key: last[key] for key in ("device", "stored", "held", "fetched") if key in last}
        row = {"program": name, **times, "over_torch_with_context": times["median"] / torch, "at_seconds": steps}
        rows.append({**row, **facts})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small networks, two runs")
    args = parser.parse_args()
    from benchmarks.fullsize import scratch_folder

    with scratch_folder() as folder:
        nbytes = write_files(Path(folder), args.quick)
        for found in measure(Path(folder), 2 if args.quick else args.runs):  # it may be cut off
            facts = {"runs": len(found[HOST]), "file_gb": nbytes / 1e9}
            publish("ready-quick" if args.quick else "ready", rows_of(found), **facts)


if __name__ == "__main__":
    main()
