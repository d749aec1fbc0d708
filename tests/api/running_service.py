"""The real service, in a process of its own, and a plain client for it."""

from __future__ import annotations

import http.client
import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.served import Started, started

PROJECT = Path(__file__).resolve().parents[2]
SMALL = {"prompt": "a smiling woman", "width": 64, "height": 64, "steps": 1, "seed": 1}
LONG = {**SMALL, "width": 256, "height": 256, "steps": 1000}
"""Takes longer than any test waits: it is cancelled, or late."""


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error, having the form that every one has."""
        told = self.json
        assert set(told) == {"error", "detail"} and told["detail"] == told["error"]["message"], told
        assert set(told["error"]) == {"type", "message", "param", "request_id"}
        assert told["error"]["request_id"] == self.headers["x-request-id"]
        return told["error"]


class Running(Started):
    """A service that runs, with the client of the tests."""

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None, timeout: float = 60
    ) -> Answer:
        """One request on a connection of its own; a body that is no bytes is sent as JSON."""
        connection = self.connect(timeout)
        sent = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if body is not None:
            sent.setdefault("Content-Type", "application/json")
        try:
            connection.request(method, path, body, sent)
            return read(connection)
        finally:
            connection.close()

    def connect(self, timeout: float = 60) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, headers=headers)

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        return self.ask("POST", path, body, {name.replace("_", "-"): text for name, text in headers.items()})

    def generate(self, **fields: Any) -> Answer:
        return self.post("/generate", {**SMALL, **fields})

    def job(self, body: Any, **headers: str) -> str:
        answer = self.post("/jobs", body, **headers)
        assert answer.status == 202, answer.body
        return answer.json["id"]

    def until(self, job: str, *states: str) -> dict[str, Any]:
        """The job, once it is in one of the states."""
        return wait(lambda: (told := self.get(f"/jobs/{job}").json)["state"] in states and told)

    def idle(self) -> None:
        """Wait until nothing waits or runs."""
        wait(lambda: not (told := self.get("/health").json)["waiting"] and not told["running"])

    def ready(self) -> Running:
        wait(lambda: self.get("/readyz").status == 200)
        return self

    @property
    def worker(self) -> int:
        """The process id of the worker that was ready last."""
        return [json.loads(line)["pid"] for line in self.lines if "the worker is ready" in line][-1]

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(20)


def read(connection: http.client.HTTPConnection) -> Answer:
    response = connection.getresponse()
    return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())


def wait(look: Callable[[], Any], seconds: float = 60.0) -> Any:
    """What ``look`` returns, as soon as that is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := look():
            return found
        time.sleep(0.02)
    raise AssertionError("it did not come about")


@contextmanager
def service(folder: Path, *options: str, within: Sequence[str] = (), **environ: str) -> Iterator[Running]:
    """A service with `tiny`, in an empty working folder; it may not be ready yet.

    Args:
        within: a command that runs the one which follows it, in its place.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = {"OMP_NUM_THREADS": "1", **environ}
    with started(Running, folder, ("--threads", "1", *options), environment, within) as running:
        yield running
