"""The engine: set up once, then one request at a time."""

from __future__ import annotations

import inspect
import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakMethod, ref

import torch

from ..backend.devices import Card, PeakMemory
from ..config import EngineConfig
from ..errors import ConfigError, RequestError
from ..extensions.detectors import DetectorLibrary
from ..extensions.lora import LoRAManager, reports
from ..flux.conditioner import EmbeddingCache
from ..flux.keymaps import Role
from ..request import GenerationRequest, UpscaleRequest
from ..results import GenerationResult, UpscaleResult
from ..upscalers.library import UpscalerLibrary
from .assembly import assemble
from .current_model import CurrentModel, ready_device
from .describe import describe, device_name, versions
from .finite import settle
from .hashes import HashCache
from .jobs import plan_job, plan_request
from .limits import check_upscale
from .models import ROLES, TINY, ModelLibrary, ModelSet
from .networks import Networks
from .passes import Tools
from .pictures import OwnPictures, PictureReader
from .plan import Plan
from .precision import settings_in_effect
from .processing import Batch, Drawn, Job, draw, make
from .progress import Cancel, Interrupt, OnProgress, Tracker, Watch
from .recovery import within_memory
from .turns import Turns
from .workshop import Workshop

if TYPE_CHECKING:
    from PIL import Image

    from ..extensions.detection import Detection

log = logging.getLogger(__name__)

EMBEDDING_CACHE_BYTES = 256 << 20

NO_HASH = "{name}: the file was replaced, is not there any more, or cannot be read, so that its hash is not told"

Asked = TypeVar("Asked", GenerationRequest, UpscaleRequest)

ENDED_EARLY = "the job was interrupted: pictures may be missing, unfinished, or without their later passes"


class LightweightEngine:
    """Draws pictures from prompts.

    ``setup`` finds the model and makes it ready; ``run`` does one request and returns everything about it;
    ``generate`` is ``run`` for a caller who only wants the pictures. Calls from several threads take turns. In the
    middle of a job, where ``on_progress`` is called, its thread may look (``plan``, ``models`` …) and do nothing else.

    Args:
        config: settings; left out, the defaults with the files and environment that ``EngineConfig.load`` reads.

    Raises:
        ConfigError: ``config`` is something else, as a mapping or a path.
    """

    def __init__(self, config: EngineConfig | None = None) -> None:
        if not isinstance(config, EngineConfig | None):
            told = f"config: a {type(config).__name__} is no Config"
            raise ConfigError(f"{told}; give Config(name=value, …), or Config.load(file) with all that is set besides")
        self.config = config or EngineConfig.load()
        self._turns = Turns()
        self._embeddings = EmbeddingCache(EMBEDDING_CACHE_BYTES)
        self._hashes = HashCache(self.config.cache_dir / "hashes.json")
        self._upscalers = UpscalerLibrary([self.config.models_dir, TINY], pinned=self.config.pinned_memory)
        self._detectors = DetectorLibrary([self.config.models_dir, TINY], pinned=self.config.pinned_memory)
        usual = WeakMethod(self._usual_plan)  # a circle would keep an engine that nobody has any more
        self._model = CurrentModel(self.config, self._hashes.sha256, lambda *of: usual()(*of))  # type: ignore[misc]
        self._plan_notes: list[str] = []

    @property
    def networks(self) -> Networks:
        """The networks of the model in use; sets the engine up where that was not done."""
        with self._turns.look():
            return self._model.networks or self._model.use(self.config)

    @property
    def models(self) -> ModelSet:
        """The model in use."""
        return self.networks.models

    @property
    def loras(self) -> LoRAManager:
        """What reads LoRAs for the model in use; before ``setup``, for the one that would be: nothing is loaded."""
        with self._turns.look():
            return self._model.loras

    @property
    def upscalers(self) -> UpscalerLibrary:
        """The upscalers that can be chosen by name."""
        return self._upscalers

    @property
    def detectors(self) -> DetectorLibrary:
        """The detectors that the detailer can be given."""
        return self._detectors

    @property
    def library(self) -> ModelLibrary:
        """The model files that requests may name."""
        return self._model.library

    @property
    def hashes(self) -> HashCache:
        """Hashes of files that were read before."""
        return self._hashes

    @property
    def notes(self) -> tuple[str, ...]:
        """What ``setup`` or ``plan`` found worth saying of the settings and the model's files, a sentence each."""
        return tuple(self._model.notes or self._plan_notes)

    def setup(self) -> None:
        """Find the model's files, load them and become ready; does nothing the second time.

        Raises:
            ModelError: a file is missing or cannot be used.
            ConfigError: the device cannot be used.
        """
        with self._turns.work():
            if self._model.networks is None:
                self._model.use(self.config)

    def generate(self, **fields: Any) -> list[Image.Image]:
        """The pictures of a request given as keyword arguments; see ``GenerationRequest`` for the names.

        Warnings go to the log: ``run`` returns them, with seeds and the text of each picture.

        Raises:
            RequestError: a field is wrong.
        """
        result = self.run(self.request(**fields))
        for warning in result.warnings:
            log.warning("%s", warning)
        return list(result.images)

    def request(self, **fields: Any) -> GenerationRequest:
        """A request with the configured defaults under ``fields``.

        Raises:
            RequestError: a field is wrong.
        """
        for name in inspect.getfullargspec(self.run).kwonlyargs:
            if name in fields:
                told = f"{name}: it is no field of a request, but run() takes it beside one"
                raise RequestError(f"{told}: engine.run(engine.request(…), {name}=…)", field=name)
        return GenerationRequest.over(self.config.request_defaults(), fields)

    def run(
        self,
        request: GenerationRequest,
        *,
        on_progress: OnProgress | None = None,
        cancel: Cancel | None = None,
        preview_every: int = 0,
        interrupt: Interrupt | None = None,
        hashed: bool = True,
    ) -> GenerationResult:
        """Do one request.

        Args:
            on_progress: called at every stage and step, in this thread.
            cancel: an event; once set, the job ends within one step, or waits no longer for its turn.
            preview_every: steps between previews in ``on_progress``; 0 is none.
            interrupt: ends the job, or a batch of it, within one step with the pictures so far.
            hashed: the result has the hashes of the model's files. A file is read for it once, while the job draws;
                where that takes longer, the job waits.

        Raises:
            RequestError: a field is wrong or over a limit.
            ModelError: a model that it names is not there or cannot be used; the one in use stays.
            GenerationCancelled: ``cancel`` was set.
            MemoryBudgetError: the device ran out of memory. The engine stays usable after each of these.
        """
        request = _checked(request, GenerationRequest, "engine.request(prompt=…)")
        watch = Watch(on_progress, cancel, preview_every, interrupt)
        with self._turns.work(watch):
            networks = self._model.use(self.config.with_model_of(request))
            memory = PeakMemory(networks.device)
            try:
                return within_memory(networks.device, lambda: self._run(request, networks, memory, watch, hashed))
            finally:
                self._rest(networks)

    def save(self, result: GenerationResult, folder: str | os.PathLike[str] | None = None) -> list[Path]:
        """Write the pictures of a result as the command line does: with their text, and a sidecar beside each.

        Args:
            folder: made where there is none; left out, that of the setting ``output_dir``.

        Returns:
            Where they lie, in order. What is worth saying of them goes to the log.

        Raises:
            OutputError: one could not be written; those before it stay, of it nothing is left.
        """
        from .replay import save_result  # what draws needs none of it

        saved = save_result(result, Path(self.config.output_dir if folder is None else folder))
        for warning in (warning for each in saved for warning in each.warnings):
            log.warning("%s", warning)
        return [each.path for each in saved]

    def upscale(
        self,
        picture: Image.Image,
        by: float = 2.0,
        upscaler: str | None = None,
        *,
        on_progress: OnProgress | None = None,
        cancel: Cancel | None = None,
    ) -> Image.Image:
        """A picture made larger; see ``run_upscale``, of which this is the short form.

        Args:
            upscaler: its name; left out, that of the hires pass (setting ``hr_upscaler``).
        """
        request = UpscaleRequest(images=(picture,), by=by, upscaler=upscaler)
        return self.run_upscale(request, on_progress=on_progress, cancel=cancel).images[0]

    def run_upscale(
        self,
        request: UpscaleRequest,
        *,
        on_progress: OnProgress | None = None,
        cancel: Cancel | None = None,
        interrupt: Interrupt | None = None,
    ) -> UpscaleResult:
        """Make pictures larger; no Flux model is needed for it.

        Args:
            on_progress: called after every tile, in this thread.
            cancel: an event; once set, the work ends within one tile.
            interrupt: ends the work within one tile, with the pictures that are finished.

        Raises:
            RequestError: a picture cannot be read or would be larger than the configuration allows, or an upscaler is
                not known.
            GenerationCancelled: ``cancel`` was set.
            MemoryBudgetError: the device ran out of memory.
        """
        from .upscaling import upscale_pictures  # which no job needs

        request = _checked(request, UpscaleRequest, "one, or call upscale(picture)")
        check_upscale(request, self.config)
        watch = Watch(on_progress, cancel, interrupt=interrupt)
        reader = PictureReader.of(self.config)
        pictures = [reader.read(each, "images") for each in request.images]
        with self._turns.work(watch):
            networks = self._model.networks
            device = networks.device if networks else ready_device(self.config)
            self._upscalers.device = device
            memory, begin = PeakMemory(device), time.perf_counter()
            try:
                made, names, interrupted = within_memory(
                    device, lambda: upscale_pictures(request, pictures, self._upscalers, self.config, watch)
                )
            finally:
                if networks is not None:
                    self._rest(networks)
            return UpscaleResult(
                images=tuple(made),
                request=request,
                upscalers=names,
                timings={"upscale": time.perf_counter() - begin},
                peak_memory=memory.bytes(),
                interrupted=interrupted,
                device=device_name(device),
                versions=versions(),
            )

    def find(self, picture: Image.Image, request: GenerationRequest) -> tuple[list[list[Detection]], Image.Image]:
        """What the detailer's passes find on a picture, for each pass, and the picture with boxes and masks on it.

        Nothing is painted, and no Flux model loaded.

        Raises:
            RequestError: an argument is wrong, or a detector is not known.
            ModelError: a detector cannot be used.
        """
        from .detailing import find  # the detailer, which a start does not need

        with self._turns.work():
            networks = self._model.networks or self._assembled(self.config, None, [])
            return find(request, self._tools(networks, self._model.loras_of(networks.models)), picture)

    def plan(self, request: GenerationRequest, card: Card | None = None) -> Plan:
        """The memory plan of a request, from the headers of the model's files: nothing is loaded for it.

        Args:
            card: to plan for in place of the device in use; it need not be there.

        Raises:
            RequestError: a field is wrong or over a limit.
        """
        request = _checked(request, GenerationRequest, "engine.request(prompt=…)")
        with self._turns.look():
            settings = self.config.with_model_of(request)
            if card is None and self._model.networks is not None and self._model.is_of(settings):
                return plan_request(request, self._tools(self._model.networks, self._model.loras))
            self._plan_notes = []
            networks = self._assembled(settings, card, self._plan_notes)
            return plan_request(request, self._tools(networks, self._model.loras_of(networks.models)))

    def unload_models(self, keep_loaded: Collection[Role] = ()) -> None:
        """Release all networks but those of the roles to keep (``transformer``, ``t5`` …); a job loads them again.

        Raises:
            ConfigError: there is no such role.
        """
        unknown = set(keep_loaded) - set(ROLES) if not isinstance(keep_loaded, str) else {keep_loaded}
        if unknown:
            raise ConfigError(f"keep_loaded: {', '.join(sorted(unknown))!r} is none of {', '.join(ROLES)}; give a list")
        with self._turns.work():
            if self._model.networks is not None:
                self._model.networks.release_all(keep_loaded)

    def load_models(self) -> None:
        """Load what a usual job keeps of the model in use, as after ``setup``.

        Raises:
            EngineError: it cannot be had, or does not fit.
        """
        with self._turns.work():
            self._model.load()

    def close(self) -> None:
        """Release the networks; the next call sets the engine up again."""
        with self._turns.work():
            self._model.close()
            self._embeddings.clear()
            self._upscalers.release()
            self._detectors.release()

    def draw(self, request: GenerationRequest, prompts: Sequence[str] = ()) -> Drawn:
        """The pictures of a request as tensors on the device, for those who go on working on them.

        Args:
            prompts: one for each picture, instead of the request's own for all.
        """

        def work() -> Drawn:
            job, tracker = self._job(request, Watch(), prompts)
            drawn = [each for _, each in _draw_all(job, tracker)]
            return Drawn(torch.cat([each.latent for each in drawn]), torch.cat([each.pixels for each in drawn]))

        with self._turns.work():
            networks = self._model.use(self.config.with_model_of(request))
            try:
                return within_memory(networks.device, work)
            finally:
                self._rest(networks)

    def use(self, networks: Networks) -> None:
        """Work with networks that the caller has put together; ``setup`` then has nothing left to do."""
        with self._turns.work():
            self._model.give(networks)

    def _job(self, request: GenerationRequest, watch: Watch, prompts: Sequence[str] = ()) -> tuple[Job, Tracker]:
        self.networks.unsettled.clear()  # of a job that ended before
        return plan_job(request, self._tools(self.networks, self.loras), watch, prompts)

    def _tools(self, networks: Networks, loras: LoRAManager) -> Tools:
        self._upscalers.device = self._detectors.device = networks.device
        self._detectors.free = _spare_of(ref(networks))
        reader = PictureReader.of(self.config)
        return Tools(networks, self.config, self._embeddings, loras, self._upscalers, self._detectors, reader)

    def _rest(self, networks: Networks) -> None:
        """A job is over: what the VRAM state does not keep is released."""
        networks.rest()
        if not networks.keeps:
            self._upscalers.release()
            self._detectors.release()

    def _run(
        self, request: GenerationRequest, networks: Networks, memory: PeakMemory, watch: Watch, hashed: bool
    ) -> GenerationResult:
        job, tracker = self._job(request, watch)
        tools = self._tools(networks, self.loras)
        inside = replace(tools, pictures=OwnPictures())
        workshop = Workshop(lambda inner: plan_job(inner, inside, tracker.inner())[0], tracker.enter)
        if hashed:
            self._hashes.begin(networks.models.key)
        files = networks.models.files()
        images, stages, seeds, subseeds, infotexts = [], [], [], [], []
        for batch in job.batches:
            if not tracker.start_batch():
                break
            pictures, kept = make(job, batch, workshop.refiner(job, batch))
            settle(networks)
            details = workshop.stages[len(images) :] or [{} for _ in kept]
            stages += [{**before, **after} for before, after in zip(kept, details, strict=True)]
            images += pictures
            seeds += batch.seeds
            subseeds += batch.subseeds
            if hashed and not infotexts:
                self._hashes.wait(networks.models.key, tracker.check)
                files = networks.models.files(self._hashes)
            rows = zip(batch.seeds, batch.subseeds, strict=True)
            infotexts += [describe(job, batch, seed, subseed, files) for seed, subseed in rows]
        jobs = (job, *workshop.jobs)
        tracker.finish()
        unread = [file.name for file in files if file.sha256 is None] if hashed and infotexts else []
        notes = (
            *self._model.notes,
            *(text for each in jobs for text in each.warnings),
            *(NO_HASH.format(name=name) for name in unread),
        )
        return GenerationResult(
            images=tuple(images),
            stages=tuple(stages),
            seeds=tuple(seeds),
            subseeds=tuple(subseeds),
            infotexts=tuple(infotexts),
            request=request,
            models=files,
            loras=reports(batch.loras for each in jobs for batch in each.all_batches),
            details=tuple(workshop.reports),
            timings=tracker.timings,
            peak_memory=memory.bytes(),
            device=device_name(networks.device),
            versions=versions(),
            interrupted=tracker.interrupted,
            settings=settings_in_effect(self._model.settings, networks.models, networks.manager.card),
            warnings=tuple(dict.fromkeys((*notes, *([ENDED_EARLY] if tracker.interrupted else ())))),
        )

    def _assembled(self, settings: EngineConfig, card: Card | None, notes: list[str]) -> Networks:
        """The networks of a model that is only looked at, on the device or for a card that need not be there."""
        device = ready_device(self.config) if card is None else torch.device(card.kind)
        models = self._model.chosen(settings, notes)
        return assemble(models, settings, device, card or self._model.card_without(device), notes, load=False)

    def _usual_plan(self, networks: Networks, loras: LoRAManager) -> Plan:
        return plan_request(self.request(prompt="", enable_hr=False), self._tools(networks, loras), asked=False)


def _spare_of(networks: ref[Networks]) -> Callable[[], int]:
    """What may be taken of the device beside networks. Those of a model that is no longer in use are not held by it."""

    def spare() -> int:
        held = networks()
        return held.spare if held is not None else 0

    return spare


def _checked(request: Asked, kind: type[Asked], hint: str) -> Asked:
    """A request, its fields read once more: ``model_copy(update=…)`` takes any values.

    Raises:
        RequestError: it is none, as a prompt or a mapping alone, which other programs take; or a field is wrong.
    """
    if not isinstance(request, kind):
        raise RequestError(f"a {type(request).__name__} is no {kind.__name__}; give {hint}")
    return kind.model_construct(_fields_set=request.model_fields_set, **vars(kind(**vars(request))))


def _draw_all(job: Job, tracker: Tracker) -> Iterator[tuple[Batch, Drawn]]:
    for batch in job.batches:
        tracker.start_batch()
        drawn = draw(job, batch)
        settle(job.networks)
        yield batch, drawn
