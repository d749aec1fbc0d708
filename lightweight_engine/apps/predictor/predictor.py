"""What ``predict()`` does: checks inputs, has the engine draw in a thread, tells progress, writes the files."""

from __future__ import annotations

import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...backend.host_memory import GIB
from ...config import EngineConfig
from ...core.choice import choose_models
from ...core.download import Downloads
from ...core.engine import LightweightEngine
from ...core.file_cache import FileCache, Held
from ...core.lora_sources import shown_url
from ...core.pictures import PictureReader
from ...core.progress import Watch, fetching
from ...core.warm_up import draw_once
from ...errors import EngineError, about
from ...request import GenerationRequest
from ...results import GenerationResult, Progress
from ..wording import Redactor, their_name, with_their_names, without_paths
from .inputs import read_inputs
from .outputs import OutputFolder
from .postback import Postback
from .requests import model_of, names_of, request_of, without_effect

log = logging.getLogger(__name__)

POLL_SECONDS = 0.05
LINE_SECONDS = 1.0  # between two lines of progress in one stage


class PredictionError(Exception):
    """A prediction that failed; its text may be shown to the caller."""


class Predictor:
    """One engine and one job at a time.

    Args:
        config: left out, as ``EngineConfig.load`` finds it.
    """

    def __init__(self, config: EngineConfig | None = None) -> None:
        self._config = config or EngineConfig.load()
        self._held: Held | None = None  # keeps a fetched checkpoint in the cache while it is in use
        self._addresses: dict[str, str] = {}  # where it came from, by what it is called in the cache
        self._outputs = OutputFolder()
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=_do_all, args=(self._jobs,), name="jobs", daemon=True).start()
        weakref.finalize(self, self._jobs.put, None)
        self._redact = Redactor(secrets_of(self._config))
        self._engine = LightweightEngine(self._config)
        self._ready = False

    def setup(self) -> None:
        """Load the model and draw once, so that the first caller does not wait for what only the first job does.

        Raises:
            EngineError: a file is missing, or a setting is wrong.
        """
        begin = time.perf_counter()
        self._engine.setup()
        draw_once(self._engine)
        for note in self._engine.notes:
            print(self._shown(note))
        self._ready = True
        self._engine.hashes.begin(self._engine.models.key)  # the first picture tells them
        print(f"ready in {time.perf_counter() - begin:.1f} s: model {self._engine.models.name}")

    def healthy(self) -> bool:
        """Whether jobs can be done."""
        return self._ready

    def predict(self, values: Mapping[str, Any]) -> list[Path]:
        """The files of one job. Whatever is raised in this thread meanwhile, as Cog's cancellation, stops the job
        within a step and goes on to the caller.

        Raises:
            PredictionError: says what is wrong, and what to do about it.
        """
        self._outputs.clear()
        names: Mapping[str, str] = {}
        try:
            inputs = read_inputs(values)
            names = names_of(inputs)
            request = request_of(inputs, PictureReader.of(self._config, paths=False))
            result = self._drawn(inputs, request)
            paths, warnings = self._outputs.write(result)
        except EngineError as error:
            raise PredictionError(self._shown(_told(error, names))) from None
        except Exception:
            log.exception("a prediction failed unexpectedly")
            raise PredictionError("an error that should not have happened; the log has it") from None
        for warning in (*without_effect(inputs), *result.warnings, *warnings):
            print(self._shown(f"warning: {warning}"))
        print(f"seeds: {', '.join(map(str, result.seeds))}; {sum(result.timings.values()):.1f} s")
        return paths

    def _shown(self, text: str) -> str:
        """A message as a caller may have it, who knows a checkpoint by its URL."""
        text = without_paths(text)
        for name, url in self._addresses.items():
            text = text.replace(name, url)
        return self._redact(text)

    def _drawn(self, inputs: Mapping[str, Any], request: GenerationRequest) -> GenerationResult:
        url = inputs["postback_url"]
        with about("postback_url"):
            postback = Postback(url, self._config.allow_hosts) if url else None
        status = "failed"
        try:
            run = _Run(lambda run: self._work(inputs, request, run, 1 if postback else 0))
            result = run.follow(self._jobs, _Teller(postback))
            status = "succeeded"
            return result
        except Exception:
            raise
        except BaseException:  # of Cog, in this thread
            status = "canceled"
            raise
        finally:
            if postback is not None:
                postback.close(status)

    def _work(
        self, inputs: Mapping[str, Any], request: GenerationRequest, run: _Run, preview_every: int
    ) -> GenerationResult:
        """In the thread of jobs."""
        url = inputs["debug_flux_checkpoint_url"]
        with about("checkpoint"):
            held = fetch_checkpoint(url, self._config, run) if url else None
        self._addresses = {held.path.name: shown_url(url)} if held else {}
        request = request.model_copy(update=model_of(inputs, self._config, held.path if held else None))
        if inputs["force_model_reload"]:
            # What cannot be used is told while the model in use is still loaded.
            choose_models(self._config.with_model_of(request), [])
            self._engine.close()
        try:
            return self._engine.run(request, on_progress=run.told.put, cancel=run.cancel, preview_every=preview_every)
        finally:
            self._held, old = held, self._held
            if old is not None:
                old.close()


def _told(error: EngineError, names: Mapping[str, str]) -> str:
    """Kind, input and text of an error; ``names`` are those of inputs by the fields that they became."""
    field, text = error.field, with_their_names(str(error), names)
    field = field and their_name(field, names)
    where = f"{field}: " if field and not text.startswith(field) else ""
    return f"{type(error).__name__}: {where}{text}"


def secrets_of(config: EngineConfig) -> list[str]:
    """What no log and no message may hold."""
    return [token.get_secret_value() for token in config.tokens.values()]


def _do_all(jobs: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (do := jobs.get()) is not None:
        do()
        del do  # it holds pictures


class _Run:
    """A job in the thread of jobs, followed from that of ``predict()``.

    Cog cancels by raising in the latter, anywhere; the engine is only ever stopped where it agrees to be. Threads and
    locks that Python itself begins, takes and waits for do not bear that: a job went on for which nobody waited. What
    passes between the two are queues, whose every use is whole or has not happened.

    Attributes:
        told: progress; None, when it is over.
    """

    def __init__(self, work: Callable[[_Run], GenerationResult]) -> None:
        self.cancel = threading.Event()
        self.told: queue.SimpleQueue[Progress | None] = queue.SimpleQueue()
        self._work = work
        self._result: GenerationResult | None = None
        self._error: BaseException | None = None

    def _do(self) -> None:
        try:
            if not self.cancel.is_set():
                self._result = self._work(self)
        except BaseException as error:  # noqa: BLE001 - it is raised again where somebody waits for it
            self._error = error
        finally:
            self.told.put(None)

    def fetched(self, received: int, size: int | None) -> None:
        """Progress of a download, which ends when the job is to."""
        fetching(Watch(self.told.put, self.cancel))(received, size)

    def follow(self, jobs: queue.SimpleQueue[Callable[[], None] | None], tell: _Teller) -> GenerationResult:
        """Begin, tell progress until it is over, and return the result or raise what the job did."""
        try:
            jobs.put(self._do)
            while (progress := self._next()) is not None:
                tell(progress)
        finally:
            self.cancel.set()
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def _next(self) -> Progress | None:
        """What is told next. It looks up now and then, as nothing can be raised while it waits."""
        while True:
            try:
                return self.told.get(timeout=POLL_SECONDS)
            except queue.Empty:
                pass


class _Teller:
    """Progress as lines on stdout, which is what Cog shows and sends to webhooks, and to a postback."""

    def __init__(self, postback: Postback | None) -> None:
        self._postback = postback
        self._stage, self._last = "", 0.0

    def __call__(self, progress: Progress) -> None:
        if self._postback is not None:
            self._postback.tell(progress)
        now = time.monotonic()
        last_step = 0 < progress.steps == progress.step
        if progress.stage == self._stage and now - self._last < LINE_SECONDS and not last_step:
            return
        self._stage, self._last = progress.stage, now
        steps = f" {progress.step}/{progress.steps}" if progress.steps else ""
        print(f"{progress.fraction:4.0%} {progress.stage}{steps}", flush=True)


def fetch_checkpoint(url: str, config: EngineConfig, run: _Run) -> Held:
    """A checkpoint by URL, behind the same guards as a LoRA, with limits and a cache of its own.

    Raises:
        DownloadError: by kind of fault.
    """
    downloads = Downloads.of(config)
    room = int(config.checkpoint_cache_gib * GIB)
    cache = FileCache(config.cache_dir / "checkpoints", room, "checkpoint_cache_gib")
    limits = replace(downloads.limits, max_bytes=int(config.checkpoint_max_gib * GIB))
    return Downloads(cache, limits, downloads.access, offline=config.offline).lora(
        url, progress=run.fetched, kind="checkpoint"
    )
