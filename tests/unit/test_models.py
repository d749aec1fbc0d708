"""The model library: folders of every install, parts chosen by width, hashes kept."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from factories import T5, network, save, save_family, save_flux

from lightweight_engine.core.models import HashCache, ModelLibrary
from lightweight_engine.errors import CorruptCheckpointError, ModelError, ModelNotFoundError, UnsupportedCheckpointError
from lightweight_engine.flux.params import T5Params
from lightweight_engine.flux.t5 import T5Encoder

PROJECT = Path(__file__).resolve().parents[2]


def tree(folder: Path) -> set[tuple[str, int]]:
    return {(str(path), path.stat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.mark.parametrize("nested", [False, True])
def test_a_family_is_found_and_nothing_is_written(tmp_path: Path, nested: bool) -> None:
    save_family(tmp_path / "models" if nested else tmp_path)
    before = tree(tmp_path)
    chosen = ModelLibrary([tmp_path]).choose()
    assert chosen.name == "small"
    assert {role: part.checkpoint.path.name for role, part in chosen.parts.items()} == {
        "transformer": "small.safetensors",
        "t5": "t5.safetensors",
        "clip": "clip.safetensors",
        "autoencoder": "ae.safetensors",
    }
    assert tree(tmp_path) == before


def test_comfyui_folders(tmp_path: Path) -> None:
    save_family(tmp_path / "a")
    for source, target in (("Stable-diffusion", "unet"), ("text_encoder", "clip"), ("VAE", "vae")):
        (tmp_path / "models").mkdir(exist_ok=True)
        (tmp_path / "a" / source).rename(tmp_path / "models" / target)
    assert ModelLibrary([tmp_path]).choose().name == "small"


def test_the_encoder_of_the_right_width_is_taken(tmp_path: Path) -> None:
    save_family(tmp_path)
    other = T5Params(**{**T5.__dict__, "hidden_size": 96, "num_layers": 4})
    save(tmp_path / "text_encoder" / "a_wider.safetensors", network(T5Encoder, other))
    assert ModelLibrary([tmp_path]).choose().parts["t5"].checkpoint.path.name == "t5.safetensors"


def test_named_files_win(tmp_path: Path) -> None:
    save_family(tmp_path)
    save_flux(tmp_path / "Stable-diffusion" / "another.safetensors")
    library = ModelLibrary([tmp_path])
    assert library.choose().name == "another"
    assert library.choose("small").name == "small"
    assert library.choose(str(tmp_path / "Stable-diffusion" / "small.safetensors")).name == "small"


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="Stable-diffusion"):
        ModelLibrary([tmp_path]).choose()
    save_flux(tmp_path / "Stable-diffusion" / "x.safetensors")
    with pytest.raises(ModelNotFoundError, match="T5 text encoder; put one of width 48 into text_encoder"):
        ModelLibrary([tmp_path]).choose()
    with pytest.raises(ModelNotFoundError, match="'y'.*there are: Stable-diffusion/x.safetensors"):
        ModelLibrary([tmp_path]).choose("y")


def test_the_wrong_slot_is_told(tmp_path: Path) -> None:
    save_family(tmp_path)
    with pytest.raises(UnsupportedCheckpointError, match=r"autoencoder \(VAE\), not a checkpoint"):
        ModelLibrary([tmp_path]).choose("ae")


def test_a_bad_file_is_listed_with_its_problem_and_raises_when_named(tmp_path: Path) -> None:
    save_family(tmp_path)
    (tmp_path / "Stable-diffusion" / "page.safetensors").write_bytes(b"<html>")
    library = ModelLibrary([tmp_path])
    (entry,) = [entry for entry in library.ls() if entry.problem]
    assert "web page" in (entry.problem or "")
    with pytest.raises(CorruptCheckpointError, match="web page"):
        library.choose("page")
    assert library.choose().name == "small"


def test_a_file_of_another_kind_alone_raises_its_own_error(tmp_path: Path) -> None:
    save_flux(tmp_path / "Stable-diffusion" / "x.safetensors", prefix="lora_unet_")
    with pytest.raises(ModelError):
        ModelLibrary([tmp_path]).choose()


def test_links_are_followed_once(tmp_path: Path) -> None:
    save_family(tmp_path / "real")
    (tmp_path / "root").mkdir()
    for name in ("Stable-diffusion", "text_encoder", "VAE"):
        (tmp_path / "root" / name).symlink_to(tmp_path / "real" / name)
    (tmp_path / "real" / "Stable-diffusion" / "loop").symlink_to(tmp_path / "real" / "Stable-diffusion")
    assert ModelLibrary([tmp_path / "root"]).choose().name == "small"


def test_hashes_are_kept_and_renewed(tmp_path: Path) -> None:
    import hashlib

    path = tmp_path / "x.bin"
    path.write_bytes(b"one")
    cache = HashCache(tmp_path / "cache" / "hashes.json")
    assert cache.sha256(path) == hashlib.sha256(b"one").hexdigest()
    assert HashCache(tmp_path / "cache" / "hashes.json").sha256(path) == hashlib.sha256(b"one").hexdigest()
    path.write_bytes(b"four")
    assert cache.sha256(path) == hashlib.sha256(b"four").hexdigest()


def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "VAE"
    save_family(tmp_path)
    folder.chmod(0)
    program = f"""
import os
from pathlib import Path
from lightweight_engine.core.models import ModelLibrary
from lightweight_engine.errors import ModelNotFoundError
if os.getuid() == 0:
    os.setuid(65534)  # root may read everything
try:
    ModelLibrary([Path({str(tmp_path)!r})]).ls()
except ModelNotFoundError as error:
    print(error)
"""
    for parent in [tmp_path, *tmp_path.parents][:3]:
        parent.chmod(0o755)
    try:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=PROJECT)
    finally:
        folder.chmod(0o755)
    assert "VAE may not be read by this user" in done.stdout, done.stderr
