"""Run the tests that need a CUDA GPU and record their outcome. ``python -m benchmarks.gpu_tests``

CI has no GPU, so what these tests showed on one is kept with the other results.
"""

from __future__ import annotations

import sys
from collections import Counter

import pytest
import torch

from benchmarks.report import write


class Outcomes:
    """Collects the outcome and the seconds of every test."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, object]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.partition("::")[2]
        row = self.rows.setdefault(name, {"test": name, "outcome": "passed", "seconds": 0.0})
        row["seconds"] = round(float(str(row["seconds"])) + report.duration, 2)
        if report.outcome != "passed":
            row["outcome"] = report.outcome
        if report.when == "teardown" and len(self.rows) % 20 == 0:
            self.write()

    def write(self) -> None:
        """Done now and then, as the run may be cut off."""
        counts = Counter(str(row["outcome"]) for row in self.rows.values())
        write("gpu_tests", list(self.rows.values()), gpu=torch.cuda.get_device_name(), outcomes=dict(counts))


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("error: torch sees no CUDA device; these tests need one")
    outcomes = Outcomes()
    code = pytest.main(["tests/gpu", "-q", *sys.argv[1:]], plugins=[outcomes])
    outcomes.write()
    sys.exit(code)


if __name__ == "__main__":
    main()
