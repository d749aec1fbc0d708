"""What the service counts is told from its start, so that a first failure is a rise."""

from __future__ import annotations

import re
from typing import get_args

from lightweight_engine.apps.server.jobs import State
from lightweight_engine.apps.server.metrics import Counter, Metrics


def test_counters_begin_at_zero() -> None:
    lines = [line for line in Metrics().text({}, {}).splitlines() if not line.startswith("#")]
    told = dict(line.rsplit(" ", 1) for line in lines)
    assert set(told.values()) == {"0"}
    over = {*get_args(State)} - {"queued", "running"}
    assert set(re.findall(r'lwe_jobs_total\{state="(\w+)"\}', "\n".join(lines))) == {*over, "refused", "timed_out"}
    assert 'lwe_jobs_refused_total{reason="queue_full"}' in told and 'lwe_canaries_total{result="failed"}' in told
    assert "lwe_images_total" in told


def test_others_come_as_they_are_met() -> None:
    counter = Counter("n", "Some.", kind=("a", "b"))
    for kind in ("b", "c", "b"):
        counter.add(kind=kind)
    assert list(counter.lines())[2:] == ['n{kind="a"} 0', 'n{kind="b"} 2', 'n{kind="c"} 1']
