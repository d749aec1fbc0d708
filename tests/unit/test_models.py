"""The model library: folders of every install, parts chosen by width, hashes kept."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import T5, network, save, save_drawable, save_family, save_flux
from safetensors.torch import load_file, save_file

from lightweight_engine import Config, LightweightEngine
from lightweight_engine.backend.kept_files import FileVersion
from lightweight_engine.core.folders import stray_models
from lightweight_engine.core.hashes import HashCache
from lightweight_engine.core.models import TINY, ModelLibrary
from lightweight_engine.errors import (
    CorruptCheckpointError,
    GenerationCancelled,
    ModelError,
    ModelNotFoundError,
    UnsupportedCheckpointError,
)
from lightweight_engine.flux.convert import convert_part
from lightweight_engine.flux.keymaps import Role
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
    told = "x.safetensors holds no T5 text encoder; choose one of width 48 with the setting t5, or put it into text_enc"
    with pytest.raises(ModelNotFoundError, match=told):
        ModelLibrary([tmp_path]).choose()
    with pytest.raises(ModelNotFoundError, match="'y'.*there are: Stable-diffusion/x.safetensors"):
        ModelLibrary([tmp_path]).choose("y")


@pytest.mark.parametrize("file", ["VAE/ae.safetensors", "text_encoder/t5.safetensors", "text_encoder/clip.safetensors"])
def test_a_damaged_part_is_told_and_not_missed(tmp_path: Path, file: str) -> None:
    save_family(tmp_path)
    (tmp_path / file).write_bytes(b"")
    save_flux((tmp_path / file).with_name("a.safetensors"), prefix="lora_unet_")  # of another kind, and no fault
    with pytest.raises(CorruptCheckpointError, match=rf"^{Path(file).name} is empty; download it again$"):
        ModelLibrary([tmp_path]).choose()


def test_a_setting_is_told_the_names_that_it_takes(tmp_path: Path) -> None:
    save_family(tmp_path)
    library = ModelLibrary([tmp_path])
    for setting, there in (("checkpoint", "Stable-diffusion/small"), ("vae", "VAE/ae"), ("t5", "text_encoder/t5")):
        with pytest.raises(ModelNotFoundError, match=rf"'nope'; there are: {there}\.safetensors$"):
            library.find("nope", field=setting)
    with pytest.raises(ModelNotFoundError, match=r"'nope'; there are: .*small.*, VAE/ae.*, text_encoder/clip"):
        library.find("nope")
    with pytest.raises(ModelNotFoundError, match=r"did you mean 'small'\?$"):
        library.find("smal", field="checkpoint")


def test_of_many_names_some_are_told(tmp_path: Path) -> None:
    save_flux(tmp_path / "unet" / "0.safetensors")
    for number in range(1, 25):
        (tmp_path / "unet" / f"{number}.safetensors").symlink_to(tmp_path / "unet" / "0.safetensors")
    with pytest.raises(ModelNotFoundError) as caught:
        ModelLibrary([tmp_path]).find("nope", field="checkpoint")
    assert str(caught.value).count(".safetensors") == 10 and str(caught.value).endswith(" and 15 more")


def test_the_wrong_slot_is_told(tmp_path: Path) -> None:
    save_family(tmp_path)
    library = ModelLibrary([tmp_path])
    told = r"ae\.safetensors is an autoencoder \(VAE\), not a checkpoint; it belongs in the setting vae"
    with pytest.raises(UnsupportedCheckpointError, match=told):
        library.choose("ae")
    with pytest.raises(UnsupportedCheckpointError, match="is a checkpoint, not a CLIP text.*in the setting checkpoint"):
        library.choose("small", clip="small")


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


def test_a_link_to_nothing_says_what_it_is(tmp_path: Path) -> None:
    save_family(tmp_path)
    (tmp_path / "VAE" / "gone.safetensors").symlink_to(tmp_path / "absent")
    (problem,) = [entry.problem for entry in ModelLibrary([tmp_path]).ls() if entry.problem]
    assert problem.endswith(f"is a link to {tmp_path / 'absent'}, which is not there; mend or remove it")


def test_a_replaced_file_is_let_go_and_a_model_in_use_keeps_its_own(tmp_path: Path) -> None:
    save_family(tmp_path)
    path = tmp_path / "Stable-diffusion" / "small.safetensors"
    library = ModelLibrary([tmp_path])
    in_use = library.choose()
    before = in_use.parts["transformer"].sources["img_in.weight"].read().clone()  # mapped by now
    kept, replaced = library.find("ae"), weakref.ref(library.find("small"))
    mapped = weakref.ref(in_use.parts["transformer"].checkpoint)
    save_flux(tmp_path / "new", depth=2).replace(path)
    assert "double_blocks.1.img_attn.qkv.weight" in library.refresh().choose().parts["transformer"].sources
    gc.collect()
    assert replaced() is None and library.find("ae") is kept
    assert torch.equal(in_use.parts["transformer"].sources["img_in.weight"].read(), before)
    del in_use
    gc.collect()
    assert mapped() is None, "its disk space comes back"


def test_which_of_several_files_is_used_is_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_family(tmp_path)
    for name in ("b", "a"):
        save_flux(tmp_path / "Stable-diffusion" / f"{name}.safetensors")
    shutil.copy(tmp_path / "VAE" / "ae.safetensors", tmp_path / "VAE" / "other.safetensors")
    with caplog.at_level("INFO"):
        assert ModelLibrary([tmp_path]).choose().name == "a"
    first, second = [record.getMessage() for record in caplog.records if " is used, " in record.getMessage()]
    assert "3 files with a transformer: Stable-diffusion/a.safetensors is used, the first by name" in first
    assert "2 files with a fitting autoencoder: VAE/ae.safetensors is used, the largest in its folder" in second


@pytest.mark.parametrize(("role", "folder", "name"), [("autoencoder", "VAE", "ae"), ("clip", "text_encoder", "clip")])
def test_a_part_in_its_folder_is_used_before_one_that_lies_elsewhere(
    tmp_path: Path, role: Role, folder: str, name: str
) -> None:
    save_family(tmp_path)
    proper, astray = tmp_path / folder / f"{name}.safetensors", tmp_path / "Stable-diffusion" / "astray.safetensors"
    shutil.copy(proper, astray)
    assert ModelLibrary([tmp_path]).choose().parts[role].checkpoint.path == proper
    proper.unlink()
    assert ModelLibrary([tmp_path]).choose().parts[role].checkpoint.path == astray, "rather than none"


def test_models_at_the_top_of_the_folder_are_told(tmp_path: Path) -> None:
    assert stray_models(tmp_path / "absent") is None and stray_models(save_family(tmp_path)) is None
    save_flux(tmp_path / "flux1-dev.safetensors")
    assert "(flux1-dev.safetensors); move them into its folders" in (stray_models(tmp_path) or "")


class Held:
    """Files are hashed once they are let; ``asked`` are those that were to be."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Path] = []
        self.go = threading.Event()
        monkeypatch.setattr("lightweight_engine.core.hashes.read_sha256", self.read)

    def read(self, version: FileVersion) -> str:
        path = Path(version.path)
        self.asked.append(path)
        assert self.go.wait(20)
        return hashlib.sha256(path.read_bytes()).hexdigest()


def test_hashes_are_read_beside_other_work_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    for path in files:
        path.write_text(path.name)
    versions = [FileVersion.of(path) for path in files]
    held, cache = Held(monkeypatch), HashCache(tmp_path / "hashes.json")
    cache.begin(versions)
    cache.begin(versions)
    assert cache.known(versions) is None
    looks: list[int] = []

    def check() -> None:
        looks.append(1)
        if len(looks) == 3:
            held.go.set()

    cache.wait(versions, check)
    assert len(looks) >= 3 and sorted(held.asked) == files
    assert cache.sha256(files[0]) == hashlib.sha256(b"a").hexdigest() and len(held.asked) == 2
    with pytest.raises(FileNotFoundError):
        cache.sha256(tmp_path / "absent")


def test_waiting_for_a_hash_can_be_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("a")
    files = [FileVersion.of(tmp_path / "a")]
    held, cache = Held(monkeypatch), HashCache(tmp_path / "hashes.json")

    def check() -> None:
        raise GenerationCancelled("cancelled")

    with pytest.raises(GenerationCancelled):
        cache.wait(files, check)
    held.go.set()
    cache.wait(files, lambda: None)
    assert held.asked == [tmp_path / "a"]


def test_a_file_that_cannot_be_read_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("a")
    cache = HashCache(tmp_path / "hashes.json")
    with monkeypatch.context() as patched:
        patched.setattr("lightweight_engine.core.hashes.read_sha256", lambda file: Path(file.path, "x").read_bytes())
        with pytest.raises(NotADirectoryError):
            cache.sha256(tmp_path / "a")
    assert cache.sha256(tmp_path / "a") == hashlib.sha256(b"a").hexdigest()


def test_hashes_are_kept_and_renewed(tmp_path: Path) -> None:
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


# --- what can be drawn with -------------------------------------------------------------------------------------------


def test_published_names_are_told_where_the_width_is_theirs(tmp_path: Path) -> None:
    save_flux(tmp_path / "unet" / "x.safetensors", context_in_dim=4096)
    with pytest.raises(ModelNotFoundError, match=r"of width 4,096, such as t5xxl_\*\.safetensors, with the setting t5"):
        ModelLibrary([tmp_path]).choose()


def test_an_encoder_of_another_width_is_named(tmp_path: Path) -> None:
    save_family(tmp_path)
    save_flux(tmp_path / "Stable-diffusion" / "a.safetensors", context_in_dim=96)
    library = ModelLibrary([tmp_path])
    with pytest.raises(ModelNotFoundError, match=r"of width 96 \(text_encoder/t5\.safetensors has 48\)"):
        library.choose("a")
    with pytest.raises(UnsupportedCheckpointError, match="expects 96 inputs, the text encoder has 48"):
        library.choose("a", t5="t5")


@pytest.mark.parametrize(("inputs", "variant", "needs"), [(384, "fill", "masked"), (128, "canny/depth", "control")])
def test_what_needs_further_inputs_cannot_be_drawn_with(tmp_path: Path, inputs: int, variant: str, needs: str) -> None:
    save_family(tmp_path)
    save_flux(tmp_path / "Stable-diffusion" / "a.safetensors", in_channels=inputs)
    library = ModelLibrary([tmp_path])
    entry = library.find("a")
    assert (entry.variant, entry.usable, entry.problem) == (variant, False, None)
    assert library.choose().name == "small"
    told = rf"a\.safetensors is a Flux\.1 {variant} transformer, which needs a {needs}.*choose a dev or schnell"
    with pytest.raises(UnsupportedCheckpointError, match=told):
        library.choose("a")
    (tmp_path / "Stable-diffusion" / "small.safetensors").unlink()
    with pytest.raises(UnsupportedCheckpointError, match=told):
        ModelLibrary([tmp_path]).choose()


def test_a_quantised_checkpoint_is_as_good_as_any(tmp_path: Path) -> None:
    save_family(tmp_path)
    (checkpoint,) = (tmp_path / "Stable-diffusion").iterdir()
    small = ModelLibrary([tmp_path]).choose().parts["transformer"]
    convert_part(small, "nf4", checkpoint.with_name("a.safetensors"), device=torch.device("cpu"))
    assert ModelLibrary([tmp_path]).choose().name == "a"


@pytest.mark.parametrize(("variant", "shift"), [("auto", 1.0), ("dev", 1.15), ("schnell", 1.0)])
def test_the_schedule_of_a_file_without_guidance_may_be_that_of_dev(tmp_path: Path, variant: str, shift: float) -> None:
    """De-distilled files of dev may lack the guidance weights, and look like schnell then."""
    save_family(tmp_path)
    save_flux(tmp_path / "Stable-diffusion" / "a.safetensors", guidance_embed=False)
    shutil.copytree(TINY / "tokenizers", tmp_path / "tokenizers")
    settings = {"models_dir": tmp_path, "cache_dir": tmp_path, "device": "cpu", "offline": True, "variant": variant}
    engine = LightweightEngine(Config(**settings))
    engine.setup()
    assert engine.networks.params.mu == shift
    assert (engine.networks.params.guidance_embed, engine.models.parts["transformer"].variant) == (False, "schnell")
    assert engine.notes == ()


def test_tokenizers_may_lie_beside_the_text_encoders(tmp_path: Path) -> None:
    """A converted checkpoint in some folder, its encoders named by path where they are."""
    folder, elsewhere = tmp_path / "models", tmp_path / "elsewhere"
    save_drawable(elsewhere)
    (folder / "Stable-diffusion").mkdir(parents=True)
    shutil.move(elsewhere / "Stable-diffusion" / "small.safetensors", folder / "Stable-diffusion")
    shutil.copytree(TINY / "tokenizers", elsewhere / "tokenizers")
    places = {"t5": "text_encoder/t5", "clip": "text_encoder/clip", "vae": "VAE/ae"}
    named: Any = {name: str(elsewhere / f"{path}.safetensors") for name, path in places.items()}
    engine = LightweightEngine(Config(models_dir=folder, cache_dir=tmp_path, device="cpu", offline=True, **named))
    assert [bool(tokenizer.encode("a cat")) for tokenizer in engine.networks.tokenizers] == [True, True]


def test_a_schedule_that_the_weights_speak_against_is_told(tmp_path: Path) -> None:
    engine = LightweightEngine(Config(models_dir=save_family(tmp_path), device="cpu", variant="schnell"))
    engine.plan(engine.request(prompt=""))
    assert [note for note in engine.notes if "small.safetensors has guidance weights" in note] != []


# --- models in several files ------------------------------------------------------------------------------------------


def in_shards(path: Path, folder: Path) -> Path:
    """A file as two shards and their index."""
    tensors = load_file(path)
    names = sorted(tensors)
    folder.mkdir(parents=True, exist_ok=True)
    places = {}
    for number, group in enumerate((names[::2], names[1::2]), start=1):
        shard = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in group}, folder / shard)
        places |= dict.fromkeys(group, shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    return index


def test_shards_are_one_model(tmp_path: Path) -> None:
    save_family(tmp_path)
    whole = tmp_path / "text_encoder" / "t5.safetensors"
    index = in_shards(whole, tmp_path / "text_encoder" / "xxl")
    size = whole.stat().st_size
    whole.unlink()
    library = ModelLibrary([tmp_path])
    (entry,) = [entry for entry in library.ls() if "t5" in entry.roles]
    assert entry.name == "text_encoder/xxl/model.safetensors.index.json"
    assert abs(entry.size - size) < 4096
    assert library.find("model") is entry
    chosen = library.choose()
    assert {Path(path).name for path, *_ in chosen.key} >= {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    hashes = HashCache(tmp_path / "hashes.json")
    (t5,) = [file for file in chosen.files(hashes) if file.role == "t5"]
    assert (t5.name, len(t5.sha256 or "")) == ("model", 64)
    index.unlink()
    (entry,) = [entry for entry in ModelLibrary([tmp_path]).ls() if "xxl" in entry.name]
    assert "piece 1 of 2" in (entry.problem or "")


def test_shards_that_come_late_or_are_replaced_are_read_anew(tmp_path: Path) -> None:
    save_family(tmp_path)
    folder = tmp_path / "text_encoder" / "xxl"
    in_shards(tmp_path / "text_encoder" / "t5.safetensors", folder)
    (tmp_path / "text_encoder" / "t5.safetensors").unlink()
    late = folder / "model-00002-of-00002.safetensors"
    late.rename(tmp_path / "late")
    library = ModelLibrary([tmp_path])
    assert "download that file too" in (library.find("xxl/model").problem or "")
    (tmp_path / "late").rename(late)
    entry = library.refresh().find("xxl/model")
    assert entry.roles == ("t5",) and library.refresh().find("xxl/model") is entry
    save_file(load_file(late), late, metadata={"longer": "a header of another length"})
    (name, *_), changed = load_file(late), library.refresh().find("xxl/model").parts["t5"].checkpoint
    assert torch.equal(changed.tensor(name), load_file(late)[name])


def test_a_folder_of_diffusers_is_one_model(tmp_path: Path) -> None:
    save_family(tmp_path)
    published = {"hidden_size": 128, "mlp_hidden": 256, "num_heads": 1, "axes_dim": (16, 56, 56)}  # told by shapes
    save_flux(tmp_path / "Stable-diffusion" / "small.safetensors", **published)
    component = tmp_path / "text_encoder" / "my t5.v1"
    in_shards(tmp_path / "text_encoder" / "t5.safetensors", component)
    (component / "config.json").write_text(json.dumps({"architectures": ["T5EncoderModel"]}))
    pipeline = tmp_path / "Stable-diffusion" / "FLUX.1-x"
    for name, source in (
        ("text_encoder", "text_encoder/clip"),
        ("vae", "VAE/ae"),
        ("transformer", "Stable-diffusion/small"),
    ):
        (pipeline / name).mkdir(parents=True)
        (tmp_path / f"{source}.safetensors").rename(pipeline / name / "model.safetensors")
    library = ModelLibrary([tmp_path])
    assert [entry.name for entry in library.ls() if entry.path.is_dir()] == [
        "Stable-diffusion/FLUX.1-x",
        "text_encoder/my t5.v1",
    ]
    assert len(library.ls()) == 3
    assert library.find("FLUX.1-x").roles == ("transformer", "clip", "autoencoder")
    assert library.choose().name == "FLUX.1-x"
    assert library.choose(t5="my t5.v1").parts["t5"].checkpoint.path == component


def test_a_part_of_impossible_sizes_is_a_problem_and_not_chosen(tmp_path: Path) -> None:
    save_family(tmp_path)
    state = load_file(tmp_path / "VAE" / "ae.safetensors")
    stub = {key: tensor for key, tensor in state.items() if not key.startswith("encoder.down")}
    save_file(stub, tmp_path / "VAE" / "a_stub.safetensors")
    (entry,) = [entry for entry in ModelLibrary([tmp_path]).ls() if "stub" in entry.name]
    assert "autoencoder cannot be used" in (entry.problem or "") and not entry.usable
    assert ModelLibrary([tmp_path]).choose().parts["autoencoder"].checkpoint.path.name == "ae.safetensors"


def test_a_path_from_the_working_folder_means_a_file_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(TINY.parent)
    name = "Stable-diffusion/tiny.safetensors"
    assert ModelLibrary([TINY]).find(f"{TINY.name}/{name}").name == name
