"""What the service sends, as models: the OpenAPI page is made of them. What it takes are the requests."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ...request import GenerationRequest, UpscaleRequest
from .jobs import Job, State
from .messages import Outcome

MEDIA_TYPES = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}

EXAMPLE = {"prompt": "a smiling woman with red hair", "width": 512, "height": 512, "steps": 20, "seed": 1}

_DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg=="
"""A picture of one grey pixel."""

UPSCALE_EXAMPLE = {"images": [_DOT], "by": 2, "upscaler": "Lanczos"}


NULLS = "A field that is null, and may be left out, is as if it were left out."

Size = Annotated[list[int], Field(min_length=2, max_length=2)]  # no tuple: many readers of schemas know none


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Made(_Answer):
    """What is told of pictures, however they were made. Lists have an entry for each picture, in order."""

    format: Literal["png", "jpg", "webp"]
    sizes: list[Size] = Field(description="Width and height of each picture.")
    timings: dict[str, float] = Field(description="Seconds of each stage.")
    peak_memory: int = Field(description="Most memory of the device, in bytes.")
    interrupted: bool = Field(description="The job was ended early: pictures may be missing, or not finished.")
    device: str
    versions: dict[str, str]
    warnings: list[str] = Field(description="Sentences for a person.")


class Told(Made):
    """How drawn pictures came about."""

    seeds: list[int]
    subseeds: list[int]
    infotexts: list[str] = Field(description="The text that each picture carries, in A1111's form.")
    models: list[dict[str, Any]] = Field(description="Role, name and sha256 of each model file.")
    loras: list[dict[str, Any]] = Field(description="What became of each LoRA.")
    details: list[dict[str, Any]] = Field(description="What the detailer found and painted.")
    saved: list[str] = Field(description="Names in the folder of outputs, where the job was to keep its pictures.")


class Enlarged(Made):
    """How enlarged pictures came about."""

    upscalers: list[str] = Field(description="What enlarged them; the second is blended over the first.")


class _Whole(_Answer):
    id: str = Field(description="The job.", examples=["6f0c1c4b2f9d8e71"])
    images: list[str] = Field(description="Each picture's file, in base64.")


class Generated(Told, _Whole):
    """The pictures of a request, in base64."""

    stages: list[dict[str, str]] = Field(description="With save_stages: earlier pictures by stage, in base64.")

    @classmethod
    def of(cls, job: Job) -> Generated:
        outcome = job.result()
        return cls(
            id=job.id,
            format=outcome.format,  # type: ignore[arg-type]
            images=[as_base64(image) for image in outcome.images],
            stages=[{name: as_base64(data) for name, data in stage.items()} for stage in outcome.stages],
            **outcome.told,
        )


class Upscaled(Enlarged, _Whole):
    """The pictures of a request to enlarge some, in base64."""

    @classmethod
    def of(cls, job: Job) -> Upscaled:
        outcome = job.result()
        images = [as_base64(image) for image in outcome.images]
        return cls(id=job.id, format=outcome.format, images=images, **outcome.told)  # type: ignore[arg-type]


class _Placed(_Answer):
    images: list[str] = Field(description="Where each picture is.", examples=[["/jobs/6f0c1c4b2f9d8e71/images/0"]])


class Result(Told, _Placed):
    """What a finished job says of its pictures, and where they are."""


class EnlargedResult(Enlarged, _Placed):
    """What a job that enlarged pictures says of them, and where they are."""


def result_of(job: Job, outcome: Outcome) -> Result | EnlargedResult:
    """What a job that has pictures says of them."""
    kind = EnlargedResult if "upscalers" in outcome.told else Result
    places = [f"/jobs/{job.id}/images/{n}" for n in range(len(outcome.images))]
    return kind(format=outcome.format, images=places, **outcome.told)  # type: ignore[arg-type]


class Error(_Answer):
    """What went wrong: a type of ``errors.py`` or of the service, a sentence, and the field at fault."""

    type: str = Field(examples=["RequestError"])
    message: str = Field(examples=["steps: 5000 is too large; give 1 to 1,000"])
    param: str | None = Field(default=None, examples=["steps"])
    request_id: str | None = None


class ErrorAnswer(_Answer):
    """The body of every answer that is no success."""

    error: Error
    detail: str = Field(description="The message again, where clients of other engines look for it.")


class JobAnswer(_Answer):
    """A job as it is now. Times are in seconds since 1970."""

    id: str
    state: State
    position: int | None = Field(default=None, description="Jobs that are done before it, where it waits.")
    accepted: float
    started: float | None = None
    finished: float | None = None
    progress: dict[str, Any] = Field(default_factory=dict, description="stage, step, steps, fraction, eta_seconds …")
    cancelling: bool = Field(default=False, description="It was cancelled, and ends within a step.")
    result: Result | EnlargedResult | None = None
    interrupted: bool = Field(default=False, description="It was ended early, with the pictures that there were.")
    pictures_gone: bool = Field(default=False, description="The pictures are not kept any more.")
    error: Error | None = None

    @classmethod
    def of(cls, job: Job, position: int | None) -> JobAnswer:
        return cls(
            id=job.id,
            state=job.state,
            position=position,
            accepted=job.accepted,
            started=job.started,
            finished=job.finished,
            progress=job.progress,
            cancelling=job.cancelling,
            result=result_of(job, job.outcome) if job.outcome else None,
            interrupted=job.interrupted,
            pictures_gone=job.gone,
            error=Error(**job.fault.body(job.request_id)["error"]) if job.fault else None,
        )


class JobRow(_Answer):
    """A job in a list; `/jobs/{job_id}` has the rest."""

    id: str
    state: State
    position: int | None = Field(default=None, description="Jobs that are done before it, where it waits.")
    request_id: str
    accepted: float
    started: float | None = None
    finished: float | None = None


class JobList(_Answer):
    """Jobs, the newest first. Times are in seconds since 1970."""

    jobs: list[JobRow]

    @classmethod
    def of(cls, jobs: Sequence[Job], waiting: Iterable[Job], *, busy: bool) -> JobList:
        """
        Args:
            waiting: jobs that wait, in the order of their turns.
            busy: a job runs before them.
        """
        places = {job.id: place for place, job in enumerate(waiting, int(busy))}
        return cls(
            jobs=[
                JobRow(
                    id=job.id,
                    state=job.state,
                    position=places.get(job.id),
                    request_id=job.request_id,
                    accepted=job.accepted,
                    started=job.started,
                    finished=job.finished,
                )
                for job in jobs
            ]
        )


class Health(_Answer):
    """Whether the service can take a job."""

    status: Literal["ready", "not ready"]
    reason: str | None = None
    version: str
    waiting: int = Field(description="Jobs that wait.")
    running: bool = Field(description="Whether a job runs.")
    demonstration: bool | None = Field(default=None, description="Whether it draws with tiny; null: not known yet.")
    loaded: bool | None = Field(
        default=None, description="Whether the model is in memory; false: the next job loads it first; null: not known."
    )
    model: str | None = Field(
        default=None,
        description="In use, as of the last job; null: being loaded, or keys are needed and none was sent.",
    )
    notes: list[str] = Field(default_factory=list, description="On model and settings, for a person; likewise.")


def as_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def request_schemas() -> dict[str, dict[str, Any]]:
    """The schemas of the requests for OpenAPI, and those that they refer to, by name."""
    schemas: dict[str, dict[str, Any]] = {}
    for kind, example in ((GenerationRequest, EXAMPLE), (UpscaleRequest, UPSCALE_EXAMPLE)):
        schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        for field in schema["properties"].values():
            field.pop("section", None)
            field.pop("profiles", None)
        told = f"{schema['description']} {NULLS}"
        schemas[kind.__name__] = {**schema, "description": told, "examples": [example]}
    return schemas
