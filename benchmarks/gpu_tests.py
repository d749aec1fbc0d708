"""Run the tests that need a CUDA GPU and record their outcome. ``python -m benchmarks.gpu_tests [--at-once N]``

CI has no GPU, so what these tests showed on one is kept with the other results. With ``--at-once``, files are dealt out
to so many processes; with ``--again``, the files and tests that are given replace what is kept of them, and the rest
stays. Other arguments go to pytest.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks.report import RESULTS, write

NAME = "gpu_tests"
FOLDER = Path("tests/gpu")


class Outcomes:
    """Collects the outcome and the seconds of every test."""

    def __init__(self, name: str = NAME) -> None:
        self.name = name
        self.rows: dict[str, dict[str, object]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = f"{Path(report.nodeid.partition('::')[0]).stem}::{report.nodeid.partition('::')[2]}"
        if report.when == "setup":
            self.rows[name] = {"test": name, "outcome": "passed", "seconds": 0.0}
        row = self.rows[name]
        row["seconds"] = round(float(str(row["seconds"])) + report.duration, 2)
        if report.outcome != "passed":
            row["outcome"] = "xfailed" if hasattr(report, "wasxfail") else report.outcome
        if report.when == "teardown" and len(self.rows) % 20 == 0:
            self.write()

    def write(self) -> None:
        """Done now and then, as the run may be cut off."""
        record(self.name, list(self.rows.values()))


def record(name: str, rows: list[dict[str, object]]) -> None:
    counts = Counter(str(row["outcome"]) for row in rows)
    write(name, rows, gpu=torch.cuda.get_device_name(), outcomes=dict(counts))


def kept(given: list[str]) -> list[dict[str, object]]:
    """The rows of results but for those of files that are run again."""
    files = {Path(each).stem for each in given if each.startswith("tests/") and "::" not in each}
    rows = json.loads((RESULTS / f"{NAME}.json").read_text(encoding="utf-8"))["rows"]
    return [row for row in rows if row["test"].partition("::")[0] not in files]


def dealt(count: int) -> list[list[str]]:
    """The files of tests in so many hands, about equally many bytes in each."""
    hands: list[list[Path]] = [[] for _ in range(count)]
    for path in sorted(FOLDER.glob("test_*.py"), key=lambda path: -path.stat().st_size):
        min(hands, key=lambda hand: sum(each.stat().st_size for each in hand)).append(path)
    return [[str(path) for path in hand] for hand in hands]


def at_once(count: int, arguments: list[str]) -> int:
    """Run the files in several processes, and put their outcomes together."""
    names = [f"{NAME}_{number}" for number in range(count)]
    running = [
        subprocess.Popen([sys.executable, "-m", "benchmarks.gpu_tests", "--name", name, *files, *arguments])
        for name, files in zip(names, dealt(count), strict=True)
    ]
    codes = [process.wait() for process in running]
    rows: list[dict[str, object]] = []
    for path in (RESULTS / f"{name}.json" for name in names):
        rows += json.loads(path.read_text(encoding="utf-8"))["rows"]
        path.unlink()
    record(NAME, rows)
    return max(codes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at-once", type=int, default=1, help="processes")
    parser.add_argument("--again", action="store_true", help="replace what is kept of what is given")
    parser.add_argument("--name", default=NAME, help="of the file of results")
    args, rest = parser.parse_known_args()
    if not torch.cuda.is_available():
        sys.exit("error: torch sees no CUDA device; these tests need one")
    if args.at_once > 1:
        sys.exit(at_once(args.at_once, rest))
    outcomes = Outcomes(args.name)
    if args.again:
        outcomes.rows = {str(row["test"]): row for row in kept(rest)}
    files = [] if any(each.startswith("tests/") for each in rest) else [str(FOLDER)]
    code = pytest.main([*files, "-q", *rest], plugins=[outcomes])
    outcomes.write()
    sys.exit(code)


if __name__ == "__main__":
    main()
