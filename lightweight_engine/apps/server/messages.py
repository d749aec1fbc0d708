"""What front and worker say to each other, through a pipe between a process and its own child."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ...request import Task
from .faults import Fault


@dataclass(frozen=True)
class Work:
    """To the worker: do this job. ``request_id`` goes into its log; steps between previews, 0 is none; ``save`` keeps
    what is drawn in the folder of outputs too; ``hashed`` as the engine has it."""

    job: str
    request: Task
    request_id: str = ""
    preview_every: int = 0
    save: bool = False
    hashed: bool = True


@dataclass(frozen=True)
class Cancel:
    """To the worker: stop this job within a step."""

    job: str


@dataclass(frozen=True)
class Interrupt:
    """To the worker: end this job with the pictures so far; or with ``skip`` the batch that it draws, and go on."""

    job: str
    skip: bool = False


@dataclass(frozen=True)
class Tend:
    """To the worker, between jobs: list the models folder anew; before, ``unload`` or ``load`` the model in use."""

    model: Literal["keep", "unload", "load"] = "keep"


@dataclass(frozen=True)
class Quit:
    """To the worker: end now."""


@dataclass(frozen=True)
class Ready:
    """The engine is set up. ``facts``: see ``facts.Facts``."""

    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Broken:
    """The engine cannot be set up. The reason is for the log: callers are told that the service ends."""

    reason: str
    exit_code: int


@dataclass(frozen=True)
class Moved:
    """A job went on: the fields of ``Progress``, and a picture of it as a JPEG where previews are on."""

    job: str
    progress: Mapping[str, Any]
    preview: bytes | None = None


@dataclass(frozen=True)
class Outcome:
    """The pictures of a job as files, and the rest of its ``GenerationResult`` as JSON data."""

    format: str
    images: Sequence[bytes]
    stages: Sequence[Mapping[str, bytes]]
    told: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.images)) + sum(len(each) for stage in self.stages for each in stage.values())


@dataclass(frozen=True)
class Ended:
    """A job is over: it has an ``outcome`` or a ``fault``. ``facts`` are as they are now."""

    job: str
    outcome: Outcome | None = None
    fault: Fault | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tended:
    """What was to be done between jobs is done, or has a ``fault``. ``facts`` are as they are now."""

    facts: Mapping[str, Any]
    fault: Fault | None = None


ToWorker = Work | Cancel | Interrupt | Tend | Quit
FromWorker = Ready | Broken | Moved | Ended | Tended
