"""How many jobs of one caller may wait, so that one key does not take the whole queue."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from running_service import LONG, SMALL, Answer, Running, service

from lightweight_engine.apps.server.service import Pace, Service

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
    of.running = None
    assert Service._seconds_of(of, []) == 0
