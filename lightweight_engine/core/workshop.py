"""The detailer's passes at work: on each picture of a batch, every mask painted by a job of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from PIL import Image

from ..flux.conditioner import resolve_guidance
from ..request import GenerationRequest
from ..results import DetailReport
from ..upscalers.picture import Picture
from .mask_request import request_of
from .processing import Batch, Job, draw, finished

if TYPE_CHECKING:
    from ..extensions.adetailer import Outer, PassReport, Repaint


@dataclass(eq=False)
class Workshop:
    """Where masks are painted.

    Args:
        plan: makes an inner job of a request.
        enter: called with ``detect`` and ``detail`` as they begin.

    Attributes:
        jobs: those that painted.
        reports: of each picture.
        stages: of each picture, how each pass left it, where the request keeps that.
    """

    plan: Callable[[GenerationRequest], Job]
    enter: Callable[[str], None]
    jobs: list[Job] = field(default_factory=list)
    reports: list[DetailReport] = field(default_factory=list)
    stages: list[dict[str, Image.Image]] = field(default_factory=list)

    def leave_out(self) -> None:
        """The next picture is left as it is."""
        self.reports.append(DetailReport())
        self.stages.append({})

    def refiner(self, job: Job, batch: Batch) -> Callable[[list[Picture]], list[Picture]]:
        """What is done to the pictures of a batch."""
        return partial(detail, job, batch, self) if job.detailing else list


def detail(job: Job, batch: Batch, workshop: Workshop, pictures: Sequence[Picture]) -> list[Picture]:
    """Pictures of a batch after all passes."""
    assert job.detailing is not None
    results = []
    for number, picture in enumerate(pictures):
        if job.ends():
            workshop.leave_out()
            results.append(picture)
            continue
        outer = _outer(job, batch.first + number)
        prompt = outer.prompts[outer.index]
        workshop.enter("detect")
        done = job.detailing.detailer.detail(
            picture, job.detailing.passes, outer, lambda one, prompt=prompt: _paint(job, one, prompt, workshop)
        )
        workshop.reports.append(_told(done.reports))
        kept = done.reports if job.request.save_stages else ()
        workshop.stages.append({f"pass {i}": report.image for i, report in enumerate(kept, 1)})
        results.append(done.picture)
    if batch is job.batches[-1]:
        job.warnings.extend(found_nothing(workshop.reports))
    return results


def found_nothing(reports: Sequence[DetailReport]) -> list[str]:
    """A warning of the passes that found nothing on any picture that they looked at, where there are such."""
    looked = [report.passes for report in reports if report.passes]
    passes = list(zip(*looked, strict=True))
    names = [
        f"{each[0]['model']}{f' (pass {number})' if len(passes) > 1 else ''}"
        for number, each in enumerate(passes, 1)
        if not any(row["found"] for row in each)
    ]
    where = "any picture" if len(looked) > 1 else "the picture"
    return [f"adetailer: {' and '.join(names)} found nothing on {where}"] if names else []


def _outer(job: Job, index: int) -> Outer:
    from ..extensions.adetailer import Outer  # imported by now, as the detailer is at work

    everyone = [row for each in job.batches for row in each.rows]
    request = job.request
    return Outer(
        prompts=tuple(prompt for _, _, prompt in everyone),
        negative_prompts=(request.negative_prompt,) * len(everyone),
        seeds=tuple(seed for seed, _, _ in everyone),
        subseeds=tuple(subseed for _, subseed, _ in everyone),
        size=(job.size[1], job.size[0]),
        steps=request.steps,
        cfg_scale=request.cfg_scale,
        distilled_cfg_scale=resolve_guidance(request.distilled_cfg_scale, True, request.compat) or 0.0,
        sampler=job.sampler,
        scheduler=job.scheduler,
        index=index,
        mask=_painted(job, index),
    )


def _painted(job: Job, index: int) -> Image.Image | None:
    """The mask of an inpainting job that painted the whole picture."""
    if job.begin is None:
        return None
    prepared = job.begin.of(index)
    return prepared.overlay_mask if prepared.paste_to is None else None


def _paint(job: Job, repaint: Repaint, outer_prompt: str, workshop: Workshop) -> Picture | None:
    """Paint one mask by a job of its own; None where it was interrupted, or would be now."""
    if job.ends():
        return None
    workshop.enter("detail")
    inner = workshop.plan(request_of(job.request, repaint, outer_prompt))
    workshop.jobs.append(inner)
    (batch,) = inner.batches
    drawn = draw(inner, batch)
    workshop.enter("detect")
    if job.ends():
        return None
    (picture,) = finished(inner, batch, drawn.pixels)
    return picture


def _told(reports: Sequence[PassReport]) -> DetailReport:
    return DetailReport(
        passes=tuple(
            {
                "model": report.args.ad_model,
                "found": [{"box": each.box, "score": each.score, "label": each.label} for each in report.found],
                "masks": len(report.targets),
                "painted": report.painted,
            }
            for report in reports
        )
    )
