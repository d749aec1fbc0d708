"""The front's side of the worker: starts it, talks to it, and starts another one where it died.

A worker that dies too often means a fault that another start does not mend: then the service ends, and whoever
started it decides.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Literal

from ...backend.processes import collector_paused, resident_bytes
from ...config import EngineConfig
from .faults import Fault, UnavailableError
from .messages import Broken, Cancel, Ended, FromWorker, Interrupt, Moved, Quit, Ready, Tend, Tended, ToWorker, Work

MAX_RESTARTS = 3
RESTART_WINDOW = 600.0  # seconds in which they are counted
_EXIT_SECONDS = 5.0  # that a worker is given to end when its pipe is closed

State = Literal["starting", "ready", "failed", "stopped"]
OnMoved = Callable[[Moved], None]
Outbox = queue.SimpleQueue[ToWorker | None]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Child:
    """A worker and the pipe to it."""

    process: BaseProcess
    connection: Connection


def launch(config: EngineConfig, secrets: tuple[str, ...] = ()) -> Child:
    """Start a worker. It is spawned, not forked: threads and open sockets of this process are no part of it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run_worker, args=(theirs, config, secrets), name="engine")
    process.start()
    theirs.close()
    return Child(process, ours)


def _run_worker(connection: Connection, config: EngineConfig, secrets: tuple[str, ...]) -> None:
    """The first thing that runs in the child; what it imports is for that process alone."""
    from ...core import head_start

    head_start.begin(config)
    with collector_paused(keep=True):
        from .worker import serve_jobs

    serve_jobs(connection, config, secrets)


class Supervisor:
    """Keeps one worker and gives it one job at a time.

    Args:
        child: a worker that was started already; a later one is started by ``start``.
        on_fatal: told of the fault and the exit code when no worker can be had any more.
    """

    def __init__(self, start: Callable[[], Child], child: Child, on_fatal: Callable[[Fault, int], None]) -> None:
        self._start, self._child, self._on_fatal = start, child, on_fatal
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._gone = asyncio.Event()
        self._current: tuple[str, asyncio.Future[Ended], OnMoved] | None = None
        self._tended: deque[asyncio.Future[Tended]] = deque()
        self._deaths: deque[float] = deque()
        self._excused = False
        self.state: State = "starting"
        self.facts: Mapping[str, Any] = {}
        self.restarts = 0
        self._outbox = self._open(child)

    @property
    def pid(self) -> int | None:
        return self._child.process.pid

    async def ready(self) -> None:
        """Wait until there is a worker with a model."""
        await self._ready.wait()

    def run(self, work: Work, on_moved: OnMoved) -> asyncio.Future[Ended]:
        """Give a job to the worker, which is ready; what is sent after this call comes after the job.

        Returns:
            How the job ended; UnavailableError, if the worker died meanwhile.
        """
        ended: asyncio.Future[Ended] = self._loop.create_future()
        self._current = work.job, ended, on_moved
        self._outbox.put(work)
        return ended

    def cancel(self, job: str) -> None:
        """Ask for the end of a job within a step; nothing happens if it is over."""
        self._outbox.put(Cancel(job))

    def interrupt(self, job: str, *, skip: bool) -> None:
        """Ask for the end of a job, or of its batch, with what there is; nothing happens if it is over."""
        self._outbox.put(Interrupt(job, skip))

    def tend(self, tend: Tend) -> asyncio.Future[Tended]:
        """Have something done when the job that runs is over, if there is one.

        Returns:
            How it ended; UnavailableError, if the worker died meanwhile.

        Raises:
            UnavailableError: there is no worker any more.
        """
        if self.state not in ("starting", "ready"):
            raise UnavailableError("the service is ending")
        tended: asyncio.Future[Tended] = self._loop.create_future()
        self._tended.append(tended)
        self._outbox.put(tend)
        return tended

    def kill(self, *, counts: bool = True) -> None:
        """End the worker at once, as it does not answer. Another one is started.

        Args:
            counts: it is one of the deaths of which only some are allowed.
        """
        self._excused = not counts
        log.error("the worker does not stop its job, and is ended")
        self._child.process.kill()

    async def stop(self) -> None:
        """End the worker for good."""
        if self.state == "stopped":
            return
        before, self.state = self.state, "stopped"
        if before == "starting":  # it does not listen yet, and has nothing to lose
            self._child.process.kill()
        else:
            self._outbox.put(Quit())
        try:
            await asyncio.wait_for(self._gone.wait(), _EXIT_SECONDS)
        except TimeoutError:
            self._child.process.kill()
            await self._gone.wait()

    def resident_bytes(self) -> int:
        """Memory of the worker's process on the host; 0 where that cannot be known."""
        return resident_bytes(self.pid)

    def _open(self, child: Child) -> Outbox:
        """Talk with a worker, in threads: a long message to one that does not listen must not hold up the front."""
        outbox: Outbox = queue.SimpleQueue()

        def send() -> None:
            try:
                while (message := outbox.get()) is not None:
                    child.connection.send(message)
            except OSError:  # it has just died, which the other thread notices
                pass

        def receive() -> None:
            try:
                while True:
                    self._soon(self._told, child.connection.recv())
            except (EOFError, OSError):
                child.process.join()
                outbox.put(None)
                self._soon(self._lost, child)

        for function in (send, receive):
            threading.Thread(target=function, name=f"worker {function.__name__}", daemon=True).start()
        return outbox

    def _soon(self, function: Callable[..., None], *args: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop is closed: nobody waits any more
            pass

    def _told(self, message: FromWorker) -> None:
        if isinstance(message, Ready):
            self.state, self.facts = "ready", message.facts
            self._ready.set()
            log.info("the worker is ready", extra={"model": message.facts.get("model"), "pid": self.pid})
        elif isinstance(message, Broken):
            self._fail(message.fault, message.exit_code)
        elif isinstance(message, Tended):
            self.facts = message.facts
            if self._tended and not (tended := self._tended.popleft()).done():
                tended.set_result(message)
        elif self._current is not None and message.job == self._current[0]:
            if isinstance(message, Moved):
                self._current[2](message)
            else:
                self.facts = message.facts
                self._current[1].set_result(message)
                self._current = None

    def _lost(self, child: Child) -> None:
        while self._tended:
            if not (tended := self._tended.popleft()).done():
                tended.set_exception(UnavailableError("the worker ended meanwhile", headers={"Retry-After": "10"}))
        if self.state in ("stopped", "failed"):
            self._gone.set()
            return
        code = child.process.exitcode
        log.error("the worker died", extra={"exit_code": code})
        self.state = "starting"
        self._ready.clear()
        if self._current is not None:
            told = f"the worker ended while it drew (exit code {code}); another is started: send the request again"
            self._current[1].set_exception(UnavailableError(told, headers={"Retry-After": "10"}))
            self._current = None
        excused, self._excused = self._excused, False
        if excused or self._may_restart():
            self.restarts += 1
            self._child = self._start()
            self._outbox = self._open(self._child)
        else:
            self._gone.set()
            message = f"the worker died {MAX_RESTARTS + 1} times in {RESTART_WINDOW / 60:.0f} minutes; see the log"
            self._fail(Fault("WorkerLost", message, 503), 1)

    def _may_restart(self) -> bool:
        now = time.monotonic()
        while self._deaths and now - self._deaths[0] > RESTART_WINDOW:
            self._deaths.popleft()
        self._deaths.append(now)
        return len(self._deaths) <= MAX_RESTARTS

    def _fail(self, fault: Fault, exit_code: int) -> None:
        self.state = "failed"
        self._on_fatal(fault, exit_code)
