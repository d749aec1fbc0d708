"""The commands on model files: ls, verify, inspect, convert, and what doctor says of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from command_line import Cli, command_line
from factories import save_family, save_flux
from safetensors.torch import load_file, save_file

from lightweight_engine import Config
from lightweight_engine.backend.devices import Card
from lightweight_engine.backend.model_files import open_model
from lightweight_engine.core.models import ModelLibrary
from lightweight_engine.core.precision import choose_precision
from lightweight_engine.core.quantized_cache import through_cache
from lightweight_engine.flux.keymaps import find_parts

CPU = torch.device("cpu")
HOST = Card("CPU", "cpu", 1 << 36, 1 << 36, CPU)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    return command_line(capsys, tmp_path, monkeypatch)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return save_family(tmp_path / "models")


def checkpoint(models: Path) -> Path:
    return models / "Stable-diffusion" / "small.safetensors"


def test_ls_tells_layout_formats_and_variant(cli: Cli, models: Path) -> None:
    save_flux(models / "Stable-diffusion" / "fill.safetensors", in_channels=384)
    assert cli("models", "convert", "small", "--to", "fp4", "-o", models / "unet" / "small4.safetensors").code == 0
    rows = {Path(row["name"]).stem: row for row in json.loads(cli("models", "ls", "--json").out)["files"]}
    assert (rows["small"]["layout"], rows["small"]["variant"], rows["small"]["storage"]) == ("bfl", "dev", "BF16")
    assert (rows["small"]["used"], rows["small4"]["used"], rows["small4"]["usable"]) == (True, False, True)
    assert rows["small4"]["storage"].startswith("fp4")
    assert rows["small4"]["formats"]["fp4"] > 0
    assert (rows["fill"]["usable"], rows["fill"]["variant"]) == (False, "fill")
    assert "masked picture" in rows["fill"]["problem"]
    lines = [line.split() for line in cli("models", "ls").out.splitlines()]
    assert lines[0] == ["NAME", "IS", "LAYOUT", "STORED", "AS", "VARIANT", "SIZE", "PROBLEM"]
    assert next(line for line in lines if "small.safetensors" in " ".join(line))[0] == "*"


@pytest.mark.parametrize("format", ["nf4", "fp8_e4m3"])
def test_verify_reads_quantised_weights(cli: Cli, models: Path, format: str) -> None:
    assert cli("models", "convert", "small", "--to", format, "-o", "q.safetensors").code == 0
    data = json.loads(cli("models", "verify", "q.safetensors", "--json").out)
    assert data["parts"]["transformer"] == len(find_parts(open_model(checkpoint(models)))["transformer"].sources)
    assert data["sha256"] == data["files"][0]["sha256"]
    tensors = load_file("q.safetensors")
    name = "single_blocks.0.linear1.weight"
    if format == "nf4":
        tensors[f"{name}.absmax"][3] = torch.nan
    else:
        tensors[name].view(torch.uint8)[0, 0] = 0x7F  # NaN
    save_file(tensors, "nan.safetensors", metadata={"config": '{"axes_dim": [8, 12, 12]}'})
    done = cli("models", "verify", "nan.safetensors")
    assert (done.code, done.out) == (3, "")
    assert name in done.err
    assert "not finite" in done.err


def test_inspect_describes_a_file(cli: Cli, models: Path) -> None:
    lines = {
        line.split("  ")[0]: line.split("  ")[-1].strip() for line in cli("models", "inspect", "small").out.splitlines()
    }
    assert (lines["container"], lines["layout"], lines["variant"]) == ("safetensors", "bfl", "dev")
    assert (lines["depth"], lines["hidden_size"]) == ("1", "64")
    assert lines["metadata config"] == '{"axes_dim": [8, 12, 12]}'
    data = json.loads(cli("models", "inspect", checkpoint(models), "--json").out)
    assert data["parts"][0]["sizes"]["depth_single_blocks"] == 1
    Path("page.safetensors").write_text("<html>")
    done = cli("models", "inspect", "page.safetensors")
    assert done.code == 3
    assert "web page" in done.out


def test_convert_writes_what_the_library_then_uses(cli: Cli, models: Path, tmp_path: Path) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in models.rglob("*"))
    done = cli("models", "convert", "small", "--to", "nf4")
    assert (done.code, done.out) == (0, f"{tmp_path / 'small-nf4.safetensors'}\n")
    assert sorted((path, path.stat().st_mtime_ns) for path in models.rglob("*")) == before
    assert find_parts(open_model("small-nf4.safetensors"))["transformer"].storage == "nf4"
    data = json.loads(cli("models", "convert", "small-nf4.safetensors", "--to", "bf16", "--json").out)
    assert (data["path"], data["role"], data["format"]) == (
        str(tmp_path / "small-nf4-bf16.safetensors"),
        "transformer",
        "bf16",
    )


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["small", "--to", "gguf:Q8_0"], 2, "cannot be written to a safetensors file; use one of bf16"),
        (["small", "--to", "int8"], 2, "error: --to: 'int8' cannot be written"),
        (["small", "--to", "nf4", "--part", "t5"], 2, "--part: Stable-diffusion/small.safetensors holds transformer"),
        (["small", "--to", "nf4", "-o", "models/Stable-diffusion/small.safetensors", "--force"], 7, "that is read"),
        (["small", "--to", "nf4", "-o", "models/VAE/ae.safetensors"], 7, "there already; name another with -o"),
        (["small", "--to", "nf4", "-o", "x.gguf"], 2, "give it that ending"),
        (["small", "--to", "nf4", "-o", "/dev/null/x.safetensors"], 7, "cannot be written"),
        (["small", "--to", "nf4", "-o", ""], 2, "--output: it is empty; give a path, or leave it out"),
        (["ae", "--to", "nf4"], 3, "an autoencoder is small"),
        (["absent", "--to", "nf4"], 3, "no model file is called 'absent'"),
    ],
)
def test_what_convert_refuses(cli: Cli, models: Path, arguments: list[str], code: int, said: str) -> None:
    done = cli("models", "convert", *arguments)
    assert (done.code, done.out) == (code, ""), done.err
    assert said in done.err and ("writing" not in done.err or "-o" in arguments)
    assert list(models.parent.glob("*.safetensors")) == []


@pytest.mark.parametrize(("name", "format"), [("NF4", "nf4"), ("bnb-nf4", "nf4"), ("Float8-E4M3FN", "fp8_e4m3")])
def test_formats_have_the_names_of_the_settings(cli: Cli, models: Path, name: str, format: str) -> None:
    assert Path(cli("models", "convert", "small", "--to", name).out.strip()).name == f"small-{format}.safetensors"


def test_convert_tells_where_it_wrote_and_how_that_is_used(cli: Cli, models: Path, tmp_path: Path) -> None:
    written = tmp_path / "small-nf4.safetensors"
    done = cli("models", "convert", "small", "--to", "nf4")
    place = models / "Stable-diffusion"
    assert f"use it by --checkpoint {written}, or put it into {place} to find it by its name\n" in done.err
    done = cli("models", "convert", "small", "--to", "nf4", "-o", models / "unet" / "q.safetensors")
    assert done.err.endswith(f"use it by --checkpoint {models / 'unet' / 'q.safetensors'}\n"), "it lies there"
    done = cli("models", "convert", "t5", "--to", "nf4")
    assert f"use it by --t5 {tmp_path / 't5-nf4.safetensors'}, or put it into {models / 'text_encoder'} to" in done.err


def test_a_converted_tiny_is_used_by_its_path(cli: Cli, tmp_path: Path) -> None:
    done = cli("models", "convert", "tiny", "--to", "nf4")
    path = tmp_path / "tiny-nf4.safetensors"
    assert done.err.endswith(f"use it by --checkpoint {path}\n")
    sizes = ("-W", 64, "-H", 64, "-s", 1, "--device", "cpu")
    assert cli("generate", "a girl", "--checkpoint", path, *sizes).code == 0


def test_ls_tells_which_autoencoder_wins(cli: Cli, models: Path) -> None:
    shutil.copy(models / "VAE" / "ae.safetensors", models / "Stable-diffusion" / "astray.safetensors")
    done = cli("models", "ls")
    assert [line.split()[1] for line in done.out.splitlines() if "autoencoder" in line and "*" in line] == [
        "VAE/ae.safetensors"
    ]
    assert "autoencoders that fit, where the checkpoint has none itself, those in their folders first" in done.err


def test_ls_tells_what_wins_and_what_nothing_looks_at(cli: Cli, models: Path) -> None:
    assert "* is used" not in cli("models", "ls").err
    save_flux(models / "unet" / "b.safetensors")
    save_flux(models / "top.safetensors")
    done = cli("models", "ls")
    assert "* is used: of checkpoints the first by name" in done.err
    assert "nothing looks at the top of models for models (top.safetensors)" in done.err


def test_the_cache_of_quantised_weights(cli: Cli, models: Path) -> None:
    place = ("--set", "cache_dir=c")
    assert json.loads(cli("cache", "ls", "--json", *place).out)["quantized"] is None
    config = Config(models_dir=models, cache_dir="c", device="cpu", storage_dtype="nf4", quantized_cache=True)
    networks = ModelLibrary([models]).choose()
    through_cache(config, networks, choose_precision(config, networks, HOST, []), CPU, [])
    data = json.loads(cli("cache", "ls", "--json", *place).out)["quantized"]
    (file,) = data["files"]
    assert file["name"].startswith("small-transformer-nf4-") and data["bytes"] == file["size"] > 0
    assert file["name"] in cli("cache", "ls", *place).out
    assert json.loads(cli("cache", "prune", "--json", *place).out) == {"removed": 0, "bytes": file["size"]}
    assert json.loads(cli("cache", "prune", "--all", "--json", *place).out) == {"removed": file["size"], "bytes": 0}
    assert list(Path("c/quantized").iterdir()) == []


def test_a_second_rounding_must_be_asked_for(cli: Cli, models: Path) -> None:
    assert cli("models", "convert", "small", "--to", "nf4").code == 0
    again = ("models", "convert", "small-nf4.safetensors", "--to", "fp8_e4m3")
    done = cli(*again)
    assert done.code == 3
    assert "second time" in done.err
    assert cli(*again, "--force").code == 0


def test_a_fill_checkpoint_can_be_looked_at_and_converted_and_not_drawn_with(cli: Cli, models: Path) -> None:
    save_flux(models / "Stable-diffusion" / "fill.safetensors", in_channels=384)
    assert cli("models", "verify", "fill").code == 0
    assert cli("models", "inspect", "fill").code == 0
    assert cli("models", "convert", "fill", "--to", "nf4").code == 0
    shutil.copytree(Path(__file__).parents[2] / "lightweight_engine/tiny/tokenizers", models / "tokenizers")
    done = cli("generate", "a cat", "--checkpoint", "fill", "--device", "cpu")
    assert done.code == 3
    assert "Flux.1 fill transformer, which needs a masked picture" in done.err


def test_one_part_of_a_whole_checkpoint(cli: Cli, models: Path) -> None:
    tensors = {f"model.diffusion_model.{key}": value for key, value in load_file(checkpoint(models)).items()}
    t5 = load_file(models / "text_encoder" / "t5.safetensors")
    tensors |= {f"text_encoders.t5xxl.transformer.{key}": value for key, value in t5.items()}
    save_file(tensors, "all.safetensors", metadata={"config": '{"axes_dim": [8, 12, 12]}'})
    done = cli("models", "convert", "all.safetensors", "--to", "nf4")
    assert Path(done.out.strip()).name == "all-transformer-nf4.safetensors"
    assert "t5 by --part" in done.err
    assert cli("models", "convert", "all.safetensors", "--to", "fp8_e4m3", "--part", "t5").code == 0
    assert list(find_parts(open_model("all-t5-fp8_e4m3.safetensors"))) == ["t5"]


def test_doctor_tells_memory_and_settings_without_effect(cli: Cli, models: Path) -> None:
    assert cli("models", "convert", "small", "--to", "nf4", "-o", models / "unet" / "q.safetensors").code == 0
    done = cli("doctor", "--device", "cpu", "--checkpoint", "q", "--set", "storage_dtype=fp8_e4m3", "--json")
    checks = {row["name"]: row for row in json.loads(done.out)["checks"]}
    assert "GiB may be taken" in checks["memory"]["found"]
    assert "stored as nf4 already" in checks["setting"]["found"]
    assert "free" in checks["host memory"]["found"]
    done = cli("doctor", "--device", "cpu", "--set", "vram_limit=0.001", "--json")
    checks = {row["name"]: row for row in json.loads(done.out)["checks"]}
    assert (done.code, checks["memory"]["state"]) == (9, "bad")
