"""When a step is recorded, and what becomes of it: the policy, with a GPU's events and recordings played by hand.

The recordings themselves are tested on a GPU (tests/gpu/test_recorded.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightweight_engine import Config, LightweightEngine
from lightweight_engine.backend import pace
from lightweight_engine.flux import recorded
from lightweight_engine.flux.recorded import MOST, SEEN, SETTLED, TRIAL, WORTH, Recorded

MIB = 1 << 20


class Played:
    """A GPU that waits for the host in a step (``waits``), or does not, and that is done with it; and its memory."""

    def __init__(self) -> None:
        self.waits = True
        self.done = True
        self.reserved = 0
        self.recordings: list[torch.Size] = []
        self.fails = False
        self.emptied = 0

    def record(self, model: Any, pool: Any, img: Tensor, *others: Any) -> Any:
        if self.fails:
            raise torch.OutOfMemoryError("out of memory")
        self.recordings.append(img.shape)
        self.reserved += 100 * MIB
        return Replayed(img.shape[1])


class PlayedSpan:
    """A second on the GPU, which is done half a second after the host had started it, or at once as it waited."""

    seconds = 1.0

    def __init__(self, gpu: Played) -> None:
        self.gpu, self.late = gpu, 0.0 if gpu.waits else 0.5

    def end(self) -> None: ...

    @property
    def is_done(self) -> bool:
        return self.gpu.done

    def gaps(self, first: Any) -> list[float]:
        return [0.0, self.late]


class Replayed:
    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __call__(self, img: Tensor, *others: Any) -> Tensor:
        return img + 1


def model(img: Tensor, *others: Any) -> Tensor:
    return img


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Played]:
    played = Played()

    def empty() -> None:
        played.emptied += 1

    monkeypatch.setattr(recorded, "_Graph", played.record)
    monkeypatch.setattr(recorded, "Span", lambda device: PlayedSpan(played))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: played.reserved)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    with torch.no_grad():
        yield played


def steps(standing: Any = lambda: "here", **options: Any) -> Recorded:
    return Recorded(model, standing, **options)  # type: ignore[arg-type]


def replays(each: Recorded, count: int, tokens: int = 4, batch: int = 1) -> list[bool]:
    """Which of so many evaluations are replayed."""
    img, txt = torch.zeros(batch, tokens, 2), torch.zeros(batch, 3, 2)
    return [bool(each(img, txt, None, txt).any()) for _ in range(count)]  # type: ignore[arg-type]


def test_a_step_is_recorded_where_the_gpu_waits_for_the_host(gpu: Played) -> None:
    each = steps()
    each.begin(4)
    assert replays(each, TRIAL + 3) == [False] * TRIAL + [True] * 3
    assert len(gpu.recordings) == 1 and each.nbytes == 100 * MIB


def test_nothing_is_recorded_where_the_host_is_ahead(gpu: Played) -> None:
    gpu.waits = False
    each = steps()
    each.begin(4)
    assert not any(replays(each, 20)) and each.nbytes == 0


def test_a_host_that_falls_back_later_is_seen(gpu: Played) -> None:
    gpu.waits = False
    each = steps()
    each.begin(4, 30)
    replays(each, 5)
    gpu.waits = True
    assert not any(replays(each, 1))
    gpu.waits = False  # once is not enough
    assert not any(replays(each, 2))
    gpu.waits = True
    assert replays(each, TRIAL + 1) == [False] * (TRIAL - 1) + [True] * 2


def test_only_steps_that_are_done_are_judged(gpu: Played) -> None:
    each = steps()
    gpu.done = False
    assert not any(replays(each, 9))
    gpu.done = True
    assert all(replays(each, 1))


def test_of_steps_that_are_done_nothing_is_kept(gpu: Played) -> None:
    """However short passes are."""
    each = steps()
    for _ in range(50):
        each.begin(4, 1)
        assert not any(replays(each, 1))
    (trial,) = each._trials.values()
    assert trial.calls == 50 and len(trial._open) <= 1


def test_sizes_are_not_remembered_for_ever(gpu: Played) -> None:
    each = steps()
    for tokens in range(1, 3 * SEEN):
        each.begin(tokens, 1)
        replays(each, 1, tokens)
    assert len(each._trials) <= SEEN


def test_the_last_step_of_a_pass_is_not_recorded(gpu: Played) -> None:
    gpu.waits = False
    each = steps()
    each.begin(4, 20)
    replays(each, 17)
    gpu.waits = True
    assert not any(replays(each, 3))


def test_the_first_evaluation_is_no_evidence(gpu: Played) -> None:
    gpu.waits = False
    each = steps()
    replays(each, 1)
    gpu.waits = True
    assert any(replays(each, TRIAL))


@pytest.mark.parametrize(("evaluations", "pays"), [(TRIAL + WORTH, True), (TRIAL + WORTH - 1, False), (None, True)])
def test_a_short_pass_does_not_pay(gpu: Played, evaluations: int | None, pays: bool) -> None:
    each = steps()
    each.begin(4, evaluations)
    assert any(replays(each, TRIAL + WORTH)) is pays


def test_short_passes_pay_where_they_are_many(gpu: Played) -> None:
    each, seen = steps(), []
    for _ in range(4):
        each.begin(4, 4)
        seen.append(replays(each, 4))
    assert seen == [[False] * 4, [False] * 4, [False] * SETTLED + [True] * (4 - SETTLED), [True] * 4]


def test_a_later_pass_of_the_same_size_replays_from_its_first_step(gpu: Played) -> None:
    each = steps()
    each.begin(4, 20)
    replays(each, 20)
    each.begin(4, 2)  # however short: it costs nothing now
    assert all(replays(each, 2)) and len(gpu.recordings) == 1


def test_a_pass_of_another_size_drops_what_was_recorded(gpu: Played) -> None:
    each = steps()
    each.begin(4)
    replays(each, TRIAL + 1)
    each.begin(9)
    assert each.nbytes == 0 and gpu.emptied == 2
    assert replays(each, TRIAL + 1, 9) == [False] * TRIAL + [True]
    each.begin(4)
    assert replays(each, SETTLED + 1) == [False] * SETTLED + [True]  # judged already, and seen to be so still


def test_a_host_that_was_late_once_is_not_for_ever(gpu: Played) -> None:
    """As in the first job of a process, while programs are compiled."""
    each = steps()
    each.begin(4, 20)
    assert any(replays(each, 20))
    each.begin(9, 20)
    gpu.waits = False
    assert not any(replays(each, 20, 9))
    each.begin(4, 20)
    assert not any(replays(each, 20))


def test_what_changes_the_network_drops_what_was_recorded(gpu: Played) -> None:
    version = [1]
    each = steps(lambda: version[0])
    replays(each, TRIAL + 1)
    version[0] = 2
    assert replays(each, TRIAL + 1) == [False] * TRIAL + [True]
    assert len(gpu.recordings) == 2 and each.nbytes == 100 * MIB


def test_nothing_is_recorded_where_weights_pass_through(gpu: Played) -> None:
    assert not any(replays(steps(lambda: None), 10)) and not gpu.recordings


def test_few_shapes_are_kept(gpu: Played) -> None:
    each = steps(trial=1)
    for batch in range(1, MOST + 3):
        replays(each, 3, batch=batch)
    assert len(gpu.recordings) == MOST
    assert not any(replays(each, 3, batch=MOST + 1)) and all(replays(each, 2, batch=MOST))


def test_what_cannot_be_recorded_is_computed_and_tried_again_in_the_next_pass(
    gpu: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(recorded.log, "warning", lambda message, *values: told.append(message % values))
    gpu.fails = True
    each = steps()
    assert not any(replays(each, 10))
    assert len(told) == 1 and "out of memory" in told[0]
    gpu.fails = False
    each.begin(4)
    assert replays(each, SETTLED + 1) == [False] * SETTLED + [True]


# --- between passes --------------------------------------------------------------------------------------------------


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[LightweightEngine]:
    """It has drawn a picture; its recorded steps take 100 MiB, or so they say."""
    made = LightweightEngine(Config(models_dir=tmp_path, cache_dir=tmp_path, device="cpu", offline=True))
    made.run(made.request(prompt="a man", width=64, height=64, steps=1))
    yield made
    made.close()


def recorded_of(engine: LightweightEngine) -> Any:
    return engine.networks._loaded["transformer"].recorded


@pytest.fixture
def closed(engine: LightweightEngine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was recorded, each time that it was dropped."""
    times: list[str] = []
    monkeypatch.setattr(recorded_of(engine), "nbytes", 100 * MIB)
    monkeypatch.setattr(recorded_of(engine), "close", lambda: times.append("closed"))
    return times


@pytest.mark.parametrize(
    ("name", "replay", "stays"),
    [("decode", 100, True), ("decode", 99, False), ("encode", 0, False), ("sample", 0, True)],
)
def test_recorded_steps_stay_through_stages_that_have_room(
    engine: LightweightEngine, closed: list[str], name: Any, replay: int, stays: bool
) -> None:
    plan = engine.plan(engine.request(prompt="a man", width=64, height=64, steps=1))
    stages = tuple(replace(stage, replay=replay * MIB) for stage in plan.stages)
    engine.networks.enter(name, replace(plan, stages=stages))
    assert closed == ([] if stays else ["closed"])


def test_what_is_recorded_is_held(engine: LightweightEngine, closed: list[str]) -> None:
    without = sum(loaded.placed.nbytes for loaded in engine.networks._loaded.values())
    assert engine.networks.held == without + 100 * MIB


@pytest.mark.parametrize("change", ["other LoRAs", "another place", "gone"])
def test_recorded_steps_go_with_what_they_depend_on(engine: LightweightEngine, closed: list[str], change: str) -> None:
    networks = engine.networks
    loaded = networks._loaded["transformer"]
    version = loaded.version
    if change == "other LoRAs":
        loaded.adapter.key = "of another set"
    elif change == "another place":
        networks._placements["transformer"] = replace(loaded.placed, fixed=loaded.placed.fixed + 1)
    else:
        networks.release("transformer")
    networks.load("transformer")
    assert "closed" in closed and loaded.version > version
    assert recorded_of(engine) is (None if change == "gone" else loaded.recorded)


# --- who waits for whom ----------------------------------------------------------------------------------------------


class Passed:
    """An event in a GPU's work, at a time of its clock."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def elapsed_time(self, other: Passed) -> float:
        return 1e3 * (other.seconds - self.seconds)


def lags_of(host: list[float], gpu: list[float]) -> list[float]:
    """What is told of spans in a row, from when the host and the GPU came to each's beginning and end."""
    spans = []
    for first in range(0, len(host), 2):
        span = pace.Span.__new__(pace.Span)
        span._marks = [(host[each], Passed(gpu[each])) for each in (first, first + 1)]
        spans.append(span)
    lags = pace.Lags()
    return [round(lags.of(span), 3) for span in spans]


def test_a_gpu_that_waits_is_done_with_the_host() -> None:
    assert lags_of([0.0, 1.0, 1.1, 2.1], [50.0, 51.01, 51.1, 52.12]) == [0.01, 0.02]


def test_a_gpu_that_has_work_is_done_later() -> None:
    """Also where the host had to wait in the middle, as it may not start more."""
    assert lags_of([0.0, 0.4, 0.5, 1.9, 1.9, 2.9], [5.0, 6.0, 6.0, 7.0, 7.0, 8.0]) == [0.6, 0.1, 0.1]
    assert lags_of([0.0, 0.4, 0.5, 0.9, 1.0, 1.9], [5.0, 6.0, 6.0, 7.0, 7.0, 8.0]) == [0.6, 1.1, 1.1]


def test_a_gpu_that_was_busy_before_is_found_out_as_soon_as_it_waits() -> None:
    host, gpu = [0.0, 1.0, 1.1, 2.6, 2.7, 3.7], [5.3, 6.3, 6.3, 7.65, 7.7, 8.72]
    assert lags_of(host, gpu) == [0.0, 0.0, 0.02]
    assert lags_of(host[4:] + host[:2], gpu[4:] + gpu[:2]) == [0.02, 0.3], "both clocks go on between passes"


# --- the host's lead -------------------------------------------------------------------------------------------------


def test_the_host_waits_for_the_step_before_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[int] = []

    class Point:
        def __init__(self, number: int) -> None:
            self.number = number

        def synchronize(self) -> None:
            waited.append(self.number)

    numbers = iter(range(10))
    monkeypatch.setattr(pace, "mark", lambda device: Point(next(numbers)))
    lead = pace.Lead(torch.device("cuda"))
    seen = []
    for _ in range(4):
        lead.step()
        seen.append(list(waited))
    assert seen == [[], [0], [0, 1], [0, 1, 2]]


def test_on_a_cpu_nothing_is_behind() -> None:
    lead = pace.Lead(torch.device("cpu"))
    lead.step()
    lead.step()
    assert pace.mark(torch.device("cpu")) is None
