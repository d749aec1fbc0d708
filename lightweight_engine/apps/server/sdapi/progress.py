"""Where the running task is, and what ends it early; of all tasks together, and of one by its name."""

from __future__ import annotations

import platform
from typing import Any

from fastapi import APIRouter, Request

from .... import __version__
from ..bodies import read_json
from ..native import errors
from ..schemas import as_base64
from .answers import timestamp
from .models import ProgressResponse, TaskProgressRequest, TaskProgressResponse
from .session import PREFIX, Session, Task

_BEGUN = 0.01  # what a task shows as soon as it runs, so that clients see that it does


def progress_routes(session: Session) -> APIRouter:
    """``/progress``, ``/interrupt`` and ``/skip``."""
    router = APIRouter(prefix=PREFIX)

    @router.get("/progress", response_model=ProgressResponse, responses=errors(401, 422))
    async def progress(skip_current_image: bool = False) -> ProgressResponse:
        """Of the task that runs, or waits first: fraction, seconds left, and a picture of it where previews are on."""
        task = session.latest
        job = task.job if task is not None and not task.job.over else None
        image = job.preview if job is not None and not skip_current_image else None
        return ProgressResponse(
            progress=_fraction(task),
            eta_relative=_eta(task),
            state=_state(task),
            current_image=None if image is None else as_base64(image),
            textinfo=job.progress.get("stage") if job is not None else None,
        )

    @router.post("/interrupt", responses=errors(401))
    async def interrupt() -> dict[str, Any]:
        """End the running task within a step: its call is answered with the pictures so far."""
        session.interrupt()
        return {}

    @router.post("/skip", responses=errors(401))
    async def skip() -> None:
        """End the batch that is being drawn within a step, and go on with the next."""
        session.skip()

    return router


def internal_routes(session: Session) -> APIRouter:
    """What the pages of WebUI ask: tasks by the name that ``force_task_id`` gave them."""
    router = APIRouter(prefix="/internal")

    @router.get("/ping", responses=errors(401))
    async def ping() -> dict[str, Any]:
        """The service runs."""
        return {}

    @router.get("/pending-tasks", responses=errors(401))
    async def pending_tasks() -> dict[str, Any]:
        """Tasks that wait, in the order of their turns."""
        tasks = [task.id for task in session.pending]
        return {"size": len(tasks), "tasks": tasks}

    @router.post(
        "/progress",
        response_model=TaskProgressResponse,
        responses=errors(400, 401, 408, 413, 415, 422),
        openapi_extra=TaskProgressRequest.openapi(),
    )
    async def progress(request: Request) -> TaskProgressResponse:
        """Where one task is. `id_live_preview`: of the preview that the caller has already."""
        asked = TaskProgressRequest.read(await read_json(request, session.service.max_body))
        return _of_task(session.task(asked.id_task or ""), asked)

    @router.get("/sysinfo", responses=errors(401))
    async def sysinfo() -> dict[str, Any]:
        """Versions and the device."""
        facts = session.service.supervisor.facts
        return {
            "Platform": platform.platform(),
            "Python": platform.python_version(),
            "Version": f"lightweight-engine {__version__}",
            "Device": facts.get("device"),
            "Packages": facts.get("versions", {}),
        }

    return router


def _of_task(task: Task | None, asked: TaskProgressRequest) -> TaskProgressResponse:
    state = "unknown" if task is None else task.job.state
    preview = None if task is None else task.job.preview
    version = -1 if task is None or preview is None else task.job.version
    fresh = preview is not None and asked.live_preview and version != asked.id_live_preview
    return TaskProgressResponse(
        active=state == "running",
        queued=state == "queued",
        completed=task is not None and task.job.over,
        progress=_fraction(task) if state == "running" else None,
        eta=_eta(task) if state == "running" else None,
        live_preview=f"data:image/jpeg;base64,{as_base64(preview)}" if preview and fresh else None,
        id_live_preview=version,
        textinfo={"queued": "Waiting...", "running": task and task.job.progress.get("stage")}.get(state),
    )


def _fraction(task: Task | None) -> float:
    if task is None or task.job.state != "running":
        return 0.0
    return max(_BEGUN, min(float(task.job.progress.get("fraction", 0.0)), 1.0))


def _eta(task: Task | None) -> float:
    if task is None or task.job.state != "running":
        return 0.0
    return float(task.job.progress.get("eta_seconds") or 0.0)


def _state(task: Task | None) -> dict[str, Any]:
    """Forge's ``state``: of the last task once it is over, whose flags stay until the next."""
    active = task is not None and not task.job.over
    told = task.job.progress if task is not None and active else {}
    rounds = task.rounds if task is not None and active else 0
    return {
        "skipped": task is not None and task.skipped,
        "interrupted": task is not None and task.interrupted,
        "stopping_generation": False,
        "job": task.id if task is not None and active else "",
        "job_count": rounds,
        "job_timestamp": timestamp(task.job.started if task is not None else None),
        "job_no": told.get("image_index", 0) * rounds // max(told.get("image_count", 1), 1),
        "sampling_step": told.get("step", 0),
        "sampling_steps": told.get("steps", 0),
    }
