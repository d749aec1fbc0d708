"""Many callers at once, for a while."""

from __future__ import annotations

import base64
import hashlib
import threading
import time
from pathlib import Path

import pytest
from running_service import SMALL, Running, service

CLIENTS = 32


class Load:
    """Callers that ask for one of a few pictures again and again, and one that looks whether the front lives."""

    def __init__(self, running: Running, seconds: float) -> None:
        self.running, self.end = running, time.monotonic() + seconds
        self.statuses: dict[int, int] = {}
        self.drawn: dict[int, set[str]] = {}
        self.looks: list[float] = []
        self.most_waiting = 0
        self._lock = threading.Lock()

    def run(self) -> None:
        threads = [threading.Thread(target=self._call, args=(n,)) for n in range(CLIENTS)]
        threads.append(threading.Thread(target=self._look))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _call(self, number: int) -> None:
        while time.monotonic() < self.end:
            seed = number % 4
            answer = self.running.generate(seed=seed, subseed=0)
            with self._lock:
                self.statuses[answer.status] = self.statuses.get(answer.status, 0) + 1
                if answer.status == 200:
                    self.drawn.setdefault(seed, set()).add(digest(answer.json["images"][0]))
            if answer.status == 429:
                time.sleep(0.2)

    def _look(self) -> None:
        while time.monotonic() < self.end:
            begin = time.perf_counter()
            assert self.running.get("/livez").status == 200
            self.looks.append(time.perf_counter() - begin)
            self.most_waiting = max(self.most_waiting, self.running.get("/health").json["waiting"])
            time.sleep(0.02)


def digest(image: str) -> str:
    return hashlib.sha256(base64.b64decode(image)).hexdigest()


@pytest.mark.parametrize("seconds", [4, pytest.param(120, marks=pytest.mark.slow)])
def test_load(tmp_path: Path, seconds: float) -> None:
    with service(tmp_path, "--set", "queue_max=8") as running:
        running.ready()
        serial = {seed: {digest(running.generate(seed=seed, subseed=0).json["images"][0])} for seed in range(4)}
        load = Load(running, seconds)
        load.run()
        print(f"{load.statuses}, /livez p99 {1000 * sorted(load.looks)[int(len(load.looks) * 0.99)]:.0f} ms")
        assert set(load.statuses) == {200, 429} and load.most_waiting <= 8
        assert all(found == serial[seed] for seed, found in load.drawn.items())
        assert sorted(load.looks)[len(load.looks) // 2] < 0.1
        running.idle()
        assert running.generate(**{**SMALL, "subseed": 0}).status == 200
        assert running.stop() == 0
