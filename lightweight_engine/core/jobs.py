"""From a request to a job: names resolved, seeds drawn, sizes settled, limits checked, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..config import EngineConfig
from ..errors import RequestError
from ..extensions.lora import LoRAManager, Progress, specs_of
from ..flux.conditioner import Conditioner, EmbeddingCache
from ..flux.noise import random_seed
from ..flux.prompt import parse_networks, plan_negative, plan_prompt
from ..flux.samplers import SAMPLERS
from ..flux.sampling import Forecast, Schedule, forecast
from ..labels import resolve_sampler, schedule_steps
from ..request import MAX_SEED, GenerationRequest
from .images import open_image, to_images
from .limits import check_cost, check_fields
from .networks import Networks
from .plan import T5_LENGTH, Plan, Shape, make_plan
from .processing import Batch, Job, plan_schedule, sampler_options
from .progress import Tracker, Watch, fetching
from .recovery import Recovery

# (height, width) where a request names none: of the production job, and of the demonstration model.
NATIVE_SIZE = (1344, 768)
TINY_SIZE = (256, 256)


def plan_job(
    request: GenerationRequest,
    networks: Networks,
    config: EngineConfig,
    embeddings: EmbeddingCache,
    loras: LoRAManager,
    watch: Watch,
    prompts: Sequence[str] = (),
) -> tuple[Job, Tracker]:
    """Everything about a request that can be known beforehand.

    Args:
        prompts: one for each picture, instead of the request's own for all.

    Raises:
        RequestError: a field is wrong or over a limit.
        EngineError: a LoRA cannot be had or used.
    """
    check_fields(request, config)
    warnings = without_effect(request)
    size = picture_size(request, networks, warnings)
    sampler, scheduler, schedule, foreseen, calls = _walk(request, networks)
    check_cost(request, size, calls, config)
    batches = plan_batches(request, sampler, prompts)
    batches = with_loras(request, batches, loras, warnings, fetching(watch))
    memory = _plan_memory(request, networks, size, calls, batches)
    memory.check()
    networks.follow(memory)
    tracker = Tracker(
        foreseen.reports if foreseen else request.steps,
        [len(batch.seeds) for batch in batches],
        watch,
        _previewer(networks) if watch.preview_every else None,
    )

    def enter(stage: str) -> None:
        tracker.enter(stage)
        networks.enter(stage, job.attempt.plan)  # type: ignore[arg-type]

    job = Job(
        request=request,
        networks=networks,
        conditioner=Conditioner(
            networks.text_encoders, networks.models.key, embeddings, request.emphasis, request.compat
        ),
        sampler=sampler,
        scheduler=scheduler,
        schedule=schedule,
        forecast=foreseen,
        size=size,
        noise_source=request.noise_source or config.noise_source,
        picture=start_picture(request, size),
        attempt=Recovery(networks, memory, warnings),
        enter=enter,
        after_step=tracker.after_step,
        warnings=warnings,
        batches=batches,
    )
    return job, tracker


def plan_batches(request: GenerationRequest, sampler: str, prompts: Sequence[str] = ()) -> tuple[Batch, ...]:
    """Seeds count up from the request's, which is drawn where it is -1; a variation keeps the seed and counts its own.

    A sampler whose pictures influence one another draws them one at a time, but for ``compat="forge"``.
    """
    count = request.num_outputs
    seed = random_seed() if request.seed == -1 else request.seed
    subseed = random_seed() if request.subseed == -1 else request.subseed
    varied = request.subseed_strength > 0
    if max(seed if varied else seed + count - 1, subseed + count - 1) > MAX_SEED:
        raise RequestError(f"seed: the seeds that follow it are over {MAX_SEED}; give a smaller one", field="seed")
    prompts = prompts or [request.prompt] * count
    rows = [(seed if varied else seed + i, subseed + i, prompts[i]) for i in range(count)]
    alone = SAMPLERS[sampler].couples_batch and request.compat == "fixed"
    step = 1 if alone else request.batch_size
    groups = [rows[i : i + step] for i in range(0, count, step)]
    return tuple(map(Batch.of, groups))


def with_loras(
    request: GenerationRequest,
    batches: Sequence[Batch],
    loras: LoRAManager,
    warnings: list[str],
    progress: Progress = lambda *_: None,
) -> tuple[Batch, ...]:
    """The batches with the LoRAs of their prompts; one whose prompts ask for different LoRAs is drawn in parts.

    In ``forge``, all pictures have those of the first prompt, as there.
    """
    prompts = dict.fromkeys(prompt for batch in batches for prompt in batch.prompts)
    if request.compat == "forge":
        prompts = dict.fromkeys([next(iter(prompts))])
    if parse_networks(request.negative_prompt)[1] and request.compat == "fixed":
        warnings.append("tags in the negative prompt have no effect; put them into the prompt")
    sets = {prompt: loras.use(specs_of(request, prompt, warnings), request.compat, progress) for prompt in prompts}
    first = next(iter(sets.values()))
    found: list[Batch] = []
    for batch in batches:
        for _, group in groupby(batch.rows, key=lambda row: sets.get(row[2], first).full_key):
            rows = list(group)
            found.append(Batch.of(rows, sets.get(rows[0][2], first)))
    return tuple(found)


def plan_request(request: GenerationRequest, networks: Networks, loras: LoRAManager) -> Plan:
    """The memory plan of a request: what it takes of the device, stage by stage."""
    sampler, *_, calls = _walk(request, networks)
    batches = with_loras(request, plan_batches(request, sampler), loras, [])
    return _plan_memory(request, networks, picture_size(request, networks, []), calls, batches)


def _walk(request: GenerationRequest, networks: Networks) -> tuple[str, str, Schedule, Forecast | None, int]:
    """Sampler, scheduler, schedule, what is known of it beforehand, and evaluations of the transformer a picture."""
    sampler, scheduler = resolve_sampler(request.sampler, request.scheduler, request.compat)
    schedule = plan_schedule(request, sampler, scheduler, networks.params.mu)
    foreseen = forecast(schedule, sampler_options(request))
    calls = len(foreseen.sigmas) if foreseen else schedule_steps(sampler, request.steps)
    return sampler, scheduler, schedule, foreseen, calls


def _plan_memory(
    request: GenerationRequest, networks: Networks, size: tuple[int, int], calls: int, batches: Sequence[Batch]
) -> Plan:
    prompts = dict.fromkeys(prompt for batch in batches for prompt in batch.prompts)
    plans = [plan_prompt(parse_networks(prompt)[0], calls, compat=request.compat) for prompt in prompts]
    parts = max(len(plan) for plan in plans)
    texts = {text for plan in plans for part in plan for _, text in part.schedule}
    if request.cfg_scale != 1:
        parts += 1
        texts |= {text for part in plan_negative(request.negative_prompt, calls) for _, text in part.schedule}
    shape = Shape(
        size,
        batch=max(len(batch.seeds) for batch in batches),
        conditionings=parts,
        calls=calls,
        rows=calls * len(texts),
        text=max(_text_tokens(text, networks) for text in texts),
        picture=request.image is not None,
    )
    known = networks.with_loras({batch.loras.full_key: batch.loras for batch in batches}.values())
    return make_plan(known, shape, networks.manager, networks.held)


def _text_tokens(text: str, networks: Networks) -> int:
    """T5 tokens that a text takes at most; a short one is padded, and needs no counting."""
    chunks = text.count("BREAK") + 1
    tokens = len(text) + 1
    if tokens > T5_LENGTH:
        tokens = len(networks.tokenizers[1].encode(text)) + 1
    return chunks * max(T5_LENGTH, tokens)


def picture_size(request: GenerationRequest, networks: Networks, warnings: list[str]) -> tuple[int, int]:
    """(height, width) of the picture: as asked, or the model's own; cut to whole latent cells."""
    native = TINY_SIZE if networks.models.is_tiny else NATIVE_SIZE
    asked = (request.height or native[0], request.width or native[1])
    cell = networks.autoencoder_factor
    height, width = size = (asked[0] // cell * cell, asked[1] // cell * cell)
    if asked != size:
        warnings.append(f"the picture is {width}x{height}: sides are multiples of {cell} pixels")
    elif any(side % (2 * cell) for side in size):
        warnings.append(f"sides that are no multiple of {2 * cell} pixels are padded while drawing, as in Forge")
    return size


def start_picture(request: GenerationRequest, size: tuple[int, int]) -> Tensor | None:
    """The start picture ``[1, 3, H, W]`` in 0..1 at ``size``: upright, transparency on white, resized as a whole."""
    if request.image is None:
        return None
    image = request.image if isinstance(request.image, Image.Image) else open_image(request.image)
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if image.size != (size[1], size[0]):
        image = image.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def without_effect(request: GenerationRequest) -> list[str]:
    """What a request asks for that this version does not do yet, a sentence each."""
    asked = {
        "the hires pass (enable_hr, hr_scale)": request.hires,
        "adetailer": request.adetailer,
    }
    return [f"{what} has no effect yet in this version" for what, wanted in asked.items() if wanted]


def _previewer(networks: Networks) -> Callable[[Tensor], Image.Image]:
    preview = networks.preview()
    return lambda denoised: to_images(preview(denoised[:1]))[0]
