"""``warmup`` on a CPU: a job is drawn, and nothing is compiled, which it says."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from command_line import command_line

from lightweight_engine import Config, LightweightEngine
from lightweight_engine.apps.server.messages import Ready
from lightweight_engine.apps.server.supervisor import launch
from lightweight_engine.backend import kernels
from lightweight_engine.backend.kept_files import FileVersion
from lightweight_engine.core.models import TINY
from lightweight_engine.core.warm_up import warm_up


def test_every_stage_is_drawn_twice(tmp_path: Path) -> None:
    done = warm_up(LightweightEngine(Config(models_dir=TINY, cache_dir=tmp_path, device="cpu", offline=True)))
    assert (done.folder, done.compiled) == (None, 0)
    assert set(done.first) == set(done.again) and {"encode", "decode"} <= set(done.first)
    assert sum(done.first.values()) > 0


def test_the_command_prints_a_table(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli = command_line(capsys, tmp_path, monkeypatch)
    done = cli("warmup", "--models-dir", TINY, "--device", "cpu", "--offline")
    assert done.code == 0
    assert [line.split()[0] for line in done.out.splitlines()[:2]] == ["stage", "ready"]
    assert "there is nothing to compile for cpu" in done.err
    told = json.loads(cli("warmup", "--models-dir", TINY, "--device", "cpu", "--offline", "--json").out)
    assert (told["device"], told["folder"], told["compiled"]) == ("cpu", None, 0)
    assert (told["model"], told["warnings"]) == ("tiny", [])
    assert told["first"].keys() == told["again"].keys()


def test_the_environments_folder_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    assert kernels.kept_in() == Path.home() / ".triton" / "cache"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "theirs"))
    kernels.keep_in(tmp_path / "ours")
    assert kernels.kept_in() == tmp_path / "theirs"
    del os.environ["TRITON_CACHE_DIR"]
    kernels.keep_in(tmp_path / "ours")
    assert kernels.kept_in() == tmp_path / "ours"


@pytest.mark.parametrize("wanted", [True, False])
def test_a_worker_draws_before_it_is_ready(wanted: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    child = launch(Config(models_dir=TINY, cache_dir=tmp_path, device="cpu", offline=True, warm_up=wanted))
    try:
        assert child.connection.poll(60) and isinstance(child.connection.recv(), Ready)
    finally:
        child.connection.close()
        child.process.join(20)
    assert ("a tiny job took" in capfd.readouterr().err) is wanted


def test_nothing_is_hashed_before_it_is_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of 24 GB takes a core 10 to 20 seconds; the first picture that somebody asks for tells its hash."""
    engine = LightweightEngine(Config(models_dir=tmp_path, cache_dir=tmp_path, device="cpu", offline=True))
    asked: list[FileVersion] = []
    monkeypatch.setattr("lightweight_engine.core.hashes.read_sha256", lambda file: asked.append(file) or "0" * 64)
    warm_up(engine)
    assert not asked
    result = engine.run(engine.request(prompt="a man", width=64, height=64, steps=1))
    assert asked and {file.sha256 for file in result.models} == {"0" * 64}
    engine.close()
