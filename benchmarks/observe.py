"""An engine whose networks are watched: the peak of each stage, apart for loading and work, and the time of each step.

Stands beside the engine, not inside it: ``Observed`` is a ``Networks`` that looks on at its own doors.
"""

from __future__ import annotations

import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from lightweight_engine import LightweightEngine
from lightweight_engine.backend.devices import card_of, pick_device
from lightweight_engine.backend.model_files import open_model
from lightweight_engine.config import EngineConfig
from lightweight_engine.core.models import ModelSet
from lightweight_engine.core.networks import Networks
from lightweight_engine.core.plan import Plan, StageName
from lightweight_engine.core.precision import choose_precision, memory_manager
from lightweight_engine.flux.keymaps import Part, Role, find_parts

N = TypeVar("N", bound=Networks)


@dataclass(frozen=True)
class Words:
    """A tokenizer for random encoders: a word is one id, whatever it says; serves CLIP and T5.

    Attributes:
        size: of the vocabulary, whose last three ids are the special ones.
    """

    size: int

    comma_id: None = None

    @property
    def start_id(self) -> int:
        return self.size - 3

    @property
    def pad_id(self) -> int:
        return self.size - 2

    @property
    def end_id(self) -> int:
        return self.size - 1

    def encode(self, text: str) -> list[int]:
        return [zlib.crc32(word.encode()) % (self.size - 3) for word in text.split()]


@dataclass
class Peak:
    """The most bytes that tensors took in a stretch of work, and that torch held for them."""

    allocated: int = 0
    reserved: int = 0

    def raise_to(self, other: Peak) -> None:
        self.allocated = max(self.allocated, other.allocated)
        self.reserved = max(self.reserved, other.reserved)


class Clock:
    """Marks in the device's own time."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        if self._cuda:
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Between each mark and the next."""
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if self._cuda:
            torch.cuda.synchronize()
            return [start.elapsed_time(end) for start, end in pairs]
        return [1e3 * (end - start) for start, end in pairs]


@dataclass
class Observations:
    """What was seen of one job.

    Attributes:
        peaks: (stage, ``load`` or ``work``) -> peak; the first evaluation is apart from what is computed before it.
        load_seconds: of each network.
        clock: a mark at each evaluation of the transformer, and one after the last.
        plans: those that were followed; more than one says that memory ran out.
    """

    clock: Clock
    peaks: dict[tuple[str, str], Peak] = field(default_factory=dict)
    load_seconds: dict[str, float] = field(default_factory=dict)
    plans: list[Plan] = field(default_factory=list)

    def peak(self, stage: str | None = None) -> Peak:
        """Of a stage, or of all."""
        total = Peak()
        for (name, _), peak in self.peaks.items():
            if stage in (None, name):
                total.raise_to(peak)
        return total


class Observed(Networks):
    """Networks that note what happens to them.

    Memory is noted on CUDA only. ``observe`` begins anew; ``finish`` ends the last stage of a job.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stage: str | None = None
        self.seen = Observations(Clock(self.device))

    def observe(self) -> Observations:
        self._stage, self.seen = None, Observations(Clock(self.device))
        self._reset()
        return self.seen

    def finish(self) -> None:
        self._note("work")
        self._stage = None

    def follow(self, plan: Plan) -> None:
        if not self.seen.plans or self.seen.plans[-1] is not plan:  # every stage says it again
            self.seen.plans.append(plan)
        super().follow(plan)

    def enter(self, name: StageName, plan: Plan) -> None:
        if self._stage == "sample":
            self.seen.clock.mark()
        self._note("work")
        super().enter(name, plan)
        self._reset()
        self._stage = name

    def load(self, role: Role) -> Any:
        fresh = role not in self._loaded
        start = time.perf_counter()
        module = super().load(role)
        if fresh:
            self._note("load")
            self.seen.load_seconds[role] = time.perf_counter() - start
        return module

    def recorded(self, tokens: int, evaluations: int | None) -> Any:
        """The transformer's evaluations, with a mark before each, replayed or not."""
        evaluate = super().recorded(tokens, evaluations)

        def marked(*inputs: Any) -> torch.Tensor:
            self.seen.clock.mark()
            return evaluate(*inputs)

        return marked

    def _note(self, what: str) -> None:
        if self.device.type == "cuda" and self._stage is not None:
            torch.cuda.synchronize(self.device)
            peak = Peak(torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device))
            self.seen.peaks.setdefault((self._stage, what), Peak()).raise_to(peak)
        self._reset()

    def _reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)


def model_of(paths: dict[Role, Path], root: Path) -> ModelSet:
    """The model that consists of these files."""
    parts: dict[Role, Part] = {role: find_parts(open_model(path))[role] for role, path in paths.items()}
    return ModelSet("random", parts, root)


def observed_engine(models: ModelSet, **settings: Any) -> tuple[LightweightEngine, Observed]:
    """``engine_of`` a model, whose networks note what happens to them, for which each stage waits for the device."""
    return engine_of(models, Observed, **settings)


def engine_of(models: ModelSet, kind: type[N] = Networks, **settings: Any) -> tuple[LightweightEngine, N]:
    """An engine for a model, nothing loaded yet, with stand-ins for the tokenizers."""
    config = EngineConfig(offline=True, **settings)
    device = pick_device(config.device)
    card = card_of(device)
    vocabulary = {role: models.parts[role].shapes[key][0] for role, key in _TOKENS.items()}
    networks = kind(
        models,
        device,
        choose_precision(config, models, card, []),
        memory_manager(config, card),
        tokenizers=lambda: (Words(vocabulary["clip"]), Words(vocabulary["t5"])),
    )
    engine = LightweightEngine(config)
    engine.use(networks)
    return engine, networks


_TOKENS: dict[Role, str] = {"clip": "text_model.embeddings.token_embedding.weight", "t5": "shared.weight"}
