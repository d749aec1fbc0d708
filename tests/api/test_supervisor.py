"""The front's side of a worker that cannot be started again, or that a message does not reach: no process is needed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

import pytest

from lightweight_engine import Config
from lightweight_engine.apps.server import supervisor
from lightweight_engine.apps.server.faults import Fault, UnavailableError
from lightweight_engine.apps.server.messages import Ended, Interrupt, Quit, Ready, Tend, Tended, Work
from lightweight_engine.apps.server.supervisor import MAX_RESTARTS, Child, Supervisor
from lightweight_engine.errors import MemoryBudgetError
from lightweight_engine.request import GenerationRequest

SECONDS = 10.0


class Worker:
    """The other end of the pipe, in hands of the test."""

    def __init__(self) -> None:
        ours, self.pipe = Pipe()
        self.child = Child(self, ours)  # type: ignore[arg-type]
        self.pid = id(self)
        self.exitcode: int | None = None
        self._ended = threading.Event()

    def kill(self, code: int = -9) -> None:
        if not self._ended.is_set():
            self.exitcode = code
            self.pipe.close()
            self._ended.set()

    def join(self) -> None:
        assert self._ended.wait(SECONDS)


class Starts:
    """Starts workers, but for the tries that fail."""

    def __init__(self, *, failing: int = 0) -> None:
        self.left, self.tries = failing, 0
        self.workers = [Worker()]

    def __call__(self) -> Child:
        self.tries += 1
        if self.left:
            self.left -= 1
            raise BlockingIOError(11, "Resource temporarily unavailable")
        self.workers.append(Worker())
        return self.workers[-1].child


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "START_AGAIN", (0.01,) * 4)


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), SECONDS))


async def until(look: Callable[[], Any]) -> None:
    while not look():
        await asyncio.sleep(0.005)


async def ready(watched: Supervisor, worker: Worker) -> None:
    worker.pipe.send(Ready({"pid": worker.pid}))
    await watched.ready()


async def received(pipe: Connection) -> Any:
    return await asyncio.to_thread(pipe.recv)


def untold(reason: str, exit_code: int) -> None:
    pytest.fail(f"it is no end: {reason}")


def test_a_start_that_fails_is_tried_again() -> None:
    """What the system has no memory for, it may have a second later. What is sent meanwhile reaches the new worker."""

    async def main() -> None:
        starts = Starts(failing=3)
        watched = Supervisor(starts, starts.workers[0].child, untold)
        await ready(watched, starts.workers[0])
        starts.workers[0].kill()
        await until(lambda: starts.tries)
        tended = watched.tend(Tend())
        await until(lambda: len(starts.workers) == 2)
        await ready(watched, starts.workers[1])
        assert (watched.state, watched.restarts, starts.tries) == ("ready", 1, 4)
        assert await received(starts.workers[1].pipe) == Tend()
        starts.workers[1].pipe.send(Tended({}))
        assert await tended == Tended({})
        stopping = asyncio.create_task(watched.stop())
        assert await received(starts.workers[1].pipe) == Quit()
        starts.workers[1].kill(0)
        await stopping

    run(main)


def test_a_start_that_fails_for_good_ends_the_service() -> None:
    async def main() -> None:
        told: list[tuple[str, int]] = []
        starts = Starts(failing=100)
        watched = Supervisor(starts, starts.workers[0].child, lambda *fatal: told.append(fatal))
        starts.workers[0].kill()
        await until(lambda: starts.tries)
        tended = watched.tend(Tend())
        await until(lambda: told)
        assert watched.state == "failed" and starts.tries == 5
        ((reason, exit_code),) = told
        assert exit_code == 1 and "no worker could be started" in reason
        with pytest.raises(UnavailableError):
            await tended
        await watched.stop()

    run(main)


def test_a_first_start_that_fails_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(process: SpawnProcess) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(SpawnProcess, "start", refuse)
    told = r"cannot be started \(Resource temporarily unavailable\); free memory, or raise the limits of its processes"
    with pytest.raises(MemoryBudgetError, match=told):
        supervisor.launch(Config())


def test_the_service_can_be_ended_while_no_worker_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "START_AGAIN", (SECONDS * 10,))

    async def main() -> None:
        starts = Starts(failing=1)
        watched = Supervisor(starts, starts.workers[0].child, untold)
        starts.workers[0].kill()
        await until(lambda: starts.tries)
        await watched.stop()
        assert watched.state == "stopped" and starts.tries == 1

    run(main)


def test_workers_that_die_too_often_end_the_service() -> None:
    async def main() -> None:
        told: list[str] = []
        starts = Starts()
        watched = Supervisor(starts, starts.workers[0].child, lambda reason, _: told.append(reason))
        for count in range(MAX_RESTARTS + 1):
            await until(lambda count=count: len(starts.workers) == count + 1)
            starts.workers[-1].kill()
        await until(lambda: told)
        assert "died 4 times" in told[0] and watched.restarts == MAX_RESTARTS
        await watched.stop()

    run(main)


def test_a_message_that_cannot_be_sent_is_a_fault_of_its_own() -> None:
    """Those that come after it are sent."""

    async def main() -> None:
        starts = Starts()
        watched = Supervisor(starts, starts.workers[0].child, untold)
        await ready(watched, starts.workers[0])
        unpicklable = Work("first", GenerationRequest(), request_id=threading.Lock())  # type: ignore[arg-type]
        ended = await watched.run(unpicklable, lambda moved: None)
        assert ended.fault == Fault.unexpected() and ended.job == "first"
        tended = watched.tend(Tend(threading.Lock()))  # type: ignore[arg-type]
        assert (await tended).fault == Fault.unexpected()
        running = watched.run(Work("second", GenerationRequest()), lambda moved: None)
        watched.interrupt("second", skip=False)
        assert (await received(starts.workers[0].pipe)).job == "second"
        assert await received(starts.workers[0].pipe) == Interrupt("second")
        starts.workers[0].pipe.send(Ended("second"))
        assert (await running).job == "second"
        starts.workers[0].kill(0)
        await watched.stop()

    run(main)


def test_a_worker_that_cannot_be_understood_is_replaced() -> None:
    async def main() -> None:
        starts = Starts()
        watched = Supervisor(starts, starts.workers[0].child, untold)
        await ready(watched, starts.workers[0])
        running = watched.run(Work("job", GenerationRequest()), lambda moved: None)
        starts.workers[0].pipe.send_bytes(b"no pickle")
        with pytest.raises(UnavailableError):
            await running
        assert starts.workers[0].exitcode == -9 and len(starts.workers) == 2
        starts.workers[1].kill(0)
        await watched.stop()

    run(main)
