"""What a caller is told while a job runs, and what it gets back. Loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import Field

from .fields import Frozen
from .request import GenerationRequest, UpscaleRequest


class Progress(Frozen):
    """Where a job is. ``step`` counts finished steps of ``steps`` in ``stage``; ``fraction`` is of the whole job."""

    stage: Literal["load", "encode", "sample", "decode", "upscale", "detect", "detail", "done"]
    step: int = 0
    steps: int = 0
    fraction: float = 0.0
    eta_seconds: float | None = None
    steps_per_second: float | None = None
    image_index: int = 0
    image_count: int = 1
    preview: Any = None  # a PIL image, where previews are on


OnBytes = Callable[[int, int | None], None]
"""Called with the bytes of a file that are here and those there will be (None: not told); what it raises ends the
fetch."""


class ModelFile(Frozen):
    """A model file that took part: its role, path and content hash (sha256, hex)."""

    role: Literal["transformer", "t5", "clip", "autoencoder"]
    name: str
    path: str
    sha256: str | None = None


class AppliedLora(Frozen):
    """What became of a LoRA file.

    Attributes:
        given: as it was asked for, without what is secret in a URL.
        found: modules in the file; ``applied`` of them fit the model.
        patches: network -> changed parameters, counted as the reference does.
        ignored: reason -> tensors that change nothing.
    """

    name: str
    given: str
    sha256: str
    scale: float
    text_scale: float
    found: int
    applied: int
    patches: Mapping[str, int] = Field(default_factory=dict)
    ignored: Mapping[str, tuple[str, ...]] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()


class DetailReport(Frozen):
    """What the detailer did to a picture. Of each pass: ``model``, what it ``found`` (box, score, label), how many
    ``masks`` were left of that, and how many were ``painted``."""

    passes: tuple[Mapping[str, Any], ...] = ()


class GenerationResult(Frozen):
    """What a job made. Seconds in ``timings``, bytes in ``peak_memory``; warnings are sentences for a person.

    ``settings`` are those that decide the numbers of a picture beside its request.

    ``stages`` are, for each picture, those that came before it, by name in their order; with ``save_stages``.

    ``interrupted``: an interrupt ended the job or a batch early. Pictures may be missing, unfinished, or without their
    later passes.
    """

    images: tuple[Any, ...]
    stages: tuple[dict[str, Any], ...] = ()
    seeds: tuple[int, ...]
    subseeds: tuple[int, ...]
    infotexts: tuple[str, ...]
    request: GenerationRequest
    models: tuple[ModelFile, ...] = ()
    loras: tuple[AppliedLora, ...] = ()
    details: tuple[DetailReport, ...] = ()
    timings: dict[str, float] = Field(default_factory=dict)
    peak_memory: int = 0
    interrupted: bool = False
    device: str = "cpu"
    versions: dict[str, str] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class UpscaleResult(Frozen):
    """Enlarged pictures, as ``GenerationResult`` has drawn ones; ``upscalers`` made them."""

    images: tuple[Any, ...]
    request: UpscaleRequest
    upscalers: tuple[str, ...]
    timings: dict[str, float] = Field(default_factory=dict)
    peak_memory: int = 0
    interrupted: bool = False
    device: str = "cpu"
    versions: dict[str, str] = Field(default_factory=dict)
