"""What the API remembers between requests: options, and which jobs are its own, by task. All of it ends with the
process."""

from __future__ import annotations

from dataclasses import dataclass

from ....config import EngineConfig
from ..faults import ConflictError
from ..jobs import Job
from ..service import Service
from .options import Options

PREFIX = "/sdapi/v1"
"""Each router has it itself: metrics tell the address of a route as its own router knows it."""
MAX_TASKS = 256


@dataclass(eq=False)
class Task:
    """A job of this API, under the name that its caller gave it or its own.

    Attributes:
        rounds: that it draws, as clients count jobs.
    """

    id: str
    job: Job
    rounds: int = 1
    skipped: bool = False
    interrupted: bool = False


class Session:
    """The state of the API for all its callers, as Forge has it."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.options = initial_options(service.config)
        self._tasks: dict[str, Task] = {}

    def follow(self, job: Job, task_id: str | None = None, rounds: int = 1) -> Task:
        """Remember a job that was accepted just now. The name of a task that is over passes on to the new job.

        Raises:
            ConflictError: another task of that name waits or runs; the job is cancelled before it begins.
        """
        task = Task(task_id or f"task({job.id})", job, rounds)
        taken = self._tasks.get(task.id)
        if taken is not None and taken.job is not job and not taken.job.over:
            self.service.cancel(job)
            told = (
                f"force_task_id: a task called {task.id!r:.80} is {taken.job.state}; give another name, or wait for it"
            )
            raise ConflictError(told, param="force_task_id")
        self._tasks.pop(task.id, None)
        self._tasks[task.id] = task
        while len(self._tasks) > MAX_TASKS:
            del self._tasks[next(iter(self._tasks))]
        return task

    def task(self, task_id: str) -> Task | None:
        return self._tasks.get(task_id)

    @property
    def pending(self) -> list[Task]:
        """Tasks that wait, in the order of their turns."""
        return [task for job in self.service.waiting for task in self._tasks.values() if task.job is job]

    @property
    def running(self) -> Task | None:
        job = self.service.running
        return next((task for task in self._tasks.values() if task.job is job and not task.job.over), None)

    @property
    def latest(self) -> Task | None:
        """The task that runs, else that which waits first, else the last one."""
        waiting = self.pending
        last = next(reversed(self._tasks.values()), None)
        return self.running or (waiting[0] if waiting else last)

    def interrupt(self) -> None:
        """End the running task with its pictures so far; nothing happens where none runs."""
        if (task := self.running) is not None:
            self.service.interrupt(task.job)
            task.interrupted = True

    def skip(self) -> None:
        """End the batch that is being drawn likewise, and go on with the next."""
        if (task := self.running) is not None:
            self.service.skip(task.job)
            task.skipped = True


def initial_options(config: EngineConfig) -> Options:
    """The options before somebody sets one: what is configured elsewhere is shown as it is."""
    return Options(randn_source=config.noise_source, samples_format=config.output_format)
