"""What a request may ask for: names that exist, and no more than the configuration allows. Loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import RequestError, TooCostlyError, counted
from ..fields import shown_of
from ..labels import own_scheduler, resolve_sampler
from ..request import PROMPTS, GenerationRequest, UpscaleRequest
from .images import check_size

if TYPE_CHECKING:
    from ..config import EngineConfig


# Pairs that evaluate the network once for each step asked for, which a test holds; others do it more or less often.
STEPWISE_SAMPLERS = frozenset(
    ("DPM++ 2M", "DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 3M SDE", "Euler a", "Euler", "LMS")
    + ("DPM fast", "IPNDM", "IPNDM_V", "DEIS")
)
STEPWISE_SCHEDULERS = frozenset(
    ("Karras", "Exponential", "Polyexponential", "SGM Uniform", "KL Optimal", "Simple", "Normal")
)

_CELL = 8  # pixels a side of a latent cell, of which a picture has whole ones


def check_fields(request: GenerationRequest, config: EngineConfig) -> None:
    """Refuse a request with a field that is wrong or larger than allowed, as far as no model is needed to tell.

    Raises:
        RequestError: names the field and the fault; of a limit, the setting that holds it.
    """
    _check_samplers(request)
    _check_detailer(request)
    if request.mask is not None and request.image is None:
        raise RequestError("mask: there is no picture that it belongs to; give image too", field="mask")
    _check_sides(request.height, request.width, config)
    check_size((request.width or 0, request.height or 0), request.output_format)
    for field in PROMPTS:
        check_length(field, getattr(request, field), config)
    _check_count("num_outputs", request.num_outputs, config)
    if isinstance(request.image, list | tuple):
        _check_starts(len(request.image), request.num_outputs)
    _check_known_cost(request, config)


def check_upscale(request: UpscaleRequest, config: EngineConfig) -> None:
    """Likewise of pictures that are to be enlarged, as far as they need not be read to tell. Raises RequestError."""
    _check_sides(request.height, request.width, config)
    check_size((request.width or 0, request.height or 0), request.output_format)
    _check_count("images", len(request.images), config)


def check_length(field: str, text: str, config: EngineConfig) -> None:
    """Refuse a prompt of more characters than the configuration allows. Raises RequestError."""
    if len(text) > config.max_prompt_chars:
        raise RequestError(
            f"{field}: {len(text):,} characters are over the limit of {config.max_prompt_chars:,} "
            "(setting max_prompt_chars); shorten it",
            field=field,
        )


def check_tokens(field: str, tokens: int, config: EngineConfig) -> None:
    """Refuse a prompt of more tokens than the configuration allows. Raises RequestError."""
    if tokens > config.max_prompt_tokens:
        raise RequestError(
            f"{field}: {tokens:,} tokens are over the limit of {config.max_prompt_tokens:,} (setting "
            "max_prompt_tokens; a part between BREAKs counts as the longest, and as 256 at least); shorten it",
            field=field,
        )


def check_parts(field: str, parts: int, config: EngineConfig) -> None:
    """Refuse a detailer's prompt for more masks than the configuration allows texts. Raises RequestError."""
    if parts > config.max_prompt_texts:
        raise RequestError(
            f"{field}: {parts:,} parts are over the limit of {config.max_prompt_texts:,} (setting max_prompt_texts); "
            "use fewer",
            field=field,
        )


def check_texts(count: int, config: EngineConfig) -> None:
    """Refuse a prompt of more texts than the configuration allows. Raises RequestError."""
    if count > config.max_prompt_texts:
        raise RequestError(
            f"prompt: {count:,} texts, which are parts joined by AND and those of schedules, are over the limit of "
            f"{config.max_prompt_texts:,} (setting max_prompt_texts); use fewer",
            field="prompt",
        )


def check_target(height: int, width: int, request: GenerationRequest, config: EngineConfig) -> None:
    """Refuse a hires pass whose picture would be larger than the configuration or the file's format allows.

    Raises:
        RequestError: names the field.
    """
    if max(height, width) > config.max_side:
        sides = {"hr_resize_x": width, "hr_resize_y": height}
        field = max((name for name in sides if getattr(request, name)), key=sides.__getitem__, default="hr_scale")
        raise RequestError(
            f"{field}: the hires pass would draw {width}x{height}, over {config.max_side} pixels (setting max_side); "
            f"lower {'that side' if field in sides else field}",
            field=field,
        )
    check_size((width, height), request.output_format)


def check_cost(
    request: GenerationRequest, size: tuple[int, int], calls: int, config: EngineConfig, field: str = "steps"
) -> None:
    """Refuse a request that takes more work than the configuration allows, or sides that the model chose too long.

    Args:
        size: (height, width) in pixels.
        calls: evaluations of the network for one picture.
        field: that decides on the steps of the pass: their number, or a sampler that chooses its own, and is counted
            with about the most that it takes.

    Raises:
        TooCostlyError: names the cost, the limit and the setting that holds it.
        RequestError: a side is too long.
    """
    height, width = size
    _check_sides(height, width, config)
    cost = height * width / 1e6 * calls * request.num_outputs
    if cost > config.max_megapixel_steps:
        chosen = field.endswith("sampler")
        work = f"{counted(calls, 'evaluation')}{' (as many as it may take)' if chosen else ''}"
        change = "choose another sampler" if chosen else "ask for fewer steps"
        fewer = " or a smaller picture" if request.num_outputs == 1 else ", or fewer or smaller pictures"
        told, limit = _told_apart(cost, config.max_megapixel_steps)
        raise TooCostlyError(
            f"{field}: {width}x{height} x {work} x {counted(request.num_outputs, 'picture')} "
            f"is {told} megapixel-steps, over the limit of {limit} (setting max_megapixel_steps); "
            f"{change}{fewer}",
            field=field,
        )


def _check_known_cost(request: GenerationRequest, config: EngineConfig) -> None:
    """``check_cost`` of the first pass, where the fields alone tell its work; of others it is told when passes are
    planned, which takes a model.
    """
    if request.image is not None or not request.height or not request.width or "AND" in request.prompt:
        return
    sampler, scheduler = resolve_sampler(request.sampler, request.scheduler, request.compat)
    bent = request.sigma_min or request.sigma_max or request.rho  # where steps may be of no length, and fall away
    if bent or sampler not in STEPWISE_SAMPLERS or own_scheduler(sampler, scheduler) not in STEPWISE_SCHEDULERS:
        return
    size = request.height // _CELL * _CELL, request.width // _CELL * _CELL
    check_cost(request, size, request.steps * (1 + (request.cfg_scale != 1)), config)


def _told_apart(more: float, less: float) -> tuple[str, str]:
    """Two numbers that differ, with as many digits as show it."""
    texts = ("", "")
    for digits in range(17):
        texts = f"{more:,.{digits}f}", f"{less:,.{digits}f}"
        if texts[0] != texts[1]:
            break
    return texts


def _check_samplers(request: GenerationRequest) -> None:
    """Refuse names of no sampler or schedule, of both passes."""
    resolve_sampler(request.sampler, request.scheduler, request.compat)
    if request.hr_sampler or request.hr_scheduler:
        pair = request.hr_sampler or request.sampler, request.hr_scheduler or request.scheduler
        named = (
            "hr_sampler" if request.hr_sampler else "sampler",
            "hr_scheduler" if request.hr_scheduler else "scheduler",
        )
        resolve_sampler(*pair, request.compat, fields=named)


def _check_detailer(request: GenerationRequest) -> None:
    """Refuse arguments of the detailer that are wrong, where nothing reads them too: a slip shows before it counts."""
    given = request.adetailer_args, request.adetailer_args_hands
    if any(each not in ("", "{}", {}) for each in given):
        from ..extensions.detailer_args import service_passes  # which few requests need

        service_passes(*given)


def _check_starts(count: int, outputs: int) -> None:
    """Refuse start pictures that are neither one for all outputs nor one for each."""
    if not count:
        raise RequestError("image: the list is empty; give a picture, or leave it out", field="image")
    if count not in (1, outputs):
        raise RequestError(
            f"image: {counted(count, 'picture')} for {counted(outputs, 'output')}; give one, or one for each output",
            field="image",
        )


def _check_count(field: str, count: int, config: EngineConfig) -> None:
    if count > config.max_outputs:
        raise RequestError(
            f"{field}: {shown_of(count)} is over the limit of {config.max_outputs} (setting max_outputs); ask for less",
            field=field,
        )


def _check_sides(height: int | None, width: int | None, config: EngineConfig) -> None:
    """None is a side that the model chooses."""
    for field, side in (("width", width), ("height", height)):
        if side is not None and side > config.max_side:
            limit = f"{config.max_side} pixels (setting max_side)"
            raise RequestError(f"{field}: {shown_of(side)} is over the limit of {limit}; ask for less", field=field)
