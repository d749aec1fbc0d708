"""A service that is ended, loses its worker, or is guarded: each in a process of its own."""

from __future__ import annotations

import base64
import json
import os
import signal
import threading
from pathlib import Path

import pytest
from running_service import LONG, SMALL, Answer, Running, service, wait

from benchmarks.served import NotLoggedError
from lightweight_engine.apps.server.supervisor import MAX_RESTARTS

KEY = "a-key-that-must-never-be-seen"


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


class Caller(threading.Thread):
    """Waits for the answer to one request."""

    def __init__(self, running: Running, body: object) -> None:
        super().__init__(daemon=True)
        self.running, self.body = running, body
        self.answer: Answer | None = None
        self.start()

    def run(self) -> None:
        self.answer = self.running.post("/generate", self.body)

    def got(self) -> Answer:
        self.join(30)
        assert self.answer is not None
        return self.answer


def test_sigterm_lets_the_running_job_end_and_sends_the_others_away(tmp_path: Path) -> None:
    with service(tmp_path) as running:
        running.ready()
        running.generate()  # so that the next one runs at its usual speed
        short = Caller(running, {**SMALL, "steps": 30})
        wait(lambda: running.get("/health").json["running"])
        waiting = Caller(running, SMALL)
        wait(lambda: running.get("/health").json["waiting"])
        worker = running.worker
        running.process.send_signal(signal.SIGTERM)
        sent_away = waiting.got()
        assert sent_away.status == 503 and int(sent_away.headers["retry-after"]) > 0
        assert sent_away.error["type"] == "UnavailableError"
        asked = sent_away.error["request_id"]
        wait(lambda: any('"finished"' in line and asked in line for line in list(running.lines)))
        assert short.got().status == 200
        assert running.process.wait(20) == 0
        wait(lambda: gone(worker))


def test_a_job_that_does_not_end_in_time_is_told_503_not_500(tmp_path: Path) -> None:
    with service(tmp_path, "--set", "drain_seconds=0.3") as running:
        running.ready()
        long = Caller(running, LONG)
        wait(lambda: running.get("/health").json["running"])
        running.process.send_signal(signal.SIGTERM)
        wait(lambda: running.get("/readyz").status == 503, 5)
        refused = running.generate()
        assert refused.status == 503 and refused.error["type"] == "UnavailableError"
        answer = long.got()
        assert answer.status == 503
        asked = answer.error["request_id"]
        wait(lambda: any('"finished"' in line and asked in line for line in list(running.lines)))
        told = next(json.loads(line) for line in running.lines if '"finished"' in line and asked in line)
        assert (told["state"], told["status"], told["error"]) == ("cancelled", 503, "UnavailableError")
        assert running.process.wait(20) == 0


def test_a_killed_worker_is_replaced(tmp_path: Path) -> None:
    with service(tmp_path) as running:
        running.ready()
        before = running.generate(subseed=0).json["images"]
        worker = running.worker
        long = Caller(running, LONG)
        wait(lambda: running.get("/health").json["running"])
        os.kill(worker, signal.SIGKILL)
        lost = long.got()
        assert lost.status == 503 and "worker" in lost.error["message"]
        assert running.get("/livez").status == 200
        running.ready()
        assert running.worker != worker
        assert running.generate(subseed=0).json["images"] == before
        assert running.get("/models/status").json["restarts"] == 1
        assert running.stop() == 0


def test_workers_that_die_too_often_end_the_service(tmp_path: Path) -> None:
    broken = tmp_path / "sitecustomize.py"
    broken.write_text("import os, sys\nif '--multiprocessing-fork' in sys.argv: os._exit(9)\n")
    with service(tmp_path, PYTHONPATH=str(tmp_path)) as running:
        assert running.process.wait(60) == 1
        assert any("died 4 times" in line for line in running.lines)


@pytest.mark.slow
def test_jobs_that_never_stop_do_not_end_the_service(tmp_path: Path) -> None:
    """A caller chooses how long a job may take, and so how often a worker that does not listen is ended."""
    with service(tmp_path) as running:
        for count in range(1, MAX_RESTARTS + 2):
            running.ready()
            worker = running.worker
            job = running.job(LONG, X_Request_Timeout="1")
            running.until(job, "running")
            os.kill(worker, signal.SIGSTOP)
            told = wait(lambda job=job: (now := running.get(f"/jobs/{job}").json)["state"] == "failed" and now, 90)
            assert told["error"]["type"] == "DeadlineError"
            wait(lambda worker=worker: gone(worker))
            wait(lambda count=count: running.get("/models/status").json["restarts"] == count)
        assert running.ready().generate().status == 200
        assert running.stop() == 0


def test_a_model_that_cannot_be_used_ends_the_service(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "Stable-diffusion"
    folder.mkdir(parents=True)
    (folder / "flux.safetensors").write_bytes(b"nothing")
    with service(tmp_path, "--checkpoint", "flux") as running:
        assert running.process.wait(60) == 3
        assert any("flux.safetensors" in line and "the service ends" in line for line in running.lines)


def test_a_job_without_memory_leaves_the_service_as_it_was(tmp_path: Path) -> None:
    with service(tmp_path, "--set", "vram_limit=0.2") as running:
        running.ready()
        before = running.generate(subseed=0).json["images"]
        short = running.generate(width=2048, height=2048)
        assert short.status == 507 and short.error["type"] == "MemoryBudgetError"
        assert running.generate(subseed=0).json["images"] == before


def test_the_port_is_taken(tmp_path: Path) -> None:
    with service(tmp_path / "first") as first:
        second = service(tmp_path / "second", "--port", str(first.port))
        with pytest.raises(NotLoggedError, match="choose another --port") as caught, second:
            pass
        assert len(str(caught.value).splitlines()[1:]) == 1, "the reason alone is told"


@pytest.mark.parametrize("host", ["nobody.invalid", "192.0.2.1"])
def test_an_address_that_is_not_ours(tmp_path: Path, host: str) -> None:
    start = service(tmp_path, "--host", host, LWE_API_KEYS=KEY)
    with pytest.raises(NotLoggedError, match=f"host: {host}:0 cannot be listened on .* choose another --host"), start:
        pass


def test_beyond_loopback_a_key_is_needed(tmp_path: Path) -> None:
    with pytest.raises(NotLoggedError, match="there are no api_keys"), service(tmp_path, "--host", "0.0.0.0"):
        pass


def test_keys(tmp_path: Path) -> None:
    basic = base64.b64encode(f"user:{KEY}".encode()).decode()
    with service(tmp_path, "--host", "0.0.0.0", LWE_API_KEYS=f"other-key,{KEY}") as running:
        assert running.get("/livez").status == running.ask("GET", "/livez").status == 200
        for wrong in ({}, {"Authorization": ""}, {"Authorization": "Bearer no"}, {"Authorization": "Basic !"}):
            answer = running.ask("GET", "/config", headers=wrong)
            assert answer.status == 401 and answer.error["type"] == "UnauthorizedError"
            assert "Bearer" in answer.headers["www-authenticate"]
        for right in (
            {"Authorization": f"Bearer {KEY}"},
            {"Authorization": f"Basic {basic}"},
            {"X-API-Key": "other-key"},
        ):
            assert running.ask("GET", "/config", headers=right).status == 200
        told = running.get("/config", Authorization=f"Bearer {KEY}")
        assert told.json["service"]["api_keys"] == ["***", "***"]
        described = running.get("/openapi.json", Authorization=f"Bearer {KEY}").json
        assert set(described["components"]["securitySchemes"]) == {"bearer", "basic", "key"}
        paths = described["paths"]
        assert paths["/generate"]["post"]["security"] and "security" not in paths["/livez"]["get"]
        running.get(f"/{KEY}?key={KEY}")
        assert KEY not in told.body.decode() and not any(KEY in line for line in running.lines)
        assert running.get("/metrics").status == 401


def test_a_key_for_the_metrics_alone(tmp_path: Path) -> None:
    with service(tmp_path, LWE_API_KEYS=KEY, LWE_METRICS_KEY="who-gathers") as running:
        for how in ({"Authorization": "Bearer who-gathers"}, {"X-API-Key": "who-gathers"}):
            assert running.get("/metrics", **how).status == 200
            for path in ("/config", "/jobs", "/models", "/metrics/", "/"):
                assert running.get(path, **how).status == 401
        assert running.ask("POST", "/generate", {"prompt": "a"}, headers={"X-API-Key": "who-gathers"}).status == 401
        assert running.get("/metrics", Authorization=f"Bearer {KEY}").status == 200
        assert running.get("/metrics", Authorization="Bearer who-gather").status == 401
        told = running.get("/config", Authorization=f"Bearer {KEY}")
        assert told.json["service"]["metrics_key"] == "***"
        running.get("/who-gathers")
        assert not any("who-gathers" in line for line in running.lines)


def test_hosts_and_origins(tmp_path: Path) -> None:
    options = ("--set", "host_names=engine.example", "--set", "allowed_origins=https://app.example")
    with service(tmp_path, *options) as running:
        for host in ("localhost", f"127.0.0.1:{running.port}", "engine.example", "ENGINE.example:80"):
            assert running.get("/health", Host=host).status in (200, 503)
        for host in ("evil.example", "127.0.0.1.evil.example", "", "[::1"):
            for path in ("/health", "/metrics", "/jobs/x", "/livez/", "/nowhere"):
                assert running.get(path, Host=host).status == 421
            assert running.get("/livez", Host=host).status == 200
            assert running.get("/readyz", Host=host).status in (200, 503)
            assert running.get("/readyz", Host=host, Origin="https://evil.example").status == 403
        own = f"http://localhost:{running.port}"
        assert running.get("/livez", Host=own[7:], Origin=own).status == 200
        for origin in ("null", "https://evil.example", "http://localhost:1"):
            assert running.get("/livez", Origin=origin).status == 403
        allowed = running.get("/livez", Origin="https://app.example")
        assert allowed.headers["access-control-allow-origin"] == "https://app.example"
        readable = allowed.headers["access-control-expose-headers"].split(", ")
        assert {"X-Job-ID", "X-Seed", "X-Warnings-Text", "X-Request-ID", "Location", "Retry-After"} <= set(readable)
        site = {"Sec-Fetch-Site": "cross-site"}
        assert running.ask("POST", "/jobs", SMALL, site).status == 403
        assert running.ask("GET", "/config", headers=site).status == 403
        assert running.ask("GET", "/", headers=site).status == 200


def test_a_service_that_is_not_ready_says_so(tmp_path: Path) -> None:
    with service(tmp_path) as running:
        assert running.get("/livez").status == 200
        early = running.generate()
        assert early.status == 503 and "loaded" in early.error["message"]
        assert running.stop() == 0
        assert all(json.loads(line) for line in running.lines)
