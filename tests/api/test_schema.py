"""What the service's own description promises, held against it by requests that are made from that description.

schemathesis sends valid and broken requests to every address and follows what they made from one to the next. Each
answer has to be of a status, type and form that the description has for it; none may be a 500.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from running_service import Running, service

pytest.importorskip("schemathesis")

# Small pictures, so that a request made at random is drawn in no time, or refused.
LIMITS = {"max_side": 64, "max_outputs": 2, "max_megapixel_steps": 0.05, "job_seconds": 2, "queue_max": 64}

# What is told by a status of 500 or more, and meant: see docs/service.md.
MEANT = '[checks]\nnot_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", "501", "503", "504", "507"]\n'

# Limits of a configuration are no part of a schema, and numbers and switches are understood as text and as one another.
# DELETE cancels a job, which stays to be asked about.
LENIENT = "positive_data_acceptance,negative_data_rejection,use_after_free"


def check(running: Running, folder: Path, *options: str) -> None:
    """Run schemathesis in a process of its own, as it leaves marks on the one that it runs in."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{running.port}/openapi.json"]
    common = ["--no-color", "--warnings=off", "--no-shrink", "--continue-on-failure", "--generation-database=none"]
    bounds = ["--request-timeout=20", f"--exclude-checks={LENIENT}"]
    (folder / "schemathesis.toml").write_text(MEANT)
    environment = {**os.environ, "NO_PROXY": "127.0.0.1", "COLUMNS": "120"}
    done = subprocess.run(
        [*command, *common, *bounds, *options],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        check=False,
    )
    print(done.stdout[-1500:])
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]


@pytest.mark.parametrize(
    ("seconds", "examples"), [(25, 4), pytest.param(600, 200, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_every_answer_is_one_that_was_promised(tmp_path: Path, seconds: int, examples: int) -> None:
    options = [part for name, value in LIMITS.items() for part in ("--set", f"{name}={value}")]
    with service(tmp_path, *options) as running:
        running.ready()
        before = running.generate(subseed=0).json["images"]
        check(running, tmp_path, "--seed=1", f"--max-time={seconds}", f"--max-examples={examples}")
        running.idle()
        assert running.generate(subseed=0).json["images"] == before
        assert running.get("/models/status").json["restarts"] == 0
        assert not [line for line in running.lines if '"level": "error"' in line]
        assert running.stop() == 0
