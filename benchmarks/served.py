"""A real service on the demonstration model, in processes of its own, for programs that measure or test it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

MAIN = Path(__file__).resolve().parents[1] / "main.py"
LOOK_SECONDS = 0.005
LONGEST_WAIT = 120.0
"""Seconds for a line of the log; a start takes ten on two busy cores."""


class NotLoggedError(Exception):
    """A service did not log what was waited for; the message ends with what it did log."""


@dataclass
class Started:
    """A service that runs: its front's process, the lines of its log, and its port."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    port: int = 0
    _follower: threading.Thread | None = None

    def follow(self) -> None:
        """Read the log, which would hold the service up otherwise."""
        self._follower = threading.Thread(target=self._read, daemon=True)
        self._follower.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    @property
    def pid(self) -> int:
        return self.process.pid

    def logged(self, message: str, seconds: float = LONGEST_WAIT) -> dict[str, Any]:
        """The first line of the log with a message, once it is there.

        Raises:
            NotLoggedError: the service ended before, or it took longer.
        """
        end = time.monotonic() + seconds
        while True:
            ended, late = self.process.poll() is not None, time.monotonic() > end
            if ended and self._follower is not None:
                self._follower.join(1.0)  # what it said last; a worker that lives still may say more
            if found := next((line for line in list(self.lines) if f'"{message}"' in line), None):
                return json.loads(found)
            if ended or late:
                why = f"ended with {self.process.returncode}" if ended else f"took longer than {seconds:g} s"
                raise NotLoggedError(f"the service {why} before it logged {message!r}:\n{''.join(self.lines[-20:])}")
            time.sleep(LOOK_SECONDS)


class Served(Started):
    """One with the client of the measurements."""

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


Kind = TypeVar("Kind", bound=Started)


@contextmanager
def serving(folder: Path, *arguments: str, threads: int | None = None) -> Iterator[Served]:
    """A service that listens; it is ended at the end, and its worker with it.

    Args:
        folder: for its cache.
        arguments: of ``serve``.
        threads: that libraries may use.
    """
    environ = {"XDG_CACHE_HOME": str(folder)}
    if threads is not None:
        environ["OMP_NUM_THREADS"] = str(threads)
    with started(Served, folder, arguments, environ) as served:
        try:
            yield served
        finally:
            served.process.send_signal(signal.SIGTERM)
            served.process.wait(LONGEST_WAIT)


@contextmanager
def started(
    kind: type[Kind], folder: Path, arguments: Sequence[str], environ: Mapping[str, str], within: Sequence[str] = ()
) -> Iterator[Kind]:
    """A service that listens, in a working folder; it is killed at the end, if it runs still.

    Args:
        kind: what it is had as.
        within: a command that runs the one which follows it, in its place.

    Raises:
        NotLoggedError: it does not listen.
    """
    command = [*within, sys.executable, str(MAIN), "serve", "--port", "0", *arguments]
    environment = {**os.environ, **environ}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=folder, env=environment)
    made = kind(process)
    made.follow()
    try:
        made.port = int(made.logged("listening")["url"].rpartition(":")[2])
        yield made
    finally:
        process.kill()  # which does nothing to one that has ended
        process.wait()
