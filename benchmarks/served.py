"""A real service on the demonstration model, in processes of its own, for programs that measure it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAIN = Path(__file__).resolve().parents[1] / "main.py"
LOOK_SECONDS = 0.005


@dataclass(frozen=True)
class Served:
    """A service that runs: its port, its front's process id, and the file that it logs to."""

    port: int
    pid: int
    log: Path

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and JSON of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            headers = {} if body is None else {"Content-Type": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def logged(self, message: str) -> dict[str, Any]:
        """The first line of the log with a message, once it is there."""
        return logged(self.log, message)


@contextmanager
def serving(folder: Path, *arguments: str, threads: int | None = None) -> Iterator[Served]:
    """A service that listens; it is ended at the end.

    Args:
        folder: for its log and its cache.
        arguments: of ``serve``.
        threads: that libraries may use.
    """
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder)}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    path, command = folder / "log", [sys.executable, str(MAIN), "serve", "--port", "0", *arguments]
    with path.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stderr=log, cwd=folder, env=environment)
    try:
        port = int(logged(path, "listening")["url"].rpartition(":")[2])
        yield Served(port, process.pid, path)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def logged(log: Path, message: str) -> dict[str, Any]:
    while True:
        for line in log.read_text(encoding="utf-8").splitlines():
            if f'"{message}"' in line:
                return json.loads(line)
        time.sleep(LOOK_SECONDS)
