"""What the training stages share: float32 masters of bfloat16 networks, a learning rate over time, a running average.

A stage runs for a number of seconds, not of steps, and goes on from saved weights: the optimizer then starts anew with
a short warm-up.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

log = logging.getLogger("tiny")


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Course:
    """The course of a stage: its time, its learning rate, and the history of its figures.

    Args:
        lr: the highest learning rate; it rises during the first ``warmup`` of the time and falls along a cosine.
    """

    def __init__(self, seconds: float, *, lr: float, warmup: float = 0.03, lowest: float = 0.01) -> None:
        self._start, self._seconds = time.monotonic(), seconds
        self._rate, self._warmup, self._lowest = lr, warmup, lowest
        self.steps = 0
        self.history: list[tuple[int, float, dict[str, float]]] = []
        self._sums: dict[str, Tensor] = {}
        self._since = 0

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._start

    @property
    def progress(self) -> float:
        return self.elapsed / self._seconds

    def rate(self) -> float:
        done = min(1.0, self.progress)
        if done < self._warmup:
            return self._rate * max(0.02, done / self._warmup)
        falling = 0.5 + 0.5 * math.cos(math.pi * (done - self._warmup) / (1 - self._warmup))
        return self._rate * (self._lowest + (1 - self._lowest) * falling)

    def count(self, **figures: Tensor) -> None:
        """One step was made; ``figures`` are averaged into the history. Waits for no device."""
        self.steps += 1
        self._since += 1
        for name, value in figures.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().float()

    def note(self, name: str, every: int = 1) -> bool:
        """Once in ``every`` steps write the mean figures to the log and the history; whether it was done."""
        if self._since < every:
            return False
        figures = {key: round(float(value) / self._since, 5) for key, value in self._sums.items()}
        self._sums, self._since = {}, 0
        self.history.append((self.steps, round(self.elapsed, 1), figures))
        log.info("%s step %d %.0f s %s", name, self.steps, self.elapsed, figures)
        return True


class Trainer:
    """Trains ``networks``, which compute in bfloat16, through float32 masters of their weights.

    Args:
        average: share of the old value that the running average keeps per step, in the long run.
    """

    def __init__(
        self, networks: Sequence[nn.Module], course: Course, *, weight_decay: float = 0.01, average: float = 0.999
    ) -> None:
        for network in networks:
            network.requires_grad_(True)
        params = [p for network in networks for p in network.parameters()]
        self._masters = [p.detach().float().clone().requires_grad_() for p in params]
        self._average = [p.detach().clone() for p in self._masters]
        for network in networks:
            network.to(torch.bfloat16)
        self._working = [p for network in networks for p in network.parameters()]
        self._grads = [torch.zeros_like(p) for p in self._masters]
        for master, grad in zip(self._masters, self._grads, strict=True):
            master.grad = grad
        decayed = [p for p in self._masters if p.ndim > 1]
        plain = [p for p in self._masters if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), eps=1e-8, fused=True)
        self._networks, self._keep, self.course = networks, average, course

    def step(self, loss: Tensor, **figures: Tensor) -> None:
        """One step down the gradient of ``loss``; ``figures`` are averaged into the history."""
        loss.backward()
        torch._foreach_copy_(self._grads, [w.grad for w in self._working])
        for working in self._working:
            working.grad = None
        torch.nn.utils.clip_grad_norm_(self._masters, 1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = self.course.rate()
        self._optimizer.step()
        self.course.count(loss=loss, **figures)
        keep = min(self._keep, (1 + self.course.steps) / (10 + self.course.steps))
        with torch.no_grad():
            torch._foreach_copy_(self._working, self._masters)
            torch._foreach_lerp_(self._average, self._masters, 1 - keep)

    def averages(self) -> list[dict[str, Tensor]]:
        """The running average of each network's weights, by name."""
        values = iter(self._average)
        return [{name: next(values) for name, _ in network.named_parameters()} for network in self._networks]

    def use_averages(self) -> None:
        """End of training: the networks take the running averages, in float32, and need no gradients."""
        for network, weights in zip(self._networks, self.averages(), strict=True):
            network.float().load_state_dict({**network.state_dict(), **weights})
            network.requires_grad_(False)


def save_history(path: Path, stage: str, course: Course) -> None:
    """Add a stage's history to a JSON file that holds one list of runs per stage."""
    path.parent.mkdir(parents=True, exist_ok=True)
    runs = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows = [{"step": step, "seconds": seconds, **figures} for step, seconds, figures in course.history]
    runs.setdefault(stage, []).append(rows)
    path.write_text(json.dumps(runs), encoding="utf-8")
