"""``lora`` on the command line, against the model that ships with the engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Cli, command_line
from loopback import serving
from lora_models import lora_file, numbers, random_lora
from safetensors.torch import save

from lightweight_engine.core.models import TINY, ModelLibrary


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    return command_line(capsys, tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def tensors() -> dict:
    shapes = {role: part.shapes for role, part in ModelLibrary([TINY]).choose().parts.items()}
    return random_lora(shapes, seed=1, text=True)


@pytest.fixture
def models(tmp_path: Path, tensors: dict) -> Path:
    folder = tmp_path / "models"
    (folder / "Lora").mkdir(parents=True)
    lora_file(
        folder / "Lora", tensors, name="night.safetensors", metadata={"ss_output_name": "dark", "ss_network_dim": "2"}
    )
    return folder


def test_ls(cli: Cli, models: Path) -> None:
    (models / "Lora" / "bad.safetensors").write_bytes(b"no model")
    lines = cli("lora", "ls", "--models-dir", models).out.splitlines()
    assert [line.split()[0] for line in lines][:2] == ["NAME", "bad"]
    rows = {row["name"]: row for row in json.loads(cli("lora", "ls", "--models-dir", models, "--json").out)["files"]}
    assert rows["night"]["alias"] == "dark" and rows["bad"]["problem"]


def test_inspect_and_check(cli: Cli, models: Path) -> None:
    told = json.loads(cli("lora", "inspect", "dark", "--models-dir", models, "--json").out)
    assert told["bytes"] == (models / "Lora" / "night.safetensors").stat().st_size, "as lora ls has it"
    assert told["algorithms"] == {"LoRA": 56} and told["ranks"] == {"2": 56}
    assert told["changes"] == {"transformer": 48, "clip": 8}
    assert told["metadata"] == {"ss_output_name": "dark", "ss_network_dim": "2"}
    done = cli("lora", "check", models / "Lora" / "night.safetensors", "--models-dir", models)
    assert done.code == 0 and "56 of 56 modules applied" in done.out


def test_what_cannot_be_used_ends_with_code_3(cli: Cli, models: Path, tmp_path: Path) -> None:
    other = {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": numbers(4, 320)}
    lora_file(tmp_path, other, name="other.safetensors")
    for command, name in (("check", tmp_path / "other.safetensors"), ("inspect", "nigth"), ("rm", "../x"),
                          ("add", tmp_path / "other.safetensors"), ("check", Path(__file__))):  # fmt: skip
        done = cli("lora", command, name, "--models-dir", models)
        assert done.code == 3, done.err
        assert "Traceback" not in done.err
    assert [path.name for path in (models / "Lora").iterdir()] == ["night.safetensors"]


def test_a_file_that_is_not_there(cli: Cli, models: Path, tmp_path: Path) -> None:
    for command, given, told in (
        ("add", "nope.safetensors", "there is no file 'nope.safetensors'; give the path"),
        ("add", "night", "there is no file 'night'"),
        ("check", "nope.safetensors", "there is no file 'nope.safetensors', and no LoRA of that name; give a path"),
        ("check", "nigth.safetensors", "there is no file 'nigth.safetensors', and no LoRA of that name; did you mean"),
        ("inspect", "folder/nope", "there is no file 'folder/nope'"),
        ("inspect", "nope", "there is no LoRA called 'nope'"),
    ):
        done = cli("lora", command, given, "--models-dir", models)
        assert (done.code, done.err.startswith(f"error: {told}")) == (3, True), done.err


def test_rm_of_what_is_not_there_says_what_the_folder_has(cli: Cli, models: Path) -> None:
    assert cli("lora", "rm", "nope", "--models-dir", models).err.endswith("has no LoRA called 'nope'; it has night\n")
    assert "did you mean 'night'?" in cli("lora", "rm", "nigth", "--models-dir", models).err
    (models / "Lora" / "night.safetensors").unlink()
    assert cli("lora", "rm", "nope", "--models-dir", models).err.endswith("; it has none\n")


def test_add_and_rm(cli: Cli, models: Path, tmp_path: Path, tensors: dict) -> None:
    lora_file(tmp_path, tensors, name="hat.safetensors")
    source, target = tmp_path / "hat.safetensors", models / "Lora" / "hat.safetensors"
    for _ in range(2):  # the same content again is no fault
        assert cli("lora", "add", source, "--models-dir", models).out.strip() == str(target)
    lora_file(tmp_path, {**tensors, "extra.alpha": numbers(1)}, name="hat.safetensors")
    assert cli("lora", "add", source, "--models-dir", models).code == 3
    assert cli("lora", "add", source, "--models-dir", models, "--force").code == 0
    assert target.read_bytes() == source.read_bytes()
    assert cli("lora", "add", source, "--models-dir", models, "--name", "../hat").code == 2
    assert cli("lora", "rm", "hat", "--models-dir", models).code == 0
    assert not target.exists() and not [*models.rglob("*.part")]


def test_add_from_an_address(cli: Cli, models: Path, tensors: dict, tmp_path: Path) -> None:
    with serving() as site:
        site.files["style.safetensors"] = save(tensors)
        options = ("--models-dir", models, "--set", f"allow_hosts={site.name}", "--set", f"cache_dir={tmp_path / 'c'}")
        done = cli("lora", "add", site.url("style.safetensors?token=SECRET"), *options)
        assert done.code == 0, done.err
        assert "SECRET" not in done.out + done.err
    assert (models / "Lora" / "style.safetensors").exists()
