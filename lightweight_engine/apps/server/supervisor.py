"""The front's side of the worker: starts it, talks to it, and starts another one where it died.

A worker that dies too often means a fault that another start does not mend: then the service ends, and whoever
started it decides.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
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
from ...backend.torch_import import import_torch
from ...config import EngineConfig
from ...errors import MemoryBudgetError
from ..interrupts import leave_signals, signals_held
from .faults import Fault, UnavailableError
from .messages import Broken, Cancel, Ended, FromWorker, Interrupt, Moved, Quit, Ready, Tend, Tended, ToWorker, Work

MAX_RESTARTS = 3
RESTART_WINDOW = 600.0  # seconds in which they are counted
START_AGAIN = (1.0, 2.0, 4.0, 8.0)
"""Seconds before each further try, where the system starts no process: memory may be short just after a worker died of
that, and comes back."""
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
    """Start a worker. It is spawned, not forked: threads and open sockets of this process are no part of it.

    Ctrl-C and SIGTERM meanwhile act when it has begun, and on this process alone.

    Raises:
        MemoryBudgetError: the system starts no further process.
    """
    context = multiprocessing.get_context("spawn")
    try:
        ours, theirs = context.Pipe()
        process = context.Process(target=_run_worker, args=(theirs, config, secrets), name="engine")
        try:
            with signals_held():
                process.start()
        except BaseException:  # Ctrl-C too, at which the worker has begun: it ends with its pipe
            ours.close()
            raise
    except OSError as error:
        limits = "the limits of its processes and open files (ulimit -u, ulimit -n; TasksMax, a container's pids limit)"
        told = f"the worker's process cannot be started ({error.strerror or error})"
        raise MemoryBudgetError(f"{told}; free memory, or raise {limits}") from error
    theirs.close()
    return Child(process, ours)


def _run_worker(connection: Connection, config: EngineConfig, secrets: tuple[str, ...]) -> None:
    """The first thing that runs in the child; what it imports is for that process alone."""
    leave_signals()
    inbox: queue.SimpleQueue[ToWorker] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, inbox), name="receiver", daemon=True).start()
    from ...core import head_start

    head_start.begin(config)
    with collector_paused(keep=True):
        import_torch()
        from .worker import serve_jobs

    serve_jobs(connection, inbox, config, secrets)


def _receive(connection: Connection, inbox: queue.SimpleQueue[ToWorker]) -> None:
    """Take what the front sends, and end the process when that has gone, which may import for seconds yet."""
    try:
        while True:
            inbox.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)


class Supervisor:
    """Keeps one worker and gives it one job at a time.

    Args:
        child: a worker that was started already; a later one is started by ``start``.
        on_fatal: told of the reason and the exit code when no worker can be had any more.
    """

    def __init__(self, start: Callable[[], Child], child: Child, on_fatal: Callable[[str, int], None]) -> None:
        self._start, self._child, self._on_fatal = start, child, on_fatal
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._gone = asyncio.Event()
        self._current: tuple[str, asyncio.Future[Ended], OnMoved] | None = None
        self._tended: deque[tuple[Tend, asyncio.Future[Tended]]] = deque()
        self._deaths: deque[float] = deque()
        self._excused = False
        self._again: asyncio.TimerHandle | None = None
        self.state: State = "starting"
        self.facts: Mapping[str, Any] = {}
        self.restarts = 0
        self._outbox: Outbox = queue.SimpleQueue()
        self._open(child)

    @property
    def pid(self) -> int | None:
        return self._child.process.pid

    async def ready(self) -> None:
        """Wait until there is a worker with a model."""
        await self._ready.wait()

    def run(self, work: Work, on_moved: OnMoved) -> asyncio.Future[Ended]:
        """Give a job to the worker, which is ready; what is sent after this call comes after the job.

        Returns:
            How the job ended, with a fault also where it could not be sent; UnavailableError, if the worker died
            meanwhile.
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
        self._tended.append((tend, tended))
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
        if self._again is not None:  # there is none, and none is to come
            self._again.cancel()
            self._gone.set()
        elif before == "starting":  # it does not listen yet, and has nothing to lose
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

    def _open(self, child: Child) -> None:
        """Talk with a worker, in threads: a long message to one that does not listen must not hold up the front."""
        outbox = self._outbox

        def send() -> None:
            while (message := outbox.get()) is not None:
                try:
                    child.connection.send(message)
                except OSError:  # it has just died, which the other thread notices
                    return
                except Exception:  # of this message alone: nothing of it was sent, and the next ones are to be
                    log.exception("a message could not be sent to the worker")
                    self._soon(self._unsent, message)

        def receive() -> None:
            try:
                while True:
                    self._soon(self._told, child.connection.recv())
            except (EOFError, OSError):
                pass
            except Exception:  # what comes after it cannot be told apart any more
                log.exception("a message of the worker could not be read")
                child.process.kill()
            child.process.join()
            outbox.put(None)
            self._soon(self._lost, child)

        for function in (send, receive):
            threading.Thread(target=function, name=f"worker {function.__name__}", daemon=True).start()

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
            self._fail(message.reason, message.exit_code)
        elif isinstance(message, Tended):
            self.facts = message.facts
            if self._tended and not (tended := self._tended.popleft()[1]).done():
                tended.set_result(message)
        elif self._current is not None and message.job == self._current[0]:
            if isinstance(message, Moved):
                self._current[2](message)
            else:
                self.facts = message.facts
                self._current[1].set_result(message)
                self._current = None

    def _unsent(self, message: ToWorker) -> None:
        """Whoever waits for what comes of a message that was not sent is told so."""
        if isinstance(message, Work):
            self._told(Ended(message.job, fault=Fault.unexpected(), facts=self.facts))
        elif isinstance(message, Tend):
            for tend, tended in [each for each in self._tended if each[0] is message]:
                self._tended.remove((tend, tended))
                if not tended.done():
                    tended.set_result(Tended(self.facts, Fault.unexpected()))

    def _lost(self, child: Child) -> None:
        self._drop_tended()
        if self.state in ("stopped", "failed"):
            self._gone.set()
            return
        code = child.process.exitcode
        log.error("the worker died", extra={"exit_code": code})
        self.state = "starting"
        self._ready.clear()
        self._outbox = queue.SimpleQueue()
        if self._current is not None:
            told = f"the worker ended while it drew (exit code {code}); another is started: send the request again"
            self._current[1].set_exception(UnavailableError(told, headers={"Retry-After": "10"}))
            self._current = None
        excused, self._excused = self._excused, False
        if excused or self._may_restart():
            self._replace()
        else:
            self._end(f"the worker died {MAX_RESTARTS + 1} times in {RESTART_WINDOW / 60:.0f} minutes; see the log")

    def _replace(self, tries: int = 0) -> None:
        """Start another worker in place of the one that died, as soon as the system has room for one."""
        self._again = None
        try:
            child = self._start()
        except Exception:
            log.exception("no worker could be started")
            if tries < len(START_AGAIN):
                self._again = self._loop.call_later(START_AGAIN[tries], self._replace, tries + 1)
            else:
                self._end(f"no worker could be started in {sum(START_AGAIN):g} s; see the log")
            return
        self.restarts += 1
        self._child = child
        self._open(child)

    def _drop_tended(self) -> None:
        while self._tended:
            if not (tended := self._tended.popleft()[1]).done():
                tended.set_exception(UnavailableError("the worker ended meanwhile", headers={"Retry-After": "10"}))

    def _may_restart(self) -> bool:
        now = time.monotonic()
        while self._deaths and now - self._deaths[0] > RESTART_WINDOW:
            self._deaths.popleft()
        self._deaths.append(now)
        return len(self._deaths) <= MAX_RESTARTS

    def _end(self, told: str) -> None:
        """There is no worker, and none is started any more."""
        self._gone.set()
        self._drop_tended()
        self._fail(told, 1)

    def _fail(self, reason: str, exit_code: int) -> None:
        self.state = "failed"
        self._on_fatal(reason, exit_code)
