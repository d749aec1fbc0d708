"""Folders of installs of Forge and ComfyUI: what is looked for is put where the other program reads it too."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import command_line

from lightweight_engine import EngineConfig
from lightweight_engine.backend.model_folders import bases_of, place_for
from lightweight_engine.core.choice import choose_models
from lightweight_engine.core.folders import put_into
from lightweight_engine.core.loras import add_lora, lora_library
from lightweight_engine.core.models import TINY, ModelLibrary
from lightweight_engine.core.tokenizer_files import by_hand, kept_tokenizer, tokenizer_places
from lightweight_engine.errors import ModelNotFoundError
from lightweight_engine.extensions.detector_list import DetectorList
from lightweight_engine.upscalers.files import UpscalerFiles

FORGE = ("models/Stable-diffusion", "models/Lora", "models/ESRGAN", "models/text_encoder", "models/VAE")
COMFY = ("models/unet", "models/loras", "models/upscale_models", "models/text_encoders", "models/vae", "comfy")
HAT = TINY / "Lora" / "hat.safetensors"


def install(root: Path, folders: tuple[str, ...]) -> Path:
    for folder in folders:
        (root / folder).mkdir(parents=True)
    return root


@pytest.fixture
def forge(tmp_path: Path) -> Path:
    return install(tmp_path / "forge", FORGE)


@pytest.fixture
def comfy(tmp_path: Path) -> Path:
    return install(tmp_path / "comfy", COMFY)


def test_a_folder_that_is_there_wins_then_the_one_of_models_then_the_own(tmp_path: Path) -> None:
    names = ("Lora", "loras")
    assert bases_of(tmp_path) == [tmp_path] and place_for(tmp_path, names) == tmp_path / "Lora"
    (tmp_path / "models").mkdir()
    assert place_for(tmp_path, names) == tmp_path / "models" / "Lora"
    (tmp_path / "models" / "loras").mkdir()
    assert place_for(tmp_path, names) == tmp_path / "models" / "loras"
    (tmp_path / "Lora").mkdir()
    assert place_for(tmp_path, names) == tmp_path / "Lora"


def test_loras_go_where_the_install_has_its_own(forge: Path, comfy: Path) -> None:
    for root, folder in ((forge, "models/Lora"), (comfy, "models/loras")):
        config = EngineConfig(models_dir=root)
        library = lora_library(config, with_tiny=False)
        with pytest.raises(ModelNotFoundError) as caught:
            library.find("hat")
        assert f"put the file into {root / folder} by `lora add FILE`, or give its URL" in str(caught.value)
        assert add_lora(config, HAT, "hat") == root / folder / "hat.safetensors"
        assert library.find("hat").path == root / folder / "hat.safetensors"


def test_the_list_of_no_loras_names_it(
    comfy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = command_line(capsys, tmp_path, monkeypatch)("lora", "ls", "--models-dir", comfy, "--checkpoint", "mine")
    assert f"put files into {comfy / 'models' / 'loras'}, or" in done.err


def test_upscalers_are_found_and_put_below_models(forge: Path, comfy: Path) -> None:
    for root, name, folder in (
        (forge, "ESRGAN_4x", "models/ESRGAN"),
        (forge, "SwinIR 4x", "models/SwinIR"),
        (comfy, "ESRGAN_4x", "models/upscale_models"),
        (comfy, "R-ESRGAN 4x+", "models/RealESRGAN"),  # in ComfyUI's folder it would be called otherwise
    ):
        files = UpscalerFiles([root])
        with pytest.raises(ModelNotFoundError) as caught:
            files.entry(name)
        assert f"is not in {root / folder}; put it there" in str(caught.value)
        stem = str(caught.value).partition("needs the file ")[2].partition(".pth")[0]
        (root / folder).mkdir(exist_ok=True)
        (root / folder / f"{stem}.pth").touch()
        found = files.entry(name)
        assert found is not None and found.path.parent == root / folder


def test_an_upscaler_goes_into_its_folder_in_any_case(tmp_path: Path) -> None:
    (tmp_path / "esrgan").mkdir()
    with pytest.raises(ModelNotFoundError) as caught:
        UpscalerFiles([tmp_path]).entry("ESRGAN_4x")
    assert f"is not in {tmp_path / 'esrgan'};" in str(caught.value)


def test_detectors_are_found_and_put_below_models(forge: Path) -> None:
    detectors, folder = DetectorList([forge]), forge / "models" / "adetailer"
    with pytest.raises(ModelNotFoundError) as caught:
        detectors.require("face_yolov8n.pt")
    assert f"is not in {folder};" in str(caught.value)
    folder.mkdir()
    (folder / "face_yolov8n.pt").touch()
    assert detectors.require("face_yolov8n.pt").path.parent == folder


def test_checkpoints_and_their_parts_are_asked_for_where_they_go(forge: Path, comfy: Path, tmp_path: Path) -> None:
    for root, drawing, vae in ((forge, "Stable-diffusion", "VAE"), (comfy, "unet", "vae")):
        folder = f"models/{drawing}/"
        with pytest.raises(ModelNotFoundError, match=f"put one into {folder}$"):
            ModelLibrary([root]).choose()
        with pytest.raises(ModelNotFoundError, match=f"put one into {folder} there, or switch"):
            choose_models(EngineConfig(models_dir=root, require_model=True), [])
        (root / "x.safetensors").touch()
        with pytest.raises(ModelNotFoundError, match=f"move them into its folders, as {folder};"):
            choose_models(EngineConfig(models_dir=root, require_model=True), [])
        assert put_into(root, ("VAE", "vae")) == f"models/{vae}/"
    assert put_into(tmp_path / "nowhere") == "Stable-diffusion/"


def test_a_tokenizer_put_where_it_is_asked_for_is_found(forge: Path, tmp_path: Path) -> None:
    folders = tokenizer_places(EngineConfig(models_dir=forge), None)
    folder = forge / "models" / "tokenizers" / "clip_l"
    assert by_hand("clip", folders[0]).endswith(f"into {folder}")
    folder.mkdir(parents=True)
    for name, text in (("merges.txt", "#"), ("vocab.json", '{"<|startoftext|>": 0, "<|endoftext|>": 1}')):
        (folder / name).write_text(text)
    assert kept_tokenizer("clip", folders, tmp_path / "cache") == folder
