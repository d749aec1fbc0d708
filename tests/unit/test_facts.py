"""What the worker tells the front of models, files and memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lightweight_engine import Config, LightweightEngine
from lightweight_engine.apps.server.facts import Facts, checkpoint_rows, lora_rows, scale_of
from lightweight_engine.backend.kept_files import FileVersion
from lightweight_engine.core.hashes import HashCache
from lightweight_engine.core.models import TINY, ModelLibrary
from lightweight_engine.extensions.lora_library import LoraLibrary
from lightweight_engine.upscalers.files import FAMILIES, Entry


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with all of `tiny`, and its checkpoint once more below two further folders."""
    root = tmp_path_factory.mktemp("facts") / "models"
    shutil.copytree(TINY, root)
    for name in ("people/tiny.safetensors", "people/other.safetensors"):
        (root / "Stable-diffusion" / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(root / "Stable-diffusion" / "tiny.safetensors", root / "Stable-diffusion" / name)
    return root


@pytest.fixture(scope="module")
def engine(folder: Path) -> LightweightEngine:
    made = LightweightEngine(Config(models_dir=folder, cache_dir=folder / "cache", device="cpu", offline=True))
    made.setup()
    return made


def test_files_that_requests_may_name(engine: LightweightEngine, folder: Path) -> None:
    told = Facts(engine)()
    assert json.loads(json.dumps(told)) == told, "it is JSON data"
    assert str(folder.parent) not in json.dumps(told)
    assert [(row["title"], row["model_name"], row["filename"]) for row in told["checkpoints"]] == [
        ("other.safetensors", "other", "Stable-diffusion/people/other.safetensors"),
        ("Stable-diffusion/people/tiny.safetensors", "tiny", "Stable-diffusion/people/tiny.safetensors"),
        ("Stable-diffusion/tiny.safetensors", "tiny", "Stable-diffusion/tiny.safetensors"),
    ]
    assert [(row["model_name"], row["role"], row["field"]) for row in told["modules"]] == [
        ("ae.safetensors", "autoencoder", "vae"),
        ("clip_l.safetensors", "clip", "clip"),
        ("t5xxl.safetensors", "t5", "t5"),
    ]
    assert {"name": "4x_tiny", "path": "ESRGAN/4x_tiny.safetensors", "scale": 4} in told["upscalers"]
    hat = next(row for row in told["loras"] if row["name"] == "hat")
    assert hat["path"] == "Lora/hat.safetensors" and hat["alias"] and isinstance(hat["metadata"], dict)
    assert told["memory"]["ram"]["used"] > 0 and "cuda" not in told["memory"]


def test_what_holds_of_the_settings_is_told_of_the_configured_model(engine: LightweightEngine) -> None:
    holds = {"storage_dtype": "fp32", "compute_dtype": "fp32", "speed": "exact", "vae_dtype": "fp32"}
    facts = Facts(engine)
    assert facts()["in_effect"] == holds and engine.config.storage_dtype == "nf4"
    engine.run(engine.request(prompt="a cat", storage_dtype="nf4", width=64, height=64, steps=1), hashed=False)
    assert facts()["in_effect"] == holds, "a request that asks for another is no setting"


def test_every_title_names_its_file(engine: LightweightEngine) -> None:
    library = ModelLibrary.of(engine.config)
    for row in Facts(engine)()["checkpoints"]:
        assert library.find(row["title"], listed=True).name == row["filename"]


def test_hashes_are_told_once_a_job_has_needed_them(engine: LightweightEngine, folder: Path) -> None:
    facts = Facts(engine)
    assert not any(row["sha256"] for row in facts()["checkpoints"])
    path = folder / "Stable-diffusion" / "people" / "other.safetensors"
    digest = engine.hashes.sha256(path)
    row = next(row for row in facts()["checkpoints"] if row["model_name"] == "other")
    assert (row["sha256"], row["hash"]) == (digest, digest[:10])
    assert row["title"] == f"other.safetensors [{digest[:10]}]"
    assert ModelLibrary([folder]).find(row["title"], listed=True).path == path


def test_files_that_come_and_go_are_seen(engine: LightweightEngine, folder: Path) -> None:
    facts = Facts(engine)
    added = folder / "VAE" / "added.safetensors"
    shutil.copyfile(folder / "VAE" / "ae.safetensors", added)
    names = {row["model_name"] for row in facts()["modules"]}
    added.unlink()
    assert names - {row["model_name"] for row in facts()["modules"]} == {"added.safetensors"}


def test_a_folder_that_cannot_be_listed_ends_nothing(
    engine: LightweightEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = Facts(engine)
    before = facts()
    monkeypatch.setattr(ModelLibrary, "ls", lambda self: (_ for _ in ()).throw(OSError(5, "the disk is gone")))
    assert facts() is before


def test_a_checkpoint_that_goes_away_as_it_is_told_of(tmp_path: Path) -> None:
    """It costs nobody the list."""
    shutil.copytree(TINY / "Stable-diffusion", tmp_path / "Stable-diffusion")
    library = ModelLibrary([tmp_path])
    (entry,) = library.ls()
    entry.path.unlink()
    (row,) = checkpoint_rows(library, HashCache(tmp_path / "hashes.json"))
    assert row["title"] == "tiny.safetensors" and row["sha256"] is None


def test_long_metadata_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "Lora").mkdir()
    tensors = load_file(TINY / "Lora" / "hat.safetensors")
    told = {"ss_output_name": "Hat", "ss_tag_frequency": "x" * 10_000}
    save_file(tensors, tmp_path / "Lora" / "a.safetensors", told)
    (row,) = lora_rows(LoraLibrary([tmp_path]))
    assert row == {"name": "a", "alias": "Hat", "path": "Lora/a.safetensors", "metadata": {"ss_output_name": "Hat"}}


@pytest.mark.parametrize(
    ("name", "scale"),
    [("4x-UltraSharp", 4), ("R-ESRGAN 2x+", 2), ("DAT x3", 3), ("1x_DeJPEG", 1), ("ScuNET GAN", None), ("x16", None)],
)
def test_scales_that_names_tell(name: str, scale: int | None) -> None:
    assert scale_of(Entry(name, Path("a.pth"), FAMILIES[0])) == scale


def test_hashes_that_are_known(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_text("a")
    second.write_text("b")
    a, b = FileVersion.of(first), FileVersion.of(second)
    hashes = HashCache(tmp_path / "hashes.json")
    digest = hashes.sha256(first)
    assert hashes.known([a]) == hashes.sha256_of([a]) == digest and hashes.known([a, b]) is None
    assert hashes.sha256_of([a, b]) == hashes.known([a, b])
    first.write_text("other")
    assert hashes.known([FileVersion.of(first)]) is None and hashes.known([a]) == digest
