"""Time to import and to be ready, each in fresh processes in turn. ``python -m benchmarks.startup``

``ready`` is everything from the start of Python to a set-up engine on the embedded model; it is compared with
``import torch`` alone. ``diffusers`` is the import that a program on its Flux pipeline begins with.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from benchmarks.report import publish, spread

READY = "from lightweight_engine import Config, LightweightEngine; LightweightEngine(Config(offline=True)).setup()"
PROGRAMS = {
    "python": ["-c", "pass"],
    "import lightweight_engine": ["-c", "import lightweight_engine"],
    "lightweight-engine --help": ["-m", "lightweight_engine", "--help"],
    "import torch": ["-c", "import torch"],
    "ready (setup on tiny)": ["-c", READY],
    "import diffusers FluxPipeline": ["-c", "from diffusers import FluxPipeline"],
}


def seconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for run in range(-1, args.runs):
        for name, arguments in PROGRAMS.items():
            taken = seconds(arguments)
            if run >= 0:
                times[name].append(taken)
    torch = spread(times["import torch"])["median"]
    rows = []
    for name, values in times.items():
        row = {key: value * 1e3 for key, value in spread(values).items()}
        rows.append(
            {
                "program": name,
                **{f"{key}_ms": v for key, v in row.items()},
                "over_import_torch": row["median"] / 1e3 / torch,
            }
        )
    publish("startup", rows, runs=args.runs)


if __name__ == "__main__":
    main()
