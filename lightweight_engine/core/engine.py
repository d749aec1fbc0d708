"""The engine: set up once, then one request at a time."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..backend.devices import PeakMemory, available_memory, compute_dtype, pick_device, release_cached
from ..config import EngineConfig
from ..errors import MemoryBudgetError
from ..flux.conditioner import Conditioner, EmbeddingCache
from ..flux.noise import random_seed
from ..flux.prompt import parse_networks
from ..flux.sampling import forecast
from ..flux.tokenizers import CLIPTokenizer, T5Tokenizer, hub_cache
from ..labels import resolve_sampler, schedule_steps
from ..request import GenerationRequest, GenerationResult
from .describe import describe, device_name, versions
from .download import tokenizer_folder
from .images import open_image, to_images
from .limits import check_limits
from .models import TINY, HashCache, ModelLibrary, ModelSet
from .networks import Networks, Precision
from .processing import Drawn, Job, batches, draw, plan_schedule, sampler_options
from .progress import Cancel, OnProgress, Tracker

log = logging.getLogger(__name__)

EMBEDDING_CACHE_BYTES = 256 << 20


class LightweightEngine:
    """Draws pictures from prompts.

    ``setup`` finds the model and makes it ready; ``run`` does one request and returns everything about it;
    ``generate`` is ``run`` for a caller who only wants the pictures. Calls from several threads take turns.

    Args:
        config: settings; left out, the defaults with the files and environment that ``EngineConfig.load`` reads.
    """

    def __init__(self, config: EngineConfig | None = None) -> None:
        self.config = config or EngineConfig.load()
        self._lock = threading.RLock()
        self._networks: Networks | None = None
        self._embeddings = EmbeddingCache(EMBEDDING_CACHE_BYTES)
        self._hashes = HashCache(self.config.cache_dir / "hashes.json")
        self._notes: list[str] = []

    @property
    def networks(self) -> Networks:
        """The networks of the model in use; sets the engine up where that was not done."""
        with self._lock:
            if self._networks is None:
                self.setup()
            assert self._networks is not None
            return self._networks

    @property
    def models(self) -> ModelSet:
        """The model in use."""
        return self.networks.models

    def setup(self) -> None:
        """Find the model's files, load them and become ready; does nothing the second time.

        Raises:
            ModelError: a file is missing or cannot be used.
            ConfigError: the device cannot be used.
        """
        with self._lock:
            if self._networks is not None:
                return
            config = self.config
            device = pick_device(config.device)
            if config.threads:
                torch.set_num_threads(config.threads)
            self._notes = list(config.without_effect())
            models = self._choose_models()
            vae_dtype = config.vae_dtype if device.type == "cuda" or config.is_set("vae_dtype") else "auto"
            precision = Precision(compute_dtype(config.compute_dtype, device), compute_dtype(vae_dtype, device))
            networks = Networks(
                models, device, precision, tokenizers=lambda: self._tokenizers(models), keep=self._fits(models, device)
            )
            try:
                networks.load_all()
            except torch.OutOfMemoryError as error:
                raise self._out_of_memory(error, device) from None
            self._networks = networks

    def generate(self, **fields: Any) -> list[Image.Image]:
        """The pictures of a request given as keyword arguments; see ``GenerationRequest`` for the names.

        Raises:
            RequestError: a field is wrong.
        """
        return list(self.run(self.request(**fields)).images)

    def request(self, **fields: Any) -> GenerationRequest:
        """A request with the configured defaults under ``fields``."""
        return GenerationRequest(**{**self.config.request_defaults(), **fields})

    def run(
        self,
        request: GenerationRequest,
        *,
        on_progress: OnProgress | None = None,
        cancel: Cancel | None = None,
        preview_every: int = 0,
    ) -> GenerationResult:
        """Do one request.

        Args:
            on_progress: called at every stage and step, in this thread.
            cancel: an event; once set, the job ends within one step.
            preview_every: steps between previews in ``on_progress``; 0 is none.

        Raises:
            RequestError: a field is wrong or over a limit.
            GenerationCancelled: ``cancel`` was set.
            MemoryBudgetError: the device ran out of memory. The engine stays usable after each of these.
        """
        with self._lock:
            networks = self.networks
            memory = PeakMemory(networks.device)
            try:
                return self._run(request, networks, memory, on_progress, cancel, preview_every)
            except torch.OutOfMemoryError as error:
                raise self._out_of_memory(error, networks.device) from None
            finally:
                if networks.device.type == "cuda":
                    release_cached(networks.device)

    def close(self) -> None:
        """Release the networks; the next call sets the engine up again."""
        with self._lock:
            if self._networks is not None:
                self._networks.release()
            self._networks = None
            self._embeddings.clear()

    def _run(
        self,
        request: GenerationRequest,
        networks: Networks,
        memory: PeakMemory,
        on_progress: OnProgress | None,
        cancel: Cancel | None,
        preview_every: int,
    ) -> GenerationResult:
        seed = random_seed() if request.seed == -1 else request.seed
        subseed = random_seed() if request.subseed == -1 else request.subseed
        groups = batches(request, seed, subseed)
        job, tracker = self._job(
            request, networks, [len(seeds) for seeds, _ in groups], on_progress, cancel, preview_every
        )
        images: list[Image.Image] = []
        for seeds, subseeds in groups:
            tracker.start_batch()
            images += to_images(draw(job, seeds, subseeds).pixels)
        tracker.finish()
        all_seeds = [s for seeds, _ in groups for s in seeds]
        all_subseeds = [s for _, subseeds in groups for s in subseeds]
        files = networks.models.files(self._hashes)
        transformer = next(file for file in files if file.role == "transformer")
        return GenerationResult(
            images=tuple(images),
            seeds=tuple(all_seeds),
            subseeds=tuple(all_subseeds),
            infotexts=tuple(
                describe(job, images[i].size, s, sub, transformer)
                for i, (s, sub) in enumerate(zip(all_seeds, all_subseeds, strict=True))
            ),
            request=request,
            models=files,
            timings=tracker.timings,
            peak_memory=memory.bytes(),
            device=device_name(networks.device),
            versions=versions(),
            warnings=tuple(dict.fromkeys(job.warnings)),
        )

    def draw(self, request: GenerationRequest, prompts: Sequence[str] = ()) -> Drawn:
        """The pictures of a request as tensors on the device, for those who go on working on them.

        Args:
            prompts: one for each picture of a batch, instead of the request's own.
        """
        with self._lock:
            groups = batches(request, request.seed, max(request.subseed, 0))
            job, tracker = self._job(request, self.networks, [len(seeds) for seeds, _ in groups], None, None, 0)
            job = replace(job, prompts=tuple(prompts))
            drawn = []
            for seeds, subseeds in groups:
                tracker.start_batch()
                drawn.append(draw(job, seeds, subseeds))
            return Drawn(torch.cat([each.latent for each in drawn]), torch.cat([each.pixels for each in drawn]))

    def use(self, networks: Networks) -> None:
        """Work with networks that the caller has put together; ``setup`` then has nothing left to do."""
        with self._lock:
            self._networks = networks

    def _job(
        self,
        request: GenerationRequest,
        networks: Networks,
        batch_sizes: list[int],
        on_progress: OnProgress | None,
        cancel: Cancel | None,
        preview_every: int,
    ) -> tuple[Job, Tracker]:
        sampler, scheduler = resolve_sampler(request.sampler, request.scheduler, request.compat)
        warnings = [*self._notes, *_without_effect(request)]
        size = self._size(request, warnings)
        schedule = plan_schedule(request, sampler, scheduler, networks.params.mu)
        foreseen = forecast(schedule, sampler_options(request))
        calls = len(foreseen.sigmas) if foreseen else schedule_steps(sampler, request.steps)
        check_limits(request, size, calls, self.config)
        previewer = _previewer(networks) if preview_every else None
        tracker = Tracker(
            foreseen.reports if foreseen else request.steps, batch_sizes, on_progress, cancel, previewer, preview_every
        )
        job = Job(
            request=request,
            networks=networks,
            conditioner=self._conditioner(request, networks),
            sampler=sampler,
            scheduler=scheduler,
            schedule=schedule,
            forecast=foreseen,
            size=size,
            noise_source=request.noise_source or self.config.noise_source,
            picture=_picture(request, size),
            enter=tracker.enter,
            after_step=tracker.after_step,
            warnings=warnings,
        )
        return job, tracker

    def _conditioner(self, request: GenerationRequest, networks: Networks) -> Conditioner:
        return Conditioner(
            networks.text_encoders, networks.models.key, self._embeddings, request.emphasis, request.compat
        )

    def _size(self, request: GenerationRequest, warnings: list[str]) -> tuple[int, int]:
        """(height, width) of the picture: as asked, or the model's own; cut to whole latent cells."""
        default = (256, 256) if self.models.is_tiny else (1344, 768)
        asked = (request.height or default[0], request.width or default[1])
        factor = self.networks.autoencoder_factor
        size = (asked[0] // factor * factor, asked[1] // factor * factor)
        if asked != size:
            warnings.append(f"the picture is {size[1]}x{size[0]}: sides are multiples of {factor} pixels")
        elif any(side % (2 * factor) for side in size):
            warnings.append(f"sides that are no multiple of {2 * factor} pixels are padded while drawing, as in Forge")
        return size

    def _choose_models(self) -> ModelSet:
        config = self.config
        named = {"t5": config.t5, "clip": config.clip, "autoencoder": config.vae}
        roots = [config.models_dir]
        if config.checkpoint or any(named.values()):
            return ModelLibrary(roots).choose(config.checkpoint, **named)
        library = ModelLibrary(roots)
        if any("transformer" in entry.roles for entry in library.ls()):
            return library.choose()
        self._notes.append(
            f"no Flux checkpoint was found in {config.models_dir}: the demonstration model 'tiny' is used, which draws "
            "small cartoon people and nothing else"
        )
        return ModelLibrary([TINY]).choose()

    def _tokenizers(self, models: ModelSet) -> tuple[CLIPTokenizer, T5Tokenizer]:
        config = self.config
        folders = [models.root] if models.is_tiny else [*config.tokenizer_dirs, models.root]
        clip, t5 = (
            tokenizer_folder(kind, folders, config.cache_dir, hub=hub_cache(dict(os.environ)), offline=config.offline)
            for kind in ("clip", "t5")
        )
        return CLIPTokenizer.load(clip), T5Tokenizer.load(t5)

    def _fits(self, models: ModelSet, device: torch.device) -> bool:
        """Whether all parts may stay resident together, with a fifth of the memory left for working."""
        if self.config.keep_loaded != "auto":
            return self.config.keep_loaded == "always"
        return sum(part.nbytes for part in models.parts.values()) <= 0.8 * available_memory(device)

    def _out_of_memory(self, error: Exception, device: torch.device) -> MemoryBudgetError:
        release_cached(device)
        first = str(error).splitlines()[0]
        return MemoryBudgetError(
            f"{device} ran out of memory ({first}; {available_memory(device) >> 20:,} MiB are free now); "
            "ask for a smaller picture or fewer at once"
        )


def _previewer(networks: Networks) -> Callable[[Tensor], Image.Image]:
    preview = networks.preview()
    return lambda denoised: to_images(preview(denoised[:1]))[0]


def _picture(request: GenerationRequest, size: tuple[int, int]) -> Tensor | None:
    """The start picture ``[1, 3, H, W]`` in 0..1 at ``size``: transparency on white, resized as a whole."""
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


def _without_effect(request: GenerationRequest) -> list[str]:
    """What a request asks for that this version does not do yet."""
    _, tags = parse_networks(request.prompt)
    asked = {
        "the hires pass (enable_hr, hr_scale)": request.hires,
        "lora_urls": bool(request.lora_urls),
        "adetailer": request.adetailer,
        f"the tags {', '.join(map(str, tags))}": bool(tags),
    }
    return [f"{what} has no effect yet in this version" for what, wanted in asked.items() if wanted]
