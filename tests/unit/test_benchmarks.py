"""Benchmarks that share a table still read it, and what they watch is seen."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.fullsize import SMALL, write_model
from benchmarks.host_work import ELSEWHERE
from benchmarks.job import NETWORKS
from benchmarks.observe import model_of, observed_engine
from benchmarks.served import NotLoggedError, Started


def test_every_network_of_a_job_is_timed_apart_from_the_host() -> None:
    assert set(ELSEWHERE.values()) >= {(owner, method) for _, owner, method in NETWORKS}


def test_each_evaluation_of_the_transformer_is_marked(tmp_path: Path) -> None:
    models = model_of(write_model(tmp_path, SMALL, torch.device("cpu")), tmp_path)
    engine, networks = observed_engine(models, device="cpu", cache_dir=tmp_path / "cache")
    seen = networks.observe()
    engine.draw(engine.request(prompt="a", width=64, height=64, steps=3, seed=1))
    networks.finish()
    assert len(seen.clock.milliseconds()) == 3


def begun(program: str) -> Started:
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    made = Started(process)
    made.follow()
    return made


def test_a_service_that_ends_is_not_waited_for() -> None:
    ended = begun('import sys; sys.exit(\'{"message": "no port"}\')')
    with pytest.raises(NotLoggedError, match=re.escape("ended with 1 before it logged 'listening':\n{\"message\": ")):
        ended.logged("listening")
    assert ended.logged("no port") == {"message": "no port"}


def test_a_service_that_says_nothing_is_waited_for_up_to_a_time() -> None:
    silent = begun("import time; time.sleep(60)")
    with pytest.raises(NotLoggedError, match=r"took longer than 0\.1 s before it logged 'listening'"):
        silent.logged("listening", seconds=0.1)
    silent.process.kill()
    silent.process.wait()
