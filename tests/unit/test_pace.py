"""The pace of a device as a program sees it; what only a GPU shows is in tests/gpu."""

from __future__ import annotations

import time

import torch

from lightweight_engine.backend.pace import Laps
from lightweight_engine.core.progress import Tracker, Watch

CPU = torch.device("cpu")


def test_laps_are_between_points() -> None:
    laps = Laps(CPU)
    assert laps.seconds() == []
    laps.mark()
    assert laps.seconds() == []
    time.sleep(0.02)
    laps.mark()
    laps.mark()
    first, second = laps.seconds()
    assert 0.02 <= first < 10 and second < first


def test_stages_of_a_kind_are_timed_together() -> None:
    tracker = Tracker([2], [1], Watch(), Laps(CPU))
    for stage in ("encode", "sample", "decode", "detect", "detail", "detect"):
        tracker.enter(stage)
    assert list(tracker.timings) == ["load", "encode", "sample", "decode", "detect", "detail"], "the last is under way"
    before = tracker.timings["detect"]
    time.sleep(0.01)
    tracker.finish()
    assert tracker.timings["detect"] >= before + 0.01 and "done" not in tracker.timings
