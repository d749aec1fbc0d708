"""Where a job is: stage, step, speed and time left, and the points at which it can be cancelled or interrupted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import GenerationCancelled, RequestError
from ..fields import shown_of
from ..results import OnBytes, Progress

if TYPE_CHECKING:
    from ..backend.pace import Laps

OnProgress = Callable[[Progress], None]

# The share of a batch's time that its stages take, roughly; sampling is the rest.
_ENCODE, _DECODE = 0.02, 0.05
_BEFORE = {"sample": _ENCODE, "decode": 1 - _DECODE, "detect": 1.0, "detail": 1.0}


class Cancel(Protocol):
    """Something like ``threading.Event``: set by whoever wants the job to stop."""

    def is_set(self) -> bool: ...


class Interrupt:
    """Ends a job early with what there is, where a cancel gives nothing. Any thread may call it, at any time.

    What is being sampled is decoded as the network takes it to be at that step; passes that would follow are left out.
    """

    def __init__(self) -> None:
        self._stopped, self._skipped = threading.Event(), threading.Event()

    def stop(self) -> None:
        """End the job with the pictures so far."""
        self._stopped.set()

    def skip(self) -> None:
        """End the batch that is being drawn, and go on with the next."""
        self._skipped.set()

    def start_batch(self) -> None:
        """A skip is for the batch in which it came, and no other."""
        self._skipped.clear()

    @property
    def ends_job(self) -> bool:
        return self._stopped.is_set()

    @property
    def ends_batch(self) -> bool:
        return self._stopped.is_set() or self._skipped.is_set()


class Interrupted(Exception):
    """Leaves the work that an interrupt ends; within the engine only. ``denoised`` is what sampling has come to."""

    def __init__(self, denoised: Any = None) -> None:
        super().__init__("interrupted")
        self.denoised = denoised


@dataclass(frozen=True)
class Watch:
    """How a caller follows and ends a job.

    Args:
        on_progress: told of its progress.
        cancel: ends it with nothing.
        preview_every: steps between previews; 0 is none.
        interrupt: ends it with what there is.

    Raises:
        RequestError: one is of another kind; names it, and what to give. It would fail in the middle of a job.
    """

    on_progress: OnProgress | None = None
    cancel: Cancel | None = None
    preview_every: int = 0
    interrupt: Interrupt | None = None

    def __post_init__(self) -> None:
        every, is_set = self.preview_every, getattr(self.cancel, "is_set", None)
        self._refuse("on_progress", callable(self.on_progress), "a function that takes a Progress")
        self._refuse("cancel", callable(is_set) and not isinstance(self.cancel, type), "a threading.Event()")
        self._refuse("interrupt", isinstance(self.interrupt, Interrupt), "a lightweight_engine.Interrupt()")
        self._refuse("preview_every", type(every) is int and every >= 0, "0 or more steps; 0 is none")

    def _refuse(self, name: str, fits: bool, wanted: str) -> None:
        given = getattr(self, name)
        if given is not None and not fits:
            raise RequestError(f"{name}: give {wanted} (got {shown_of(given)})", field=name)

    def check(self) -> None:
        """Raises GenerationCancelled where the caller asked to stop."""
        if self.cancel is not None and self.cancel.is_set():
            raise GenerationCancelled("the job was cancelled by its caller")


def fetching(watch: Watch) -> OnBytes:
    """Tells the caller how much of a file was fetched, in MiB, as steps of the stage ``load``; stops where asked to."""

    def tell(received: int, size: int | None) -> None:
        watch.check()
        if watch.on_progress is not None:
            watch.on_progress(Progress(stage="load", step=received >> 20, steps=(size or 0) >> 20))

    return tell


class Tracker:
    """Reports the progress of one job and times its stages.

    Args:
        steps: of each pass of a batch; a guess for samplers that choose their own.
        batch_sizes: pictures of each batch.
        watch: who is told.
        laps: times the stages.
        preview: makes a picture of a latent.

    Attributes:
        interrupted: something was left out because the caller asked for it.
    """

    def __init__(
        self,
        steps: Sequence[int],
        batch_sizes: list[int],
        watch: Watch,
        laps: Laps,
        preview: Callable[[Any], Any] | None = None,
    ) -> None:
        self.interrupted = False
        self._laps, self._stages = laps, ["load"]
        self._passes, self._pass = list(steps), 0
        self._batch_sizes = batch_sizes
        self._watch, self._preview = watch, preview
        self._batch = -1
        self._fraction = 0.0
        self._sample_start = time.perf_counter()
        laps.mark()

    def start_batch(self) -> bool:
        """Begin the next batch; false where the caller wants no more of them."""
        interrupt = self._watch.interrupt
        if interrupt is not None and interrupt.ends_job:
            self.interrupted = True
            return False
        if interrupt is not None:
            interrupt.start_batch()
        self._batch += 1
        return True

    def ends(self) -> bool:
        """Whether the caller wants this batch as it is. Asked only where something is left out if so."""
        interrupt = self._watch.interrupt
        ends = interrupt is not None and interrupt.ends_batch
        self.interrupted |= ends
        return ends

    @property
    def timings(self) -> dict[str, float]:
        """Seconds of each stage that is over, all of its kind together; waits for the device to be there."""
        found: dict[str, float] = {}
        for stage, seconds in zip(self._stages, self._laps.seconds(), strict=False):  # that under way has none yet
            found[stage] = found.get(stage, 0.0) + seconds
        return found

    @property
    def _stage(self) -> str:
        return self._stages[-1]

    @property
    def steps(self) -> int:
        """Of the pass that runs."""
        return self._passes[self._pass]

    def enter(self, stage: str, number: int = 0) -> None:
        """Begin a stage of the pass ``number``: ends the timing of the last one."""
        self._pass = number
        self._laps.mark()
        self._stages.append(stage)
        if stage == "sample":
            self._sample_start = time.perf_counter()
        self._report(_BEFORE.get(stage, 0.0))

    def after_step(self, step: int, latent: Any, denoised: Any) -> None:
        """A step is finished. Raises GenerationCancelled or Interrupted where the caller asked for it."""
        part = min((step + 1) / max(self.steps, 1), 1.0)
        picture = None
        if self._preview and (step + 1) % self._watch.preview_every == 0:
            picture = self._preview(denoised)
        self._report(_ENCODE + (1 - _ENCODE - _DECODE) * part, step + 1, picture)
        if step + 1 != self.steps and self.ends():
            raise Interrupted(denoised)

    def inner(self) -> Watch:
        """For a job inside this one: its steps are told as those of the stage ``detail``, at the fraction of this."""
        tell = self._watch.on_progress

        def on_progress(progress: Progress) -> None:
            assert tell is not None
            own = {"stage": "detail", "fraction": self._fraction, "eta_seconds": None}
            places = {"image_index": self._first_picture, "image_count": sum(self._batch_sizes)}
            tell(progress.model_copy(update={**own, **places}))

        return Watch(on_progress if tell else None, self._watch.cancel, interrupt=self._watch.interrupt)

    @property
    def _first_picture(self) -> int:
        return sum(self._batch_sizes[: max(self._batch, 0)])

    def after_tile(self, done: int, total: int) -> None:
        """Tiles of a picture that is enlarged are finished. Raises likewise."""
        self._report(0.0, tiles=(done, total))
        if self.ends():
            raise Interrupted

    def finish(self) -> None:
        self.enter("done")

    def check(self) -> None:
        self._watch.check()

    def _report(self, part: float, step: int = 0, preview: Any = None, tiles: tuple[int, int] = (0, 0)) -> None:
        self.check()
        if self._watch.on_progress is None:
            return
        batch, batches = max(self._batch, 0), max(len(self._batch_sizes), 1)
        finished = self._stage == "done"
        all_steps = max(sum(self._passes), 1)
        before = sum(self._passes[: self._pass])
        fraction = 1.0 if finished else min((batch + (before + part * self.steps) / all_steps) / batches, 1.0)
        self._fraction = fraction
        seconds = time.perf_counter() - self._sample_start if step else 0.0
        speed = step / seconds if seconds > 0 else None
        eta = ((batches - batch) * all_steps - before - step) / speed if speed else None
        self._watch.on_progress(
            Progress(
                stage=self._stage,  # type: ignore[arg-type]
                step=step or tiles[0],
                steps=self.steps if self._stage == "sample" else tiles[1],
                fraction=fraction,
                eta_seconds=0.0 if finished else eta,
                steps_per_second=speed,
                image_index=self._first_picture,
                image_count=sum(self._batch_sizes),
                preview=preview,
            )
        )
