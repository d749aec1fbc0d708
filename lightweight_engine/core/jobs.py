"""From a request to a job: names resolved, seeds drawn, sizes settled, limits checked, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from PIL import Image
from torch import Tensor

from ..backend.pace import Laps
from ..extensions.hires_fix import LATENT_MODES, LatentMode
from ..flux.conditioner import Conditioner
from ..request import GenerationRequest
from ..upscalers.library import Coming
from ..upscalers.upscaler import NONE, Upscaler
from .finite import check_finite
from .idle_fields import without_effect
from .images import to_images
from .limits import check_fields
from .named import at_home
from .networks import Networks
from .passes import Pass, Tools, check_work, first_pass, hires_pass, plan_passes
from .plan import HIRES, IN_EFFECT, Plan
from .processing import Hires, Job
from .progress import Tracker, Watch, fetching
from .recovery import Recovery
from .start_pictures import StartPictures, read_start

if TYPE_CHECKING:
    from .detailing import Detailing


def plan_job(
    request: GenerationRequest, tools: Tools, watch: Watch, prompts: Sequence[str] = ()
) -> tuple[Job, Tracker]:
    """Everything about a request that can be known beforehand.

    Args:
        prompts: one for each picture, instead of the request's own for all.

    Raises:
        RequestError: a field is wrong or over a limit.
        EngineError: a LoRA, a picture or an upscaler cannot be had or used.
    """
    config, networks = tools.config, tools.networks
    check_fields(request, config)
    warnings = without_effect(request)
    asked, request = request, _at_home(request, tools)
    first = first_pass(request, tools, warnings, fetching(watch), prompts)
    second, target = hires_pass(first, tools, warnings, fetching(watch))
    if request.hr_upscaler != asked.hr_upscaler and target and target.grows(first.size):
        own = f"the demonstration model enlarges with its own {request.hr_upscaler}"
        warnings.append(f"{asked.hr_upscaler} is not there: {own}")
    _check_work(first, second, tools)
    begin = _start_pictures(first, tools, warnings)
    memory = plan_passes(first, second, target, tools)
    detailing, details = _detailing(first, tools, warnings)
    for plan in (memory, *details):
        plan.check()
    if memory.residency not in IN_EFFECT:
        warnings.append(f"residency: {memory.residency}; see what it takes by `plan`, and make room or ask for less")
    networks.follow(memory)
    tracker = Tracker(
        [each.steps for each in (first, second) if each],
        [len(batch.seeds) for batch in first.batches],
        watch,
        Laps(networks.device),
        _previewer(networks) if watch.preview_every else None,
    )
    job = replace(_job(first, tools, memory, tracker, 0, warnings, begin), detailing=detailing)
    if second is None or target is None:
        return job, tracker
    plan = memory.then[HIRES]
    hires = _job(second, tools, plan, tracker, 1, warnings)
    method = _method(request, tools, plan, tracker)
    if isinstance(method, Coming):
        job = _checking(job, method.check)
    again = {batch.first: batch for batch in second.batches}
    return replace(job, hires=Hires(hires, target, method, again)), tracker


def plan_request(request: GenerationRequest, tools: Tools, *, asked: bool = True) -> Plan:
    """The memory plan of a request: what it takes of the device, pass by pass and stage by stage.

    Args:
        asked: somebody asks for it, so that more work than the configuration allows is refused.

    Raises:
        EngineError: as ``plan_job``, but for pictures, which are not read.
    """
    request = _at_home(request, tools)
    first = first_pass(request, tools, [], lambda *_: None)
    second, target = hires_pass(first, tools, [], lambda *_: None)
    if asked:
        _check_work(first, second, tools)
    memory = plan_passes(first, second, target, tools)
    _, details = _detailing(first, tools, [])
    return replace(memory, then={**memory.then, **{f"detail {i}": plan for i, plan in enumerate(details, 1)}})


def _check_work(first: Pass, second: Pass | None, tools: Tools) -> None:
    for each in filter(None, (first, second)):
        check_work(each, tools.config)


def _detailing(first: Pass, tools: Tools, warnings: list[str]) -> tuple[Detailing | None, list[Plan]]:
    """The detailer's passes that a request asks for, each with its plan. The detailer is imported by those that ask."""
    request = first.request
    if not request.detailed:
        return None, []
    from .detailing import detailing_of, idle_detailing, plan_detailing

    detailing = detailing_of(request, tools)
    warnings += idle_detailing(detailing)
    return detailing, plan_detailing(detailing, first, tools) if detailing else []


def _at_home(request: GenerationRequest, tools: Tools) -> GenerationRequest:
    return at_home(request, is_tiny=tools.networks.models.is_tiny, upscalers=tools.upscalers.names)


def _job(
    each: Pass,
    tools: Tools,
    memory: Plan,
    tracker: Tracker,
    number: int,
    warnings: list[str],
    begin: StartPictures | None = None,
) -> Job:
    request, networks = each.request, tools.networks
    attempt = Recovery(networks, memory, warnings)

    def enter(stage: str) -> None:
        tracker.enter(stage, number)
        networks.follow(attempt.plan)
        networks.enter(stage, attempt.plan)  # type: ignore[arg-type]

    return Job(
        request=request,
        networks=networks,
        conditioner=Conditioner(
            networks.text_encoders,
            networks.models.key,
            tools.embeddings,
            request.emphasis,
            request.compat,
            partial(check_finite, networks, wait=True),  # they are remembered
        ),
        sampler=each.sampler,
        scheduler=each.scheduler,
        schedule=each.schedule,
        forecast=each.forecast,
        size=each.size,
        noise_source=request.noise_source or tools.config.noise_source,
        begin=begin,
        attempt=attempt,
        enter=enter,
        after_step=tracker.after_step,
        ends=tracker.ends,
        warnings=warnings,
        batches=each.batches,
        base_steps=each.base_steps,
    )


def _checking(job: Job, check: Callable[[], None]) -> Job:
    """A job that calls ``check`` at every stage and step, which may raise to end it."""

    def enter(stage: str) -> None:
        check()
        job.enter(stage)

    def after_step(step: int, latent: Tensor, denoised: Tensor) -> None:
        check()
        job.after_step(step, latent, denoised)

    return replace(job, enter=enter, after_step=after_step)


def _start_pictures(first: Pass, tools: Tools, warnings: list[str]) -> StartPictures | None:
    name = first.request.img2img_upscaler
    upscaler = None
    if first.request.image is not None and name.lower() != "none":
        unknown = first.request.compat == "forge" and name not in tools.upscalers.names()
        upscaler = NONE if unknown else tools.upscalers.find(name, field="img2img_upscaler")
    return read_start(
        first.request,
        first.size,
        tools.pictures,
        upscaler,
        warnings,
        tools.networks.device,
        max_side=tools.config.max_side,
        cell=tools.networks.autoencoder_factor,
    )


def _method(request: GenerationRequest, tools: Tools, plan: Plan, tracker: Tracker) -> LatentMode | Upscaler | None:
    """What enlarges the picture of a request; its network is read now, so that a bad file is refused now.

    The first of a process is read beside the first steps, as that takes seconds, and is refused then.
    """
    name = request.hr_upscaler
    if name in LATENT_MODES:
        return LATENT_MODES[name]
    if name.lower() == "none":
        return None
    room = max((stage.tiles for stage in plan.stages if stage.name == "upscale"), default=0)
    return tools.upscalers.begin(name, field="hr_upscaler", room=room, after_tile=tracker.after_tile)


def _previewer(networks: Networks) -> Callable[[Tensor], Image.Image]:
    preview = networks.preview()
    return lambda denoised: to_images(preview(denoised[:1]))[0]
