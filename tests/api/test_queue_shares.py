"""How many jobs of one caller may wait, so that one key does not take the whole queue."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from running_service import LONG, SMALL, Answer, Running, service

from lightweight_engine.apps.server.estimate import Pace
from lightweight_engine.apps.server.service import Service

SHARE = ("--set", "queue_max=4", "--set", "queue_max_per_key=2")


def ask(running: Running, key: str = "", body: object = SMALL, path: str = "/jobs", **headers: str) -> Answer:
    return running.post(path, body, **({"X_API_Key": key} if key else {}), **headers)


@pytest.mark.parametrize("keys", [("first-key", "other-key"), ()], ids=["keys", "an address"])
def test_one_caller_has_a_share_of_the_queue(tmp_path: Path, keys: tuple[str, ...]) -> None:
    first = keys[0] if keys else ""
    with service(tmp_path, *SHARE, LWE_API_KEYS=",".join(keys)) as running:
        running.ready()
        job = ask(running, first, LONG).json["id"]
        look = {"X-API-Key": first} if first else {}
        while running.get(f"/jobs/{job}", **look).json["state"] == "queued":
            pass
        mine = [ask(running, first, Idempotency_Key=str(n)) for n in range(2)]
        assert [answer.status for answer in mine] == [202, 202], mine[0].body
        for path in ("/jobs", "/generate"):
            full = ask(running, first, path=path)
            assert full.status == 429 and "queue_max_per_key" in full.error["message"]
            assert int(full.headers["retry-after"]) >= 1 and full.error["type"] == "QueueFullError"
        assert ask(running, first, Idempotency_Key="1").json["id"] == mine[1].json["id"]  # no further job
        if keys:
            others = [ask(running, "other-key") for _ in range(2)]
            assert [answer.status for answer in others] == [202, 202]
            assert "(setting queue_max)" in ask(running, "other-key").error["message"]  # now it is full for all
        assert running.get("/readyz").status == (503 if keys else 200)
        assert running.ask("DELETE", f"/jobs/{mine[0].json['id']}", headers=look).status == 200
        assert ask(running, first).status == 202
        refused = [
            line for line in running.get("/metrics", **look).body.decode().splitlines() if "refused_total" in line
        ]
        assert 'lwe_jobs_refused_total{reason="caller_full"} 2' in refused


def test_of_the_running_job_what_is_left_counts() -> None:
    of: Any = SimpleNamespace(pace=Pace(), running=SimpleNamespace(cost=10.0, progress={}))
    whole, with_another = Service._seconds_of(of, []), Service._seconds_of(of, [of.running])
    of.running.progress = {"fraction": 0.75}
    assert Service._seconds_of(of, []) == pytest.approx(whole / 4) and with_another == pytest.approx(2 * whole)
    of.running.progress = {"fraction": 0.75, "eta_seconds": 16.0}
    assert Service._seconds_of(of, []) == 16
    of.running = None
    assert Service._seconds_of(of, []) == 0


SMALL_WORK, LARGE_WORK = 0.0082, 5.24


@pytest.mark.parametrize("first", [0.11, 4.6], ids=["warm", "cold"])
@pytest.mark.parametrize("jobs", [1, 5])
def test_small_jobs_do_not_make_large_ones_slow(first: float, jobs: int) -> None:
    pace = Pace()
    for took in (first, *[0.11] * (jobs - 1)):
        pace.saw(SMALL_WORK, took)
    assert pace.seconds(LARGE_WORK) < 10
    assert pace.seconds(SMALL_WORK) == pytest.approx(first if jobs == 1 else 0.11, rel=0.1)
    for _ in range(2):
        pace.saw(LARGE_WORK, 6.4)
    assert pace.seconds(LARGE_WORK) == pytest.approx(6.4, rel=0.3)
    if jobs > 1:  # else a time that each job takes explains all three
        assert pace.seconds(LARGE_WORK * 4) == pytest.approx(6.4 * 4, rel=0.1)


def test_large_jobs_say_what_larger_and_small_ones_take() -> None:
    pace = Pace()
    for _ in range(3):
        pace.saw(LARGE_WORK, 1.0)
    assert pace.seconds(LARGE_WORK * 2) == pytest.approx(2.0) and pace.seconds(SMALL_WORK) < 0.1


def test_a_job_that_waited_for_its_model_does_not_count() -> None:
    pace = Pace()
    for took in (60.0, 3.0, 3.1):
        pace.saw(LARGE_WORK, took)
    assert pace.seconds(LARGE_WORK) == pytest.approx(3.1, rel=0.1)
    pace.saw(SMALL_WORK, 60.0)
    assert pace.seconds(LARGE_WORK) == pytest.approx(3.1, rel=0.1)


def test_what_has_become_quicker_is_known_as_that() -> None:
    pace = Pace()
    for took in (*[30.0] * 20, *[3.0] * 6):
        pace.saw(LARGE_WORK, took)
        pace.saw(LARGE_WORK / 4, took / 4)
    assert pace.seconds(LARGE_WORK) == pytest.approx(3.0, rel=0.1)
