"""The transformer's evaluations recorded as CUDA graphs and replayed, so that the GPU does not wait for Python.

A step starts several hundred kernels; products in 8 bits, or small pictures, are done sooner than a host starts the
next. What is replayed are the very same kernels: not one bit changes.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..backend.ahead import Ahead
from ..backend.linear import PackedLinear
from ..backend.pace import Lags, Span
from .transformer import Flux, Modulations

log = logging.getLogger(__name__)

MOST = 4
"""Graphs kept at a time."""

SEEN = 64
"""Shapes that it is known of whether the GPU waits."""

TRIAL = 3
"""Evaluations of a shape before it is recorded: the first lets libraries choose what they do, and in the others that
follow one another the GPU waited for the host."""

LATE = 0.1
"""Share of an evaluation's time: where the GPU is done sooner after the host had started all of it, it waited for the
host. How long the host took is no measure: a host that is far ahead has to wait, too, until the GPU takes more work."""

SETTLED = 2
"""Evaluations of a shape in a pass before it is recorded: the host is a step ahead, so that the first is done by then
and says whether what was seen in passes before still holds."""

WORTH = 8
"""Evaluations behind the trial, seen or to come, that recording pays from: it takes as long as starting one or two."""


class Recorded:
    """Evaluations of a network, pass after pass; called as its ``forward`` is.

    Those of a shape are recorded where the GPU was seen to wait for the host, and replayed for as long as they hold.

    Args:
        standing: what evaluations depend on beside their inputs: where weights lie and which LoRAs act; None where
            units pass through, so that nothing can be recorded.
        trial: evaluations of a shape that run as they are before.
    """

    def __init__(self, model: Flux, standing: Callable[[], Hashable | None], trial: int = TRIAL) -> None:
        self._model = model
        self._standing = standing
        self._trial = trial
        self._stood: Hashable | None = None
        self._trials: dict[Hashable, _Trial] = {}
        self._lags = Lags()
        self._graphs: dict[Hashable, _Graph] = {}
        self._calls: Counter[Hashable] = Counter()
        self._expected: int | None = None
        self._pool: Any = None
        self._refused = False
        self.nbytes = 0
        """What recorded evaluations keep of the device."""

    def begin(self, tokens: int, evaluations: int | None = None) -> None:
        """A pass begins: what was recorded for pictures of another size is dropped.

        Args:
            tokens: of the picture.
            evaluations: of each shape, where that is known.
        """
        self._calls.clear()
        self._lags = Lags()
        self._expected = evaluations
        self._refused = False
        if any(graph.tokens != tokens for graph in self._graphs.values()):
            self.close()

    def __call__(self, img: Tensor, txt: Tensor, modulations: Modulations, rotary: Tensor) -> Tensor:
        """The velocity ``[B, L, C]``."""
        standing = self._standing()
        if standing is None or self._refused or torch.is_grad_enabled():
            return self._model(img, txt, modulations, rotary)
        if standing != self._stood:
            self.close()
            self._trials.clear()
            self._stood = standing
        key = (img.shape, txt.shape)
        if key not in self._trials and len(self._trials) >= SEEN:
            self._trials.clear()
        trial = self._trials.setdefault(key, _Trial())
        trial.judge(self._lags)
        if key not in self._graphs and self._pays(key, trial):
            self._record(key, img, txt, modulations, rotary)
        self._calls[key] += 1
        if key in self._graphs:
            return self._graphs[key](img, txt, modulations, rotary)
        return trial.watch(lambda: self._model(img, txt, modulations, rotary), img.device)

    def close(self) -> None:
        """Give back what the graphs keep."""
        if self._graphs:
            self._graphs.clear()
            self._pool, self.nbytes = None, 0
            torch.cuda.empty_cache()  # what a graph worked in is no other's before

    def _pays(self, key: Hashable, trial: _Trial) -> bool:
        """Whether an evaluation is worth recording now."""
        left = None if self._expected is None else self._expected - self._calls[key]
        often = left is None or (left > 1 and trial.calls + left >= self._trial + WORTH)  # short passes may be many
        waits = trial.calls >= self._trial and trial.late >= self._trial - 1  # the first is no evidence
        waits = waits and self._calls[key] >= min(SETTLED, self._trial - 1)
        return waits and often and len(self._graphs) < MOST

    def _record(self, key: Hashable, img: Tensor, txt: Tensor, modulations: Modulations, rotary: Tensor) -> None:
        try:
            torch.cuda.synchronize(img.device)
            torch.cuda.empty_cache()  # a graph takes memory of its own: what steps worked in becomes free for it
            before = torch.cuda.memory_reserved(img.device)
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            self._graphs[key] = _Graph(self._model, self._pool, img, txt, modulations, rotary)
            self.nbytes += torch.cuda.memory_reserved(img.device) - before
            return
        except RuntimeError as error:  # out of memory too: a step that is not recorded may have enough
            reason = str(error).partition("\n")[0]
        log.warning("steps are not recorded, as that failed (%s)", reason)
        self._refused = True
        self.close()


@dataclass
class _Trial:
    """What was seen of evaluations that are not recorded.

    ``late``: of those that are done, the last ones in a row that the GPU waited in. A host may fall back at any time:
    other programs take its cores, and a GPU that rests between jobs is quicker when it begins.
    """

    calls: int = 0
    late: int = 0
    _open: list[Span] = field(default_factory=list)

    def watch(self, work: Callable[[], Tensor], device: torch.device) -> Tensor:
        span = Span(device)
        made = work()
        span.end()
        self.calls += 1
        if self.calls > 1:  # the first compiles
            self._open.append(span)
        return made

    def judge(self, lags: Lags) -> None:
        """Look at those that are done by now."""
        while self._open and self._open[0].is_done:
            span = self._open.pop(0)
            self.late = self.late + 1 if lags.of(span) < LATE * span.seconds else 0


class _Graph:
    """One evaluation.

    Args:
        pool: memory that all graphs of a pass work in, as they run one after another.
    """

    def __init__(
        self, model: Flux, pool: Any, img: Tensor, txt: Tensor, modulations: Modulations, rotary: Tensor
    ) -> None:
        self.tokens = img.shape[1]
        self._modulations = modulations.map(torch.clone)
        self._inputs = [img.clone(), txt.clone(), *self._modulations.tensors]
        self._rotary, self._rotary_given = rotary.clone(), rotary
        self._ahead = {each for module in model.modules() if (each := _ahead_of(module)) is not None}
        self._graph = torch.cuda.CUDAGraph()
        self._settle()
        recording = torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local")
        with torch.cuda.device(img.device), recording:
            try:
                self._made = model(*self._inputs[:2], self._modulations, self._rotary)
            finally:  # also where that fails: a recording that leaves streams apart cannot be ended
                self._settle()

    def __call__(self, img: Tensor, txt: Tensor, modulations: Modulations, rotary: Tensor) -> Tensor:
        torch._foreach_copy_(self._inputs, [img, txt, *modulations.tensors])  # type: ignore[reportPrivateImportUsage]
        if rotary is not self._rotary_given:
            self._rotary.copy_(rotary)
            self._rotary_given = rotary
        self._graph.replay()
        return self._made.clone()  # the next replay writes to the same place

    def _settle(self) -> None:
        """Weights that are unpacked ahead are waited for: what a graph begins it ends."""
        for ahead in self._ahead:
            ahead.settle()


def _ahead_of(module: torch.nn.Module) -> Ahead | None:
    return module.ahead if isinstance(module, PackedLinear) else None
