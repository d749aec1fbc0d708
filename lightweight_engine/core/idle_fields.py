"""Fields of a request that change nothing in its pictures, told to whoever sent them: a slip would go unnoticed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..flux.prompt import plan_prompt
from ..flux.samplers import SAMPLERS
from ..flux.sampling import Schedule
from ..flux.schedules import MOST_STRENGTH, image_to_image_steps, make_sigmas, options_of
from ..labels import own_scheduler, resolve_sampler
from ..request import MAX_STEPS, GenerationRequest

_PICTURE = (
    *("img2img_upscaler", "color_correction", "resize_mode", "initial_noise_multiplier", "img2img_extra_noise"),
    *("img2img_fix_steps", "background_color"),
)
_MASK = (
    *("inpainting_mask_invert", "inpainting_fill", "inpaint_full_res", "inpaint_full_res_padding"),
    *("mask_blur", "mask_blur_x", "mask_blur_y", "mask_round"),
)
_HIRES = (
    *("hr_scale", "hr_resize_x", "hr_resize_y", "hr_steps", "hr_upscaler", "hr_cfg", "hr_distilled_cfg"),
    *("hr_prompt", "hr_negative_prompt", "hr_sampler", "hr_scheduler"),
)
_SAMPLER = ("eta", "s_churn", "s_tmin", "s_tmax", "s_noise")
_CHURNED = ("s_tmin", "s_tmax", "s_noise")  # which say where and how strongly a sampler churns
_PROMPTS = ("prompt", "negative_prompt", "hr_prompt", "hr_negative_prompt")
_GUIDED = ("s_min_uncond", "s_min_uncond_all", "skip_early_cond")
_TRACE = 1e-6  # of a start picture in a latent of float32: nothing is seen of it
_SCHEDULE = ("sigma_min", "sigma_max", "rho", "beta_alpha", "beta_beta", "use_old_karras")


def without_effect(request: GenerationRequest) -> list[str]:
    """A sentence for each thing that a request lacks, and that fields which its caller sent are for.

    Raises:
        RequestError: a sampler or a scheduler is unknown.
    """
    sentences = [f"{', '.join(names)} had no effect {why}" for why, names in _idle(request) if names]
    if request.negative_prompt and _is_unguided(request):
        sentences.append("negative_prompt had no effect at cfg_scale 1; a higher one takes twice the time")
    return sentences


def _is_unguided(request: GenerationRequest) -> bool:
    """Whether neither pass asks the negative prompt; the detailer's may all the same."""
    return request.cfg_scale == 1 and not (request.hires and request.hr_cfg not in (None, 1))


def _idle(request: GenerationRequest) -> Iterator[tuple[str, list[str]]]:
    """Why fields have no effect, and which were sent for all that."""
    passes = ("adetailer_args", "adetailer_args_hands", "ad_prompt", "ad_hands_prompt")
    if not request.adetailer:
        yield "without adetailer", _sent(request, passes)
    if not request.lora_urls:
        yield "without lora_urls", _sent(request, ("lora_scales",))
    if request.image is None:
        yield "without image", _sent(request, _PICTURE, "image")
    if request.mask is None:
        yield "without mask", _sent(request, _MASK, "mask")
    if not request.hires:
        yield f"without a hires pass ({_no_hires(request)})", _sent(request, _HIRES, "enable_hr", "hr_scale")
        if request.image is None:
            yield "without image or a hires pass", _sent(request, ("denoising_strength",))
    elif sides := [name for name in ("hr_resize_x", "hr_resize_y") if getattr(request, name)]:
        only = "" if request.enable_hr else "but to switch the pass on, as enable_hr does, "
        beside = f"beside {' and '.join(sides)}, which {'says' if len(sides) == 1 else 'say'} the size"
        yield f"{only}{beside}", _sent(request, ("hr_scale",))
    if request.num_outputs == 1:
        told = "with one picture; num_outputs says how many are drawn, batch_size how many of them at once"
        yield told, _sent(request, ("batch_size",))
    if request.subseed_strength == 0:
        yield "without subseed_strength", _sent(request, ("subseed",))
    sides = [name for name in ("seed_resize_from_w", "seed_resize_from_h") if getattr(request, name) > 0]
    if len(sides) == 1:
        yield "alone; give width and height of the picture that the seed is of", _sent(request, sides)
    if not request.detailed:  # whose passes may have samplers and guidance of their own
        yield from _idle_in_walk(request)
        if _is_unguided(request):
            yield "at cfg_scale 1, which asks no negative prompt", _sent(request, _GUIDED)
        if not request.hires:
            yield "without a hires pass or the detailer: there is one stage", _sent(request, ("save_stages",))


def lost_start(request: GenerationRequest, schedule: Schedule, strength: float, *, hires: bool = False) -> list[str]:
    """A sentence where a pass that enters its schedule part-way enters at its very beginning, and what helps.

    What is drawn from noise alone is no slip at strength 1, which asks for it.

    Args:
        request: of the pass.
        strength: its denoising strength.
        hires: it is the second pass, whose start is the picture of the first.
    """
    lost = bool(schedule.levels) and abs(schedule.picture_weight) < _TRACE
    if not lost or strength >= MOST_STRENGTH or request.mask is not None:  # a mask keeps what is around it
        return []
    field = "hr_steps" if hires else "steps"
    *ways, last = _entering(request.steps, strength, field, exact=request.img2img_fix_steps)
    remedy = f"give {', '.join(ways)} or {last}" if ways else f"give {last}"
    if hires:
        told = f"hr_steps: {request.steps} at denoising_strength {strength:g} begin at pure noise, so that nothing of"
        return [f"{told} the first pass is seen; {remedy}"]
    kept = " but for its colours" if request.color_correction else ""
    told = f"image had no effect{kept} at {request.steps} steps and denoising_strength {strength:g}"
    return [f"{told}, which begin at pure noise; {remedy}"]


def _entering(steps: int, strength: float, field: str, *, exact: bool) -> Iterator[str]:
    """What makes a pass enter its schedule after the beginning."""

    def enters(steps: int, strength: float, exact: bool) -> bool:
        total, last = image_to_image_steps(steps, strength, exact=exact)
        return total > last + 1

    more = next((count for count in range(steps + 1, MAX_STEPS + 1) if enters(count, strength, exact)), None)
    if more is not None:
        yield f"{more} or more {field}"
    if not exact and enters(steps, strength, True):
        yield "img2img_fix_steps"
    lower = next((i / 100 for i in range(99, 0, -1) if i / 100 < strength and enters(steps, i / 100, exact)), None)
    if lower is not None:
        yield f"a denoising_strength of {lower:g} or less"


def _no_hires(request: GenerationRequest) -> str:
    """Why there is none, where its fields were sent."""
    if request.image is not None:
        return "there is none with image"
    if request.enable_hr is False:
        return "enable_hr is false"
    sized = request.hr_resize_x or request.hr_resize_y  # beside which hr_scale says nothing else
    return "enable_hr switches it on" if sized else "enable_hr, or hr_scale over 1, switches it on"


def _idle_in_walk(request: GenerationRequest) -> Iterator[tuple[str, list[str]]]:
    """Those that the samplers and schedules of all passes do not know."""
    pairs = [(request.sampler, request.scheduler)]
    if request.hires:
        pairs.append((request.hr_sampler or request.sampler, request.hr_scheduler or request.scheduler))
    walks = [resolve_sampler(*pair, request.compat) for pair in pairs]
    known = {name for sampler, _ in walks for name in (*SAMPLERS[sampler].options, *SAMPLERS[sampler].needs)}
    known |= {name for sampler, scheduler in walks for name in options_of(own_scheduler(sampler, scheduler))}
    samplers = " and ".join(dict.fromkeys(sampler for sampler, _ in walks))
    schedulers = " and ".join(dict.fromkeys(own_scheduler(*walk) for walk in walks))
    yield f"with the sampler {samplers}", _sent(request, [name for name in _SAMPLER if name not in known])
    if request.s_churn == 0 and all("s_churn" in SAMPLERS[sampler].options for sampler, _ in walks):
        yield "without s_churn", _sent(request, _CHURNED)
        yield (
            f"with the sampler {samplers}, which draws no noise between steps",
            _sent(request, ("eta_noise_seed_delta",)),
        )
    if _chooses_steps(request, *walks[0]):
        yield f"with the sampler {walks[0][0]}, which chooses its own", _sent(request, ("steps",))
    yield f"with the scheduler {schedulers}", _sent(request, [name for name in _SCHEDULE if name not in known])


def _chooses_steps(request: GenerationRequest, sampler: str, scheduler: str) -> bool:
    """Whether the first pass walks as its sampler likes, and nothing else goes by the steps that are asked for.

    That would be a start picture, a second pass, a prompt that changes, or a schedule that starts lower with fewer.
    """
    if SAMPLERS[sampler].own_work is None or request.image is not None or (request.hires and not request.hr_steps):
        return False
    starts = {make_sigmas(own_scheduler(sampler, scheduler), steps, 1.0, sampler=sampler)[0] for steps in (1, 2)}
    if len(starts) > 1 or (request.skip_early_cond and request.cfg_scale != 1):
        return False
    plans = (plan_prompt(getattr(request, name), MAX_STEPS) for name in _PROMPTS)
    return all(len(part.schedule) == 1 for plan in plans for part in plan)


def _sent(request: GenerationRequest, names: Iterable[str], *switches: str) -> list[str]:
    """Those names that a caller sent and may have meant something by.

    A default asks for nothing where the whole form was sent, one of the ``switches`` included; alone it may be meant.
    """
    sent = request.model_fields_set
    whole = not switches or not sent.isdisjoint(switches)
    return [name for name in names if name in sent and _asks(name, getattr(request, name), whole=whole)]


def _asks(name: str, value: object, *, whole: bool) -> bool:
    usual = GenerationRequest.model_fields[name].default
    return value is not None and (value != usual or (bool(value) and not whole))
