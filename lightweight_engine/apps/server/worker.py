"""The child process: one engine, one job at a time, told through a pipe what to do.

It ends when its pipe does, so that it never outlives the front; signals that a terminal or an init system sends to all
processes of a service are left to the front.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from ...config import EngineConfig
from ...core.engine import LightweightEngine
from ...core.image_text import PNG_KEY
from ...core.images import encode, preview_jpeg
from ...core.models import ModelLibrary
from ...core.progress import Interrupt as Interrupter
from ...core.replay import save_result
from ...core.warm_up import warm_up
from ...errors import EngineError, OutputError
from ...request import UpscaleRequest
from ...results import GenerationResult, Progress, UpscaleResult
from ..wording import without_paths
from .facts import MAX_TOLD, Facts
from .faults import Fault
from .logs import JOB_ID, REQUEST_ID, set_up_logs
from .messages import Broken, Cancel, Ended, FromWorker, Interrupt, Moved, Outcome, Ready, Tend, Tended, ToWorker, Work
from .sources import check_models, reader_of, with_pictures

log = logging.getLogger(__name__)

Inbox = queue.SimpleQueue[ToWorker]


def serve_jobs(connection: Connection, inbox: Inbox, config: EngineConfig, secrets: tuple[str, ...]) -> None:
    """What the child process runs, until the pipe is closed.

    Args:
        inbox: what comes through the pipe.
    """
    set_up_logs(secrets)
    try:
        Worker(connection, inbox, config).run()
    except Exception:
        log.exception("the worker cannot go on")
        raise SystemExit(1) from None


@dataclass(frozen=True)
class _Stops:
    """What ends a job before it is done."""

    cancel: threading.Event = field(default_factory=threading.Event)
    interrupt: Interrupter = field(default_factory=Interrupter)


class Worker:
    """Does jobs in the main thread, while another listens: a job is stopped by what arrives meanwhile."""

    def __init__(self, connection: Connection, inbox: Inbox, config: EngineConfig) -> None:
        self._connection = connection
        self._inbox = inbox
        self._config = config
        self._reader = reader_of(config)
        self._waiting: queue.SimpleQueue[Work | Tend] = queue.SimpleQueue()
        self._stops: dict[str, _Stops] = {}

    def run(self) -> None:
        threading.Thread(target=self._listen, name="listener", daemon=True).start()
        try:
            engine = LightweightEngine(self._config)
            engine.setup()
            if self._config.warm_up:
                warm_up(engine)
            facts = Facts(engine)
            _log_notes(engine, facts)
            self._tell(Ready(facts()))
            engine.hashes.begin(engine.models.key)  # the first picture tells them
        except EngineError as error:
            self._tell(Broken(str(error), error.exit_code))
            return
        while True:
            message = self._waiting.get()
            tend = isinstance(message, Tend)
            self._tell(_tended(engine, facts, message) if tend else self._done(engine, facts, message))

    def _listen(self) -> None:
        while True:
            self._take(self._inbox.get())

    def _take(self, message: ToWorker) -> None:
        if isinstance(message, Work):
            self._stops[message.job] = _Stops()
            self._waiting.put(message)
        elif isinstance(message, Tend):
            self._waiting.put(message)
        elif isinstance(message, Cancel | Interrupt):
            self._stop(message, self._stops.get(message.job, _Stops()))
        else:
            os._exit(0)  # whatever the main thread computes: nobody waits for it, and nothing is half written

    def _stop(self, message: Cancel | Interrupt, stops: _Stops) -> None:
        if isinstance(message, Cancel):
            stops.cancel.set()
        elif message.skip:
            stops.interrupt.skip()
        else:
            stops.interrupt.stop()

    def _tell(self, message: FromWorker) -> None:
        try:
            self._connection.send(message)
        except OSError:
            os._exit(0)

    def _done(self, engine: LightweightEngine, facts: Facts, work: Work) -> Ended:
        REQUEST_ID.set(work.request_id)
        JOB_ID.set(work.job)
        outcome = fault = None
        try:
            outcome = self._draw(engine, facts.models, work)
        except EngineError as error:
            fault = Fault.of(error)
            if fault.status >= 500:  # of any other the front logs the reason, with how the job ended
                log.error("a job failed: %s", error)
        except Exception:  # whatever it is, the next job is not to pay for it
            log.exception("a job failed unexpectedly")
            fault = Fault.unexpected()
        finally:
            del self._stops[work.job]
        return Ended(work.job, outcome, fault, facts())

    def _draw(self, engine: LightweightEngine, models: ModelLibrary, work: Work) -> Outcome:
        def on_progress(progress: Progress) -> None:
            preview = None if progress.preview is None else preview_jpeg(progress.preview)
            self._tell(Moved(work.job, progress.model_dump(exclude={"preview"}), preview))

        stops = self._stops[work.job]
        followed: Any = {"on_progress": on_progress, "cancel": stops.cancel, "interrupt": stops.interrupt}
        task = with_pictures(work.request, self._reader)
        if isinstance(task, UpscaleRequest):
            return upscaled_outcome(engine.run_upscale(task, **followed))
        check_models(task, models)
        result = engine.run(task, preview_every=work.preview_every, hashed=work.hashed, **followed)
        saved, warnings = self._saved(result) if work.save else ([], [])
        return outcome_of(result, saved, warnings)

    def _saved(self, result: GenerationResult) -> tuple[list[str], list[str]]:
        """Names of the files that a result was kept in, and warnings: what is drawn is answered in any case."""
        try:
            return [row.path.name for row in save_result(result, self._config.output_dir)], []
        except OutputError as error:
            log.warning("pictures could not be kept: %s", error)
            return [], [f"the pictures are in this answer, and not all were saved: {error}"]


def _log_notes(engine: LightweightEngine, facts: Facts) -> None:
    """Say once what is worth saying of model and settings: nobody may look at the answers that tell it each time."""
    for entry in facts.unusable[:MAX_TOLD]:
        log.error("a checkpoint cannot be used: %s", entry.problem, extra={"file": entry.name})
    for note in engine.notes:
        log.warning(note)


def _tended(engine: LightweightEngine, facts: Facts, tend: Tend) -> Tended:
    fault = None
    try:
        if tend.model == "unload":
            engine.unload_models()
        elif tend.model == "load":
            engine.load_models()
    except EngineError as error:
        fault = Fault.of(error)
    except Exception:
        log.exception("the model could not be tended to")
        fault = Fault.unexpected()
    return Tended(facts(), fault)


def outcome_of(result: GenerationResult, saved: Sequence[str] = (), warned: Sequence[str] = ()) -> Outcome:
    """The pictures of a result as files, each with its text, and all else as JSON data.

    Args:
        saved: names of the files that they were kept in.
        warned: warnings beside those of the result.
    """
    kind = result.request.output_format
    pairs = zip(result.images, result.infotexts, strict=True)
    files = [encode(image, kind, infotext) for image, infotext in pairs]
    stages = [{name: encode(picture, kind).data for name, picture in stage.items()} for stage in result.stages]
    warnings = dict.fromkeys([*result.warnings, *warned, *(text for file in files for text in file.warnings)])
    told = {
        "seeds": list(result.seeds),
        "subseeds": list(result.subseeds),
        "infotexts": list(result.infotexts),
        "models": [file.model_dump(exclude={"path"}) for file in result.models],
        "loras": [lora.model_dump(mode="json") for lora in result.loras],
        "details": [report.model_dump(mode="json") for report in result.details],
        "saved": list(saved),
        "warnings": [without_paths(text) for text in warnings],
    }
    return Outcome(kind, [file.data for file in files], stages, {**_told_of(result), **told})


def upscaled_outcome(result: UpscaleResult) -> Outcome:
    """Likewise of enlarged pictures, each with the text that it brought."""
    kind = result.request.output_format
    files = [encode(image, kind, image.info.get(PNG_KEY)) for image in result.images]
    warnings = dict.fromkeys(text for file in files for text in file.warnings)
    told = {"upscalers": list(result.upscalers), "warnings": list(warnings)}
    return Outcome(kind, [file.data for file in files], [], {**_told_of(result), **told})


def _told_of(result: GenerationResult | UpscaleResult) -> dict[str, Any]:
    """What is told of all pictures, however they were made."""
    return {
        "sizes": [list(image.size) for image in result.images],
        "timings": result.timings,
        "peak_memory": result.peak_memory,
        "interrupted": result.interrupted,
        "device": result.device,
        "versions": result.versions,
    }
