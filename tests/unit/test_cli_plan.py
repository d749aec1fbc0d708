"""The command ``plan``: what a request would take, without loading anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Cli, command_line
from factories import save_family

from lightweight_engine.backend.checkpoint import Checkpoint

SAID_BEFORE = ("loading", "warning", "model:")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    save_family(tmp_path / "models")
    return command_line(capsys, tmp_path, monkeypatch)


def test_it_prints_the_stages_and_reads_no_weight(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: Checkpoint, name: str) -> None:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(Checkpoint, "tensor", read)
    done = cli("plan", "a cat", "--device", "cpu", "-W", 64, "-H", 64)
    assert done.code == 0, done.err
    assert [line.split()[0] for line in done.out.splitlines()[:4]] == ["stage", "encode", "sample", "decode"]


def test_a_card_that_is_not_there(cli: Cli) -> None:
    done = cli("plan", "--vram", 12, "--card", "NVIDIA RTX 4090", "--steps", 7, "--json")
    data = json.loads(done.out)
    assert (data["card"], data["total"], data["fits"]) == ("NVIDIA RTX 4090", 12 << 30, True)
    assert data["budget"] < data["total"]
    assert data["storage"]["transformer"] == "nf4"
    stages = {row["stage"]: row for row in data["stages"]}
    assert stages["sample"]["passes"] == 7
    assert data["residency"] == "stored"
    assert stages["sample"]["floor_seconds_per_pass"] > 0
    assert data["peak"] == max(row["peak"] for row in data["stages"])


def test_options_of_the_request_count(cli: Cli) -> None:
    def room(*options: object) -> int:
        rows = json.loads(cli("plan", "--vram", 24, "--json", *options).out)["stages"]
        return next(row["room"] for row in rows if row["stage"] == "sample")

    small = ("-W", 512, "-H", 512)
    assert room(*small) < room(*small, "--cfg-scale", 3) < room("-W", 2048, "-H", 2048)
    assert room(*small) < room(*small, "--num-outputs", 4, "--batch-size", 4)


def test_what_does_not_fit_ends_with_code_4(cli: Cli) -> None:
    done = cli("plan", "--vram", 0.4, "-W", 2048, "-H", 2048)
    assert done.code == 4
    assert "may be taken" in done.out
    assert "it does not fit: the job needs" in done.err
    done = cli("plan", "--vram", 0.4, "-W", 2048, "-H", 2048, "--json")
    assert (done.code, json.loads(done.out)["fits"]) == (4, False)


def test_generate_shows_the_plan_of_what_does_not_fit(cli: Cli, tmp_path: Path) -> None:
    """As the table that it is, below the error, which stays one line."""
    (tmp_path / "none").mkdir()
    arguments = ("generate", "a", "--device", "cpu", "--models-dir", "none", "--set", "vram_limit=0.05")
    error, *table = [line for line in cli(*arguments).err.splitlines() if not line.startswith(SAID_BEFORE)]
    assert error.startswith("error: the job needs ") and "stage" in error
    assert [line.split()[0] for line in table] == ["stage", "encode", "sample", "decode", "CPU:"]
    told = json.loads(cli(*arguments, "--json").out)["error"]
    assert "\n" not in told["message"] and told["plan"].splitlines() == table


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--card", "RTX 4090"], "give --vram too"),
        (["--vram", 0], "--vram: 0 is too small; give more than 0, up to 1,024; it is a number of GiB"),
        (["--vram", "12GB"], "--vram: '12GB' is no number; give more than 0, up to 1,024; it is a number of GiB"),
        (["--vram", "nan"], "--vram: nan is no number"),
        (["--steps", 0], "--steps"),
        (["--width", 9000], "max_side"),
        (["--width", 4096, "--height", 4096, "--steps", 1000], "error: --steps: 4096x4096 x 1,000 evaluations x 1 pic"),
        (["--models-dir", "absent"], "there is no folder"),
    ],
)
def test_wrong_options(cli: Cli, arguments: list[object], said: str) -> None:
    done = cli("plan", *arguments)
    assert (done.code, done.out) == (2, "")
    assert said in done.err


def test_an_unknown_card_has_no_times(cli: Cli) -> None:
    done = cli("plan", "--vram", 12, "--card", "Riva 128")
    assert done.code == 0
    assert "warning: --card: the speed of 'Riva 128' is not known; known are H200" in done.err
