"""Benchmarks that share a table still read it."""

from __future__ import annotations

from benchmarks.host_work import ELSEWHERE
from benchmarks.job import NETWORKS


def test_every_network_of_a_job_is_timed_apart_from_the_host() -> None:
    assert set(ELSEWHERE.values()) >= {(owner, method) for _, owner, method in NETWORKS}
