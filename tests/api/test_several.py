"""Two services behind HAProxy, with the file of the docs: one address, jobs where they were made, none lost."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
from running_service import LONG, PROJECT, SMALL, Running, service, wait

FILE = PROJECT / "docs" / "haproxy.cfg"
SETTINGS = ("--set", "queue_max=2", "--set", "drain_seconds=10")
NOTICED = 1.0  # seconds: by then the balancer has looked at each service

pytestmark = pytest.mark.skipif(shutil.which("haproxy") is None, reason="needs HAProxy (apt install haproxy)")


class Fleet(NamedTuple):
    """The address of all, and each by itself."""

    front: Running
    services: list[Running]

    def drawn(self) -> list[int]:
        """Jobs that each of them has drawn."""
        return [
            int(float(re.findall(r'^lwe_jobs_total{state="succeeded"} (\S+)', told, re.MULTILINE)[0]))
            for told in (each.get("/metrics").body.decode() for each in self.services)
        ]

    def fill(self) -> list[str]:
        """Jobs, made by the address of all, that fill the queue of each."""
        jobs: list[str] = []
        while any(each.get("/readyz").status == 200 for each in self.services):
            answer = self.front.post("/jobs", LONG, Idempotency_Key=f"order {len(jobs)}")
            assert answer.status in (202, 429), answer.body
            jobs += [answer.json["id"]] if answer.status == 202 else []
            time.sleep(0.2)
        time.sleep(NOTICED)
        return jobs


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with ExitStack() as stack:
        services = [stack.enter_context(service(tmp_path / name, *SETTINGS)) for name in ("gpu0", "gpu1")]
        for each in services:
            each.ready()
        ports = {"7860": free_port(), **{f"787{n}": each.port for n, each in enumerate(services)}}
        text = FILE.read_text(encoding="utf-8")
        for written, port in ports.items():
            assert text.count(f":{written}\n") == (1 if written == "7860" else 2)
            text = text.replace(f":{written}\n", f":{port}\n")
        (tmp_path / "haproxy.cfg").write_text(text, encoding="utf-8")
        process = stack.enter_context(
            subprocess.Popen(["haproxy", "-db", "-f", "haproxy.cfg"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        )
        stack.callback(process.kill)
        front = Running(process, port=ports["7860"])
        wait(lambda: reachable(front))
        yield Fleet(front, services)


def reachable(front: Running) -> bool:
    try:
        return front.get("/readyz").status == 200
    except OSError:
        return False


def test_requests_are_shared_out(fleet: Fleet) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda seed: fleet.front.generate(seed=seed), range(8)))
    assert [answer.status for answer in answers] == [200] * 8
    drawn = fleet.drawn()
    assert sum(drawn) == 8 and min(drawn) >= 2


def test_a_job_is_where_it_was_made(fleet: Fleet) -> None:
    jobs = [fleet.front.job({**SMALL, "seed": seed}) for seed in range(4)]
    for job in jobs:
        fleet.front.until(job, "succeeded")
        assert fleet.front.get(f"/jobs/{job}/images/0").status == 200
        held = [each.get(f"/jobs/{job}").status for each in fleet.services]
        assert sorted(held) == [200, 404]
    assert min(fleet.drawn()) >= 1
    job = fleet.front.job(LONG)
    assert fleet.front.ask("DELETE", f"/jobs/{job}").status in (200, 202, 204)
    fleet.front.until(job, "cancelled")


def test_a_request_that_is_sent_again_meets_its_job(fleet: Fleet) -> None:
    answers = [fleet.front.post("/jobs", SMALL, Idempotency_Key="an-order") for _ in range(6)]
    assert len({answer.json["id"] for answer in answers}) == 1


def test_one_that_is_ended_takes_no_request_with_it(fleet: Fleet) -> None:
    leaving, staying = fleet.services
    leaving.process.send_signal(signal.SIGTERM)
    answers = [fleet.front.generate(seed=seed) for seed in range(6)]
    assert [answer.status for answer in answers] == [200] * 6, [answer.body[:300] for answer in answers]
    assert leaving.process.wait(20) == 0 and staying.get("/readyz").status == 200


def test_one_whose_queue_is_full_is_not_asked(fleet: Fleet) -> None:
    busy, idle = fleet.services
    jobs = [busy.job(LONG) for _ in range(3)]  # one runs, two wait
    wait(lambda: busy.get("/readyz").status == 503)
    answers = [fleet.front.generate(seed=seed) for seed in range(4)]
    assert {answer.status for answer in answers} <= {200, 429}, "in the second before it is noticed"
    time.sleep(NOTICED)
    assert all(fleet.front.generate(seed=seed).status == 200 for seed in range(4))
    assert idle.get("/readyz").status == 200
    for job in jobs:
        busy.ask("DELETE", f"/jobs/{job}")


def test_jobs_are_found_while_queues_are_full(fleet: Fleet) -> None:
    jobs = fleet.fill()
    assert len(jobs) == 6
    for path in ("/generate", "/jobs"):
        refused = fleet.front.post(path, SMALL)
        assert refused.status == 429 and refused.error["type"] == "QueueFullError"
        assert int(refused.headers["retry-after"]) >= 1
    assert [fleet.front.get(f"/jobs/{job}").status for job in jobs for _ in range(2)] == [200] * 12
    assert fleet.front.post("/jobs", LONG, Idempotency_Key="order 0").json["id"] == jobs[0]
    assert fleet.front.get("/health").json["reason"] == "the queue is full"
    first = [job for job in jobs if fleet.services[0].get(f"/jobs/{job}").status == 200]
    assert [fleet.front.ask("DELETE", f"/jobs/{job}").status for job in first] == [200] * 3
    time.sleep(NOTICED)
    assert fleet.front.generate().status == 200, "the other is full still"
    assert [fleet.front.get(f"/jobs/{job}").status for job in jobs] == [200] * 6
    for order, job in enumerate(jobs):
        if job not in first:
            assert fleet.front.post("/jobs", LONG, Idempotency_Key=f"order {order}").json["id"] == job


def test_jobs_are_found_while_their_service_ends(fleet: Fleet) -> None:
    made = fleet.front.post("/jobs", LONG, Idempotency_Key="an order").json["id"]
    fleet.front.until(made, "running")
    leaving = next(each for each in fleet.services if each.get(f"/jobs/{made}").status == 200)
    leaving.process.send_signal(signal.SIGTERM)
    time.sleep(NOTICED)
    assert [fleet.front.get(f"/jobs/{made}").json.get("state") for _ in range(6)] == ["running"] * 6
    assert fleet.front.post("/jobs", LONG, Idempotency_Key="an order").json["id"] == made
    assert fleet.front.generate().status == 200
    assert fleet.front.ask("DELETE", f"/jobs/{made}").status == 200
    assert leaving.process.wait(20) == 0
    assert fleet.front.get(f"/jobs/{made}").error["type"] == "UnknownJobError"
    assert fleet.front.post("/jobs", SMALL, Idempotency_Key="an order").status == 202


def test_where_no_service_runs_the_balancer_says_so_in_json(fleet: Fleet) -> None:
    for each in fleet.services:
        each.process.kill()
    time.sleep(NOTICED)
    for path in ("/generate", "/jobs"):
        refused = fleet.front.post(path, SMALL)
        assert refused.status == 503 and refused.headers["content-type"] == "application/json"
        assert int(refused.headers["retry-after"]) >= 1
        assert set(refused.json["error"]) == {"type", "message", "param", "request_id"}
        assert refused.json["detail"] == refused.json["error"]["message"]


def test_a_caller_who_hung_up_meets_its_job(fleet: Fleet) -> None:
    for order in range(4):
        for _ in range(2):
            with pytest.raises(OSError):
                fleet.front.ask("POST", "/generate", LONG, {"Idempotency-Key": f"order {order}"}, timeout=1)
        lists = [each.get("/jobs").json["jobs"] for each in fleet.services]
        assert sum(map(len, lists)) == order + 1
        for each, jobs in zip(fleet.services, lists, strict=True):
            for job in jobs:
                each.ask("DELETE", f"/jobs/{job['id']}")


def test_the_id_of_any_answer_leads_to_its_job(fleet: Fleet) -> None:
    for kind in ("application/json", "image/png"):
        answer = fleet.front.post("/generate", SMALL, Accept=kind)
        where = f"/jobs/{answer.headers['x-job-id']}"
        assert kind == "image/png" or answer.json["id"] == answer.headers["x-job-id"]
        assert [fleet.front.get(where).status for _ in range(4)] == [200] * 4
