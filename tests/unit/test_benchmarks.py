"""Benchmarks that share a table still read it, and what they watch is seen."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.fullsize import SMALL, write_model
from benchmarks.host_work import ELSEWHERE
from benchmarks.job import NETWORKS
from benchmarks.observe import model_of, observed_engine


def test_every_network_of_a_job_is_timed_apart_from_the_host() -> None:
    assert set(ELSEWHERE.values()) >= {(owner, method) for _, owner, method in NETWORKS}


def test_each_evaluation_of_the_transformer_is_marked(tmp_path: Path) -> None:
    models = model_of(write_model(tmp_path, SMALL, torch.device("cpu")), tmp_path)
    engine, networks = observed_engine(models, device="cpu", cache_dir=tmp_path / "cache")
    seen = networks.observe()
    engine.draw(engine.request(prompt="a", width=64, height=64, steps=3, seed=1))
    networks.finish()
    assert len(seen.clock.milliseconds()) == 3
