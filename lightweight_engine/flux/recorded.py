"""The transformer's evaluations recorded as CUDA graphs and replayed, so that the GPU never waits for Python.

A step starts several hundred kernels; products in 8 bits, or small pictures, are done sooner than a host starts the
next. What is replayed are the very same kernels: not one bit changes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from ..backend.ahead import Ahead
from ..backend.linear import PackedLinear
from .transformer import Flux, Modulations

log = logging.getLogger(__name__)

MOST = 4
"""Graphs kept at a time."""


class Recorded:
    """Evaluations of a network for one pass; called as its ``forward`` is.

    The first of a shape runs as it is, which lets libraries choose what they do; the second is recorded.

    Args:
        standing: what evaluations depend on beside their inputs: where weights lie and which LoRAs act; None where
            units pass through, so that nothing can be recorded.
    """

    def __init__(self, model: Flux, standing: Callable[[], Hashable | None]) -> None:
        self._model = model
        self._standing = standing
        self._seen: set[Hashable] = set()
        self._graphs: dict[Hashable, _Graph] = {}
        self._pool: Any = None
        self._refused = False

    def __call__(self, img: Tensor, txt: Tensor, modulations: Modulations, rotary: Tensor) -> Tensor:
        """The velocity ``[B, L, C]``."""
        standing = self._standing()
        if standing is None or self._refused or torch.is_grad_enabled():
            return self._model(img, txt, modulations, rotary)
        key = (standing, img.shape, txt.shape, rotary.data_ptr())
        if key in self._seen and key not in self._graphs and len(self._graphs) < MOST:
            self._record(key, img, txt, modulations, rotary)
        self._seen.add(key)
        if key not in self._graphs:
            return self._model(img, txt, modulations, rotary)
        return self._graphs[key](img, txt, modulations)

    def close(self) -> None:
        """Give back what the graphs keep."""
        if self._graphs:
            self._graphs.clear()
            self._pool = None
            torch.cuda.empty_cache()  # what a graph worked in is no other's before

    def _record(self, key: Hashable, img: Tensor, txt: Tensor, modulations: Modulations, rotary: Tensor) -> None:
        try:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            self._graphs[key] = _Graph(self._model, self._pool, img, txt, modulations, rotary)
            return
        except RuntimeError as error:  # out of memory too: a step that is not recorded may have enough
            reason = str(error).partition("\n")[0]
        log.warning("steps are not recorded, as that failed (%s)", reason)
        self._refused = True
        self.close()


class _Graph:
    """One evaluation.

    Args:
        pool: memory that all graphs of a pass work in, as they run one after another.
    """

    def __init__(
        self, model: Flux, pool: Any, img: Tensor, txt: Tensor, modulations: Modulations, rotary: Tensor
    ) -> None:
        self._img, self._txt, self._modulations = img.clone(), txt.clone(), modulations.map(torch.clone)
        self._rotary = rotary
        self._ahead = {each for module in model.modules() if (each := _ahead_of(module)) is not None}
        self._graph = torch.cuda.CUDAGraph()
        self._settle()
        recording = torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local")
        with torch.cuda.device(img.device), recording:
            try:
                self._made = model(self._img, self._txt, self._modulations, rotary)
            finally:  # also where that fails: a recording that leaves streams apart cannot be ended
                self._settle()

    def __call__(self, img: Tensor, txt: Tensor, modulations: Modulations) -> Tensor:
        self._img.copy_(img)
        self._txt.copy_(txt)
        for ours, given in zip(self._modulations.tensors, modulations.tensors, strict=True):
            ours.copy_(given)
        self._graph.replay()
        return self._made.clone()  # the next replay writes to the same place

    def _settle(self) -> None:
        """Weights that are unpacked ahead are waited for: what a graph begins it ends."""
        for ahead in self._ahead:
            ahead.settle()


def _ahead_of(module: torch.nn.Module) -> Ahead | None:
    return module.ahead if isinstance(module, PackedLinear) else None
