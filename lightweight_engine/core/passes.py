"""The passes of a request, as far as they follow from it: walks, sizes, seeds, LoRAs, and what they take of memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate, groupby

from ..config import EngineConfig
from ..errors import EngineError, RequestError
from ..extensions.detectors import DetectorLibrary
from ..extensions.hires_fix import LATENT_MODES, Target, second_pass, target_size
from ..extensions.lora import LoRAManager, field_of, specs_of
from ..flux.chunks import t5_length
from ..flux.conditioner import EmbeddingCache
from ..flux.noise import random_seed
from ..flux.prompt import PromptPlan, parse_networks
from ..flux.samplers import SAMPLERS
from ..flux.sampling import Forecast, Schedule, forecast, guess
from ..labels import resolve_sampler, schedule_steps
from ..request import MAX_SEED, PROMPTS, GenerationRequest
from ..results import OnBytes
from ..upscalers.library import UpscalerLibrary
from .idle_fields import lost_start
from .limits import check_cost, check_target, check_texts, check_tokens
from .networks import Networks
from .pictures import PictureReader
from .plan import HIRES, T5_LENGTH, Plan, Shape, Upscaling, make_plan
from .processing import Batch, denoising_strength, encoded_text, plan_schedule, plans_of, sampler_options

# (height, width) where a request names none: of the production job, and of the demonstration model.
NATIVE_SIZE = (1344, 768)
TINY_SIZE = (256, 256)

NETWORK_SCALE = 4  # of upscaling networks
FLOAT, DOUBLE = 4, 8  # bytes of a number


@dataclass(frozen=True)
class Tools:
    """What an engine has for its jobs.

    Attributes:
        pictures: reads start pictures.
    """

    networks: Networks
    config: EngineConfig
    embeddings: EmbeddingCache
    loras: LoRAManager
    upscalers: UpscalerLibrary
    detectors: DetectorLibrary
    pictures: PictureReader


@dataclass(frozen=True)
class Pass:
    """One pass of a request, as far as it follows from the request: its walk, its pictures, its memory.

    Attributes:
        base_steps: of ``Job``.
    """

    request: GenerationRequest
    size: tuple[int, int]
    sampler: str
    scheduler: str
    schedule: Schedule
    forecast: Forecast | None
    calls: int
    batches: tuple[Batch, ...]
    base_steps: int | None = None

    @property
    def steps(self) -> int:
        """Of the walk; a guess for samplers that choose their own."""
        return self.forecast.reports if self.forecast else guess(self.schedule, sampler_options(self.request))[1]

    @cached_property
    def texts(self) -> list[PromptPlan]:
        """What each prompt asks for when; the negative one's last, where it takes part."""
        prompts = dict.fromkeys(prompt for batch in self.batches for prompt in batch.prompts)
        return plans_of(self.request, list(prompts), self.sampler, self.base_steps)

    @property
    def conditionings(self) -> int:
        """Evaluated for each picture in a call: the parts of its prompt, and the negative one."""
        negative = self.request.cfg_scale != 1
        return max(len(plan) for plan in self.texts[: len(self.texts) - negative]) + negative


def first_pass(
    request: GenerationRequest, tools: Tools, warnings: list[str], progress: OnBytes, prompts: Sequence[str] = ()
) -> Pass:
    check_prompts(request, prompts, tools)
    size = picture_size(request, tools.networks, warnings)
    walk = _walk(request, tools.networks, entered=request.image is not None)
    if request.image is not None and not request.skip_img2img:
        warnings += lost_start(request, walk[2], denoising_strength(request))
    batches = with_loras(request, plan_batches(request, walk[0], prompts), tools.loras, warnings, progress)
    return Pass(request, size, *walk, numbered(batches))


def check_prompts(request: GenerationRequest, prompts: Sequence[str], tools: Tools) -> None:
    """Refuse a text that is too long to be encoded, before anything works on it that takes longer than its length.

    The texts of a schedule are parts of it, and no longer.

    Raises:
        RequestError: names the field, its tokens and the limit.
    """
    texts = [("prompt", text) for text in dict.fromkeys(prompts)] + [(name, getattr(request, name)) for name in PROMPTS]
    for field, text in texts:
        text = encoded_text(text, request.compat, negative=field.endswith("negative_prompt"))
        check_tokens(field, _text_tokens(text, tools.networks), tools.config)


def hires_pass(first: Pass, tools: Tools, warnings: list[str], progress: OnBytes) -> tuple[Pass | None, Target | None]:
    """The second pass of a request, and the size that its picture is enlarged to; None where there is none.

    Raises:
        RequestError: the picture would be larger than the configuration allows.
    """
    request, networks = first.request, tools.networks
    if not request.hires:
        return None, None
    if request.image is not None:
        warnings.append("the hires pass is left out: it is for pictures that start from noise")
        return None, None
    height, width = asked_size(request, networks)
    factor = networks.autoencoder_factor
    target = target_size(width, height, request.hr_scale, request.hr_resize_x, request.hr_resize_y, factor)
    check_target(target.height, target.width, request, tools.config)
    cells = target.cells(factor)
    size = (cells[0] * factor, cells[1] * factor)
    if size == first.size:
        field = next((name for name in ("hr_resize_x", "hr_resize_y") if getattr(request, name)), "hr_scale")
        warnings.append(f"the hires pass draws at the same size, {size[1]}x{size[0]}; raise {field} to enlarge")
    again = second_pass(request)
    batches: Sequence[Batch] = first.batches
    if request.hr_prompt:
        batches = [replace(batch, prompts=(again.prompt,) * len(batch.seeds)) for batch in batches]
        with _of_second_prompt():
            loras = with_loras(again, batches[:1], tools.loras, warnings, progress)[0].loras
        batches = [replace(batch, loras=loras) for batch in batches]
    walk = _walk(again, networks, entered=True)
    warnings += lost_start(again, walk[2], denoising_strength(again), hires=True)
    return Pass(again, size, *walk, tuple(batches), schedule_steps(first.sampler, request.steps)), target


@contextmanager
def _of_second_prompt() -> Iterator[None]:
    """Faults of the second pass's own prompt, which is the prompt of its request, name it as its caller does."""
    try:
        yield
    except EngineError as error:
        if error.field == "prompt":
            error.put_before("hr_")
        raise


def numbered(batches: Sequence[Batch]) -> tuple[Batch, ...]:
    """The batches with the number of their first picture."""
    firsts = accumulate((len(batch.seeds) for batch in batches), initial=0)
    return tuple(replace(batch, first=first) for batch, first in zip(batches, firsts, strict=False))


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
    progress: OnBytes = lambda *_: None,
) -> tuple[Batch, ...]:
    """The batches with the LoRAs of their prompts; one whose prompts ask for different LoRAs is drawn in parts.

    In ``forge``, all pictures have those of the first prompt, as there.
    """
    prompts = dict.fromkeys(prompt for batch in batches for prompt in batch.prompts)
    if request.compat == "forge":
        prompts = dict.fromkeys([next(iter(prompts))])
    if parse_networks(request.negative_prompt)[1] and request.compat == "fixed":
        warnings.append("tags in the negative prompt have no effect; put them into the prompt")
    sets = {
        prompt: loras.use(
            specs_of(request, prompt, warnings), request.compat, progress, partial(field_of, request=request)
        )
        for prompt in prompts
    }
    partly = {use.file.report for each in sets.values() for use in each.uses if use.file.report.ignored}
    warnings += [str(report) for report in partly if str(report) not in warnings]
    first = next(iter(sets.values()))
    found: list[Batch] = []
    for batch in batches:
        for _, group in groupby(batch.rows, key=lambda row: sets.get(row[2], first).full_key):
            rows = list(group)
            found.append(Batch.of(rows, sets.get(rows[0][2], first)))
    return tuple(found)


def _walk(
    request: GenerationRequest, networks: Networks, *, entered: bool
) -> tuple[str, str, Schedule, Forecast | None, int]:
    """Sampler, scheduler, schedule, what is known of it beforehand, and evaluations of the transformer a picture."""
    sampler, scheduler = resolve_sampler(request.sampler, request.scheduler, request.compat)
    schedule = plan_schedule(request, sampler, scheduler, networks.params.mu, entered=entered)
    options = sampler_options(request)
    foreseen = forecast(schedule, options)
    calls = len(foreseen.sigmas) if foreseen else guess(schedule, options)[0]
    return sampler, scheduler, schedule, foreseen, calls


def check_work(each: Pass, config: EngineConfig) -> None:
    """Refuse a pass that takes more work than the configuration allows.

    Raises:
        RequestError: names the work, the limit and the setting that holds it.
    """
    for plan in each.texts:
        check_texts(sum(len({text for _, text in part.schedule}) for part in plan), config)
    field = "steps" if each.forecast else "sampler"
    if each.base_steps is not None and (each.forecast or each.request.hr_sampler):
        field = f"hr_{field}"
    check_cost(each.request, each.size, each.calls * each.conditionings, config, field)


def plan_passes(first: Pass, second: Pass | None, target: Target | None, tools: Tools) -> Plan:
    memory = _plan_memory(first, tools.networks, picture=first.request.image is not None)
    if second is None or target is None:
        return memory
    upscaling = _upscaling(first, target, tools)
    later = _plan_memory(second, tools.networks, picture=first.request.hr_upscaler not in LATENT_MODES, up=upscaling)
    return replace(memory, then={HIRES: later})


def _upscaling(first: Pass, target: Target, tools: Tools) -> Upscaling | None:
    """What enlarging takes of the device; of a network that is not read yet, the usual scale."""
    if first.request.hr_upscaler in LATENT_MODES:
        return None
    from ..upscalers.networks import network_bytes, tile_bytes

    entry = tools.upscalers.entry(first.request.hr_upscaler, field="hr_upscaler")
    count = max(len(batch.seeds) for batch in first.batches)
    before, after = first.size[0] * first.size[1], target.width * target.height
    if entry is None:
        return Upscaling(0, 0, 3 * FLOAT * count * (before + after))
    by = max(target.height / first.size[0], target.width / first.size[1])
    rounds = 1 if by <= NETWORK_SCALE else 2
    made = before * NETWORK_SCALE ** (2 * rounds)
    tile = tile_bytes(entry.family.tiling.tile, NETWORK_SCALE)
    pictures = 3 * (count * FLOAT * (before + after) + DOUBLE * made)
    return Upscaling(network_bytes(entry.path.stat().st_size), tile, pictures)


def _plan_memory(each: Pass, networks: Networks, *, picture: bool, up: Upscaling | None = None) -> Plan:
    calls, batches = each.calls, each.batches
    texts = {text for plan in each.texts for part in plan for _, text in part.schedule}
    shape = Shape(
        each.size,
        batch=max(len(batch.seeds) for batch in batches),
        conditionings=each.conditionings,
        calls=calls,
        rows=calls * len(texts),
        text=max(_text_tokens(text, networks) for text in texts),
        picture=picture,
        upscaling=up,
    )
    known = networks.with_loras({batch.loras.full_key: batch.loras for batch in batches}.values())
    return make_plan(known, shape, networks.manager, networks.held)


def _text_tokens(text: str, networks: Networks) -> int:
    return t5_length(text, lambda: networks.tokenizers[1], T5_LENGTH)


def asked_size(request: GenerationRequest, networks: Networks) -> tuple[int, int]:
    """(height, width) of the first pass as asked, or the model's own."""
    native = TINY_SIZE if networks.models.is_tiny else NATIVE_SIZE
    return request.height or native[0], request.width or native[1]


def picture_size(request: GenerationRequest, networks: Networks, warnings: list[str]) -> tuple[int, int]:
    """(height, width) of the first pass, cut to whole latent cells."""
    asked = asked_size(request, networks)
    cell = networks.autoencoder_factor
    height, width = size = (asked[0] // cell * cell, asked[1] // cell * cell)
    if asked != size:
        warnings.append(f"the picture is {width}x{height}: sides are multiples of {cell} pixels")
    elif any(side % (2 * cell) for side in size):
        warnings.append(f"sides that are no multiple of {2 * cell} pixels are padded while drawing, as in Forge")
    return size
