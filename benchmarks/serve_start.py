"""Time from the start of ``serve`` to a service that is ready. ``python -m benchmarks.serve_start``

Ready is ``/readyz`` with 200, on the embedded model; it is compared with the import of what any such service needs.
Both are measured in turn, each in fresh processes. ``front`` is the time to the first answer of ``/livez``.

The service is two processes, which a busy machine slows down more than one: ``chrt -f 10 python -m …`` (as root) keeps
others out of the way of both.
"""

from __future__ import annotations

import argparse
import http.client
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.report import publish, spread
from benchmarks.served import LOOK_SECONDS, serving

IMPORTS = "import torch, fastapi"


def imports() -> dict[str, float]:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)
    return {IMPORTS: time.perf_counter() - begin}


def start() -> dict[str, float]:
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as served:
        front = until(served.port, "/livez") - begin
        ready = until(served.port, "/readyz") - begin
    return {"front": front, "ready": ready}


def until(port: int, path: str) -> float:
    """When an address first answers with 200."""
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", path)
        status = connection.getresponse().status
        connection.close()
        if status == 200:
            return time.perf_counter()
        time.sleep(LOOK_SECONDS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    measures: tuple[Callable[[], dict[str, float]], ...] = (imports, start)
    times: dict[str, list[float]] = {}
    for run in range(-1, args.runs):
        for name, seconds in (row for measure in measures for row in measure().items()):
            if run >= 0:
                times.setdefault(name, []).append(seconds)
    base = spread(times[IMPORTS])["median"]
    rows = []
    for name, values in times.items():
        found = spread(values)
        rows.append(
            {
                "what": name,
                **{f"{key}_ms": value * 1e3 for key, value in found.items()},
                "over_imports": found["median"] / base,
            }
        )
    publish("serve_start", rows, runs=args.runs)


if __name__ == "__main__":
    main()
