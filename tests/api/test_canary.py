"""Readiness that is earned: by jobs that go well, and by tiny ones of the service's own where there are none."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
from running_service import Running, service, wait

from lightweight_engine import Config, GenerationRequest
from lightweight_engine.apps.server.canary import Canary
from lightweight_engine.apps.server.faults import Fault
from lightweight_engine.apps.server.messages import Ended, Outcome, Work
from lightweight_engine.apps.server.metrics import Metrics

PERIOD = 2.4  # seconds
EVERY = ("--set", f"canary_minutes={PERIOD / 60}")


def counted(running: Running, name: str) -> float:
    found = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", running.get("/metrics").body.decode(), re.MULTILINE)
    return sum(map(float, found))


def test_readiness_is_that_of_the_worker(tmp_path: Path) -> None:
    with service(tmp_path, *EVERY) as running:
        running.ready()
        before = running.generate(subseed=0).json["images"]
        end = time.monotonic() + 2 * PERIOD
        while time.monotonic() < end:
            assert running.get("/readyz").status == 200
            assert running.get("/health").json["running"] is False
            time.sleep(0.05)
        assert counted(running, "lwe_canaries_total") >= 2
        assert counted(running, "lwe_jobs_total") == counted(running, "lwe_images_total") == 1
        assert counted(running, "lwe_job_wait_seconds_count") == 1

        os.kill(running.worker, signal.SIGSTOP)
        try:
            told = wait(lambda: (now := running.get("/readyz")).status == 503 and now, 4 * PERIOD)
            assert b"canary_minutes" in told.body and running.get("/livez").status == 200
        finally:
            os.kill(running.worker, signal.SIGCONT)
        running.ready()

        drawn = counted(running, "lwe_canaries_total")
        assert running.post("/models/unload", None).status == 200
        time.sleep(2 * PERIOD)
        assert running.get("/readyz").status == 200
        assert running.get("/models/status").json["memory"]["device_bytes"] == 0, "a canary brought it back"
        assert counted(running, "lwe_canaries_total") <= drawn + 1
        assert running.post("/models/load", None).status == 200
        running.ready()

        worker = running.worker
        os.kill(worker, signal.SIGKILL)
        wait(lambda: running.get("/readyz").status == 503, 5)
        running.ready()
        assert running.worker != worker
        assert running.generate(subseed=0).json["images"] == before
        assert running.stop() == 0


def test_without_the_setting_nothing_is_drawn_unasked() -> None:
    canary = canary_of(minutes=0)
    assert canary.reason is None and canary.seconds_until_due is None


class Pid:
    """Of a supervisor, what a canary looks at between its jobs."""

    pid = 1
    facts = {"held_bytes": 1}


def canary_of(minutes: float, worker: Pid | None = None) -> Canary:
    return Canary(Config(canary_minutes=minutes), worker or Pid(), Metrics())  # type: ignore[arg-type]


@pytest.mark.parametrize(("status", "doubted"), [(500, True), (507, False), (422, False), (503, False)])
def test_a_job_that_fails_by_no_fault_of_its_caller_is_followed_by_a_canary(status: int, doubted: bool) -> None:
    canary, work = canary_of(minutes=10), Work("job", GenerationRequest(prompt=""))
    assert canary.reason and canary.seconds_until_due == 0  # nothing was drawn yet
    canary.saw(work, Ended("job", Outcome("png", [], [], {})))
    assert canary.reason is None and 290 < (canary.seconds_until_due or 0) <= 300
    canary.saw(work, Ended("job", None, Fault("AnyError", "", status)))
    assert bool(canary.reason) == doubted == (canary.seconds_until_due == 0)


def test_a_new_worker_has_to_show_itself() -> None:
    worker = Pid()
    canary = canary_of(10, worker)
    canary.lives()
    assert canary.reason is None
    worker.pid = 2
    assert canary.reason and canary.seconds_until_due == 0
