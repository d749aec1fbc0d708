"""Counters, gauges and histograms in Prometheus' text format.

Written out, as it is little: the client library keeps its metrics in one registry of the process.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator

from .messages import Outcome

SECONDS = (0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Labels = tuple[tuple[str, str], ...]


class Counter:
    """Counts up, for each set of labels.

    Args:
        known: the one label, with values that are told from the start, at 0: what begins at 1 has no rise that a query
            sees.
    """

    def __init__(self, name: str, help: str, **known: tuple[str, ...]) -> None:
        self.name, self.help = name, help
        self._values: defaultdict[Labels, float] = defaultdict(float)
        for label, values in known.items():
            for value in values:
                self._values[(label, value),] = 0.0

    def add(self, amount: float = 1.0, **labels: str) -> None:
        self._values[_sorted(labels)] += amount

    def lines(self) -> Iterator[str]:
        yield from _head(self.name, self.help, "counter")
        for labels, value in sorted(self._values.items()):
            yield _line(self.name, labels, value)


class Histogram:
    """Counts observations by size, for each set of labels."""

    def __init__(self, name: str, help: str, bounds: tuple[float, ...] = SECONDS) -> None:
        self.name, self.help, self.bounds = name, help, bounds
        self._counts: defaultdict[Labels, list[int]] = defaultdict(lambda: [0] * (len(bounds) + 1))
        self._sums: defaultdict[Labels, float] = defaultdict(float)

    def observe(self, value: float, **labels: str) -> None:
        key = _sorted(labels)
        self._counts[key][bisect_left(self.bounds, value)] += 1
        self._sums[key] += value

    def lines(self) -> Iterator[str]:
        yield from _head(self.name, self.help, "histogram")
        for labels, counts in sorted(self._counts.items()):
            total = 0
            for bound, count in zip((*map(str, self.bounds), "+Inf"), counts, strict=True):
                total += count
                yield _line(f"{self.name}_bucket", (*labels, ("le", bound)), total)
            yield _line(f"{self.name}_sum", labels, self._sums[labels])
            yield _line(f"{self.name}_count", labels, total)


class Metrics:
    """What the service counts."""

    def __init__(self) -> None:
        self.requests = Histogram("lwe_http_request_seconds", "Requests by method, route and status.")
        self.jobs = Counter(
            "lwe_jobs_total",
            "Jobs that are over, by state; refused, timed_out: by their request.",
            state=("succeeded", "failed", "cancelled", "refused", "timed_out"),
        )
        self.refused = Counter(
            "lwe_jobs_refused_total", "Jobs that were not accepted, by reason.", reason=("queue_full", "caller_full")
        )
        self.canaries = Counter(
            "lwe_canaries_total", "Tiny jobs of the service's own, by result.", result=("well", "failed")
        )
        self.errors = Counter("lwe_errors_total", "Errors that callers were told, by type.")
        self.waited = Histogram("lwe_job_wait_seconds", "Seconds that jobs waited.")
        self.stages = Histogram("lwe_stage_seconds", "Seconds of each stage of a job.")
        self.images = Counter("lwe_images_total", "Pictures made.")
        self.images.add(0)
        self.peak = Histogram(
            "lwe_job_peak_bytes",
            "Most memory of the device that a job took.",
            tuple(float(1 << n) for n in range(28, 38)),
        )

    def made(self, outcome: Outcome) -> None:
        self.images.add(len(outcome.images))
        self.peak.observe(float(outcome.told["peak_memory"]))
        for stage, seconds in outcome.told["timings"].items():
            self.stages.observe(seconds, stage=stage)

    def text(
        self, gauges: dict[str, tuple[str, Callable[[], float]]], facts: dict[str, tuple[str, dict[str, str]]]
    ) -> str:
        """All of it; ``gauges`` are read now: name -> (help, value). ``facts`` are labels of a 1: name -> (help,
        labels); one without labels is not known yet."""
        lines = [line for each in vars(self).values() for line in each.lines()]
        for name, (help, value) in gauges.items():
            lines += [*_head(name, help, "gauge"), _line(name, (), value())]
        for name, (help, labels) in facts.items():
            lines += [*_head(name, help, "gauge"), *([_line(name, _sorted(labels), 1)] if labels else ())]
        return "\n".join(lines) + "\n"


def _sorted(labels: dict[str, str]) -> Labels:
    return tuple(sorted(labels.items()))


def _head(name: str, help: str, kind: str) -> Iterator[str]:
    yield f"# HELP {name} {help}"
    yield f"# TYPE {name} {kind}"


def _line(name: str, labels: Labels, value: float) -> str:
    told = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels)
    return f"{name}{{{told}}} {value:.15g}" if told else f"{name} {value:.15g}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
