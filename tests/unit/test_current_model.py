"""Requests that name their model: what is loaded, what stays, and what is told where it cannot be had."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from command_line import command_line
from factories import AE, FLUX, network, save, save_drawable
from safetensors.torch import save_file

from lightweight_engine import Config, GenerationRequest, LightweightEngine
from lightweight_engine.core import models
from lightweight_engine.core.choice import broken_checkpoints, choose_models
from lightweight_engine.core.describe import pixels_sha256
from lightweight_engine.core.models import TINY, ModelLibrary
from lightweight_engine.core.networks import Networks
from lightweight_engine.core.plan import Plan
from lightweight_engine.core.replay import read_recipe, replay, save_result
from lightweight_engine.errors import (
    MemoryBudgetError,
    ModelNotFoundError,
    RequestError,
    UnsupportedCheckpointError,
)
from lightweight_engine.flux.autoencoder import Autoencoder
from lightweight_engine.flux.transformer import Flux
from lightweight_engine.request import MODEL_FIELDS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with the checkpoints ``small`` and ``people/other``, and the autoencoders ``ae`` and ``grey``."""
    root = save_drawable(tmp_path_factory.mktemp("models"))
    other = network(Flux, FLUX, seed=1)
    save(root / "Stable-diffusion" / "people" / "other.safetensors", other, config={"axes_dim": FLUX.axes_dim})
    save(root / "VAE" / "grey.safetensors", network(Autoencoder, AE, seed=1))
    return root


def engine_of(folder: Path, **settings: object) -> LightweightEngine:
    usual = {"checkpoint": "small", "vae": "ae", "cache_dir": folder / "cache", "device": "cpu", "offline": True}
    usual["tokenizer_dirs"] = (TINY / "tokenizers",)
    return LightweightEngine(Config(models_dir=folder, **{**usual, **settings}))


def engine_of_tiny(tmp_path: Path) -> LightweightEngine:
    """Of a folder without a model."""
    return LightweightEngine(Config(models_dir=tmp_path, cache_dir=tmp_path / "cache", device="cpu", offline=True))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[LightweightEngine]:
    made = engine_of(folder)
    made.setup()
    yield made
    made.close()


def request(**fields: object) -> GenerationRequest:
    return GenerationRequest(**{"prompt": "a", "width": 64, "height": 64, "steps": 1, "seed": 1, **fields})


def drawn(engine: LightweightEngine, **fields: object) -> str:
    return pixels_sha256(engine.run(request(**fields)).images[0])


@pytest.mark.parametrize("named", [{"checkpoint": "other"}, {"vae": "grey"}, {"storage_dtype": "nf4"}])
def test_a_request_draws_with_the_model_that_it_names(engine: LightweightEngine, folder: Path, named: dict) -> None:
    first = drawn(engine)
    result = engine.run(request(**named))
    alone = engine_of(folder, **named).run(request())
    assert pixels_sha256(result.images[0]) == pixels_sha256(alone.images[0]) != first
    assert (result.models, result.settings, result.infotexts) == (alone.models, alone.settings, alone.infotexts)
    assert drawn(engine) == first, "a request that names none gets the configured one"
    assert engine.config.checkpoint == "small"


def test_what_was_loaded_last_is_kept(engine: LightweightEngine, caplog: pytest.LogCaptureFixture) -> None:
    drawn(engine, checkpoint="other")
    with caplog.at_level(logging.INFO):
        for name in ("other", "people/other.safetensors", "other.safetensors [0123456789]"):
            drawn(engine, checkpoint=name)
        assert not [record for record in caplog.records if record.message.startswith("loaded")]
        drawn(engine)
        assert "loaded transformer from small.safetensors" in [record.message for record in caplog.records]


def test_the_former_model_is_released_before_the_new_one_is_loaded(
    engine: LightweightEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn(engine)
    former, held = engine.networks, []
    load_all = Networks.load_all
    monkeypatch.setattr(Networks, "load_all", lambda self, plan: (held.append(former.held), load_all(self, plan)))
    drawn(engine, checkpoint="other")
    assert held == [0] and engine.networks is not former and engine.networks.held > 0


@pytest.mark.parametrize(
    ("named", "kind", "said"),
    [
        ({"checkpoint": "othr"}, ModelNotFoundError, "no model file is called 'othr'; did you mean 'other'"),
        ({"checkpoint": "a" * 4096}, ModelNotFoundError, "there are: Stable-diffusion"),
        ({"vae": "x\0"}, ModelNotFoundError, "no model file"),
        ({"checkpoint": "grey"}, UnsupportedCheckpointError, "belongs in the setting vae"),
        ({"t5": "clip"}, UnsupportedCheckpointError, "not a T5 text encoder"),
    ],
)
def test_a_model_that_cannot_be_had_costs_nothing(
    engine: LightweightEngine, named: dict, kind: type[Exception], said: str
) -> None:
    drawn(engine)
    before, held = engine.networks, engine.networks.held
    with pytest.raises(kind, match=said):
        drawn(engine, **named)
    assert engine.networks is before and before.held == held


def test_the_former_model_comes_back_where_the_new_one_does_not_fit(
    engine: LightweightEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, before = drawn(engine), engine.networks
    with monkeypatch.context() as patched:
        patched.setattr(Networks, "load_all", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryBudgetError):
            drawn(engine, checkpoint="other")
    assert engine.networks is before and engine.models.name == "small"
    assert drawn(engine) == first


def test_a_request_is_told_the_same_whatever_came_before(tmp_path: Path) -> None:
    """Of two pairs that have the same networks, each has something else to say."""
    named, packed = {"checkpoint": "tiny"}, {"storage_dtype": "nf4"}
    asked = [{}, named, packed, {**named, **packed}]
    alone = [engine_of_tiny(tmp_path).run(request(**fields)).warnings for fields in asked]
    assert "no Flux checkpoint in " in alone[0][0] and alone[1] == ()
    engine = engine_of_tiny(tmp_path)
    for first, second in itertools.permutations(range(len(asked)), 2):
        engine.run(request(**asked[first]))
        assert engine.run(request(**asked[second])).warnings == alone[second], (first, second)
        assert engine.notes == alone[second]


def test_plans_follow_the_model(folder: Path, engine: LightweightEngine) -> None:
    drawn(engine)
    before = engine.networks.held
    plan = engine.plan(request(storage_dtype="nf4"))
    assert plan.storages["transformer"] == "nf4" and engine.networks.held == before
    fresh = engine_of(folder)
    assert fresh.plan(request(storage_dtype="nf4")).storages == plan.storages
    assert fresh._model.networks is None
    with pytest.raises(ModelNotFoundError):
        fresh.plan(request(checkpoint="absent"))


def test_a_change_reads_no_header_again(engine: LightweightEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn(engine, checkpoint="other")
    read: list[Path] = []
    monkeypatch.setattr(models, "read_entry", lambda path, *_, **__: read.append(path))
    drawn(engine)
    assert engine.models.name == "small" and not read


def test_a_file_that_was_replaced_is_read_anew(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "models"
    shutil.copytree(folder, root)
    engine = engine_of(root)
    first, other = drawn(engine), drawn(engine, checkpoint="other")
    shutil.copyfile(root / "Stable-diffusion" / "people" / "other.safetensors", tmp_path / "x")
    os.replace(tmp_path / "x", root / "Stable-diffusion" / "small.safetensors")
    assert first != other == drawn(engine, checkpoint="small", storage_dtype="auto")


def test_a_file_that_is_replaced_before_it_is_loaded_is_chosen_anew(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its header was the former one's, and so may be where its weights were looked for."""
    root = tmp_path / "models"
    shutil.copytree(folder, root)
    shutil.copyfile(root / "Stable-diffusion" / "people" / "other.safetensors", tmp_path / "x")
    loads: list[int] = []
    load_all = Networks.load_all

    def replace_and_load(self: Networks, plan: Plan) -> None:
        if not loads:
            os.replace(tmp_path / "x", root / "Stable-diffusion" / "small.safetensors")
        loads.append(1)
        load_all(self, plan)

    monkeypatch.setattr(Networks, "load_all", replace_and_load)
    with closing(engine_of(root)) as engine:
        drawn(engine)
        drawn(engine, checkpoint="small", storage_dtype="auto")
    assert len(loads) == 2


def test_tensors_are_drawn_with_it_too(engine: LightweightEngine) -> None:
    first, other = engine.draw(request()), engine.draw(request(checkpoint="other"))
    assert not first.latent.equal(other.latent) and engine.models.name == "other"


def test_loras_are_read_for_the_model_in_use(engine: LightweightEngine) -> None:
    drawn(engine)
    before = engine.loras
    drawn(engine, checkpoint="other")
    assert engine.loras is not before
    drawn(engine, checkpoint="other")
    assert engine.loras is engine.loras


def test_networks_that_a_caller_gave_come_back(folder: Path) -> None:
    engine = engine_of(folder)
    given = engine_of(folder, checkpoint="other").networks
    engine.use(given)
    first = drawn(engine)
    assert drawn(engine, checkpoint="small") != first
    assert drawn(engine) == first and engine.networks is given


def test_a_picture_of_a_named_model_can_be_made_again(engine: LightweightEngine, folder: Path, tmp_path: Path) -> None:
    result = engine.run(request(checkpoint="other", storage_dtype="bnb-nf4"))
    saved = save_result(result, tmp_path)[0]
    recipe = read_recipe(saved.path)
    assert (recipe.request.checkpoint, recipe.request.storage_dtype) == ("other", "nf4")
    files = {row["role"]: (row["name"], row["sha256"]) for row in (recipe.sidecar or {})["models"]}
    assert files["transformer"] == ("other", result.models[0].sha256)
    again = replay(engine_of(folder), saved.path)
    assert again.identical and again.differences == ()


def test_the_command_line_makes_it_again_and_its_options_win(
    engine: LightweightEngine,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saved = save_result(engine.run(request(checkpoint="other", storage_dtype="nf4")), tmp_path)[0]
    cli = command_line(capsys, tmp_path, monkeypatch)
    monkeypatch.setenv("LWE_TOKENIZER_DIR", str(TINY / "tokenizers"))
    again = ("replay", saved.path, "--device", "cpu", "--models-dir", folder)
    done = cli(*again)
    assert (done.code, done.out.strip()) == (0, "identical: every pixel is the same"), done.err
    done = cli(*again, "--checkpoint", "small")
    assert done.code == 9 and "another transformer file: small" in done.out


def test_settings_with_the_model_of_a_request() -> None:
    config = Config(checkpoint="a", vae="b")
    assert config.with_model_of(request()) is config
    made = config.with_model_of(request(checkpoint="c", storage_dtype="fp8_e4m3"))
    assert [getattr(made, name) for name in MODEL_FIELDS] == ["c", None, None, "b", "fp8_e4m3"]
    assert (made.origin("checkpoint"), made.origin("vae"), made.is_set("storage_dtype")) == (
        "request",
        "argument",
        True,
    )
    assert config.model != made.model and config.checkpoint == "a"


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("other", "other.safetensors", "people/other", "people/other.safetensors"),
        *("Stable-diffusion/people/other.safetensors", "other.safetensors [0123456789]"),
    ],
)
def test_names_of_a_model(folder: Path, name: str) -> None:
    library = ModelLibrary([folder])
    assert library.find(name, listed=True).path == folder / "Stable-diffusion" / "people" / "other.safetensors"
    assert library.find(str(folder / "Stable-diffusion" / "small.safetensors"), listed=True).path.stem == "small"


@pytest.mark.parametrize("name", ["", "/", "ther", "people", "x/other", "other [0123456789]x", "."])
def test_what_is_not_its_name(folder: Path, name: str) -> None:
    with pytest.raises(ModelNotFoundError):
        ModelLibrary([folder]).find(name, listed=True)


def test_other_places_only_where_that_is_allowed(folder: Path, tmp_path: Path) -> None:
    outside = save(tmp_path / "x.safetensors", network(Flux, FLUX), config={"axes_dim": FLUX.axes_dim})
    library = ModelLibrary([folder])
    assert library.find(str(outside)).can_be("transformer")
    with pytest.raises(ModelNotFoundError):
        library.find(str(outside), listed=True)


def test_a_library_reads_headers_once(folder: Path) -> None:
    library = ModelLibrary([folder])
    first = {entry.name: entry for entry in library.ls()}
    made = save(folder / "VAE" / "new.safetensors", network(Autoencoder, AE))
    assert {entry.name for entry in library.ls()} == set(first)
    listed = {entry.name: entry for entry in library.refresh().ls()}
    made.unlink()
    assert set(listed) == {*first, "VAE/new.safetensors"}
    assert all(listed[name] is entry for name, entry in first.items())


def test_the_demonstration_model_has_names_where_it_is_used(tmp_path: Path) -> None:
    notes: list[str] = []
    assert choose_models(Config(models_dir=tmp_path, checkpoint="tiny", vae="ae"), notes).is_tiny and not notes
    assert choose_models(Config(models_dir=tmp_path, vae="ae"), notes).is_tiny and len(notes) == 1


def test_a_model_may_be_required(tmp_path: Path) -> None:
    required = Config(models_dir=tmp_path, require_model=True)
    with pytest.raises(ModelNotFoundError, match="no Flux checkpoint was found in .*; put one into"):
        choose_models(required, [])
    assert choose_models(required.model_copy(update={"checkpoint": "tiny"}), []).is_tiny, "it is named"
    _made(tmp_path / "Stable-diffusion" / "half.safetensors").write_bytes(b"<html>")
    with pytest.raises(ModelNotFoundError, match=r"\(1 file there cannot be used: half.safetensors"):
        choose_models(required, [])
    shutil.copy(TINY / "Stable-diffusion" / "tiny.safetensors", tmp_path)
    with pytest.raises(ModelNotFoundError, match="nothing looks at the top of"):
        choose_models(required, [])


def test_checkpoints_that_somebody_has_to_look_at(tmp_path: Path) -> None:
    """Damaged ones always; those of other engines only where there is none that can be read."""
    folder = tmp_path / "Stable-diffusion"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, _made(folder / "sd15.safetensors"))
    (folder / "half.safetensors").write_bytes(b"<html>")
    _made(tmp_path / "VAE" / "half.safetensors").write_bytes(b"<html>")
    library = ModelLibrary.of(Config(models_dir=tmp_path))
    names = ["Stable-diffusion/half.safetensors", "Stable-diffusion/sd15.safetensors"]
    assert [entry.name for entry in broken_checkpoints(library)] == names
    shutil.copy(TINY / "Stable-diffusion" / "tiny.safetensors", folder / "own.safetensors")
    assert [entry.name for entry in broken_checkpoints(library.refresh())] == names[:1]


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def test_its_parts_are_its_own(tmp_path: Path) -> None:
    save(tmp_path / "VAE" / "large.safetensors", network(Autoencoder, AE))
    models = choose_models(Config(models_dir=tmp_path), [])
    assert {part.checkpoint.path.parents[1] for part in models.parts.values()} == {models.root}


def test_a_storage_that_is_none(engine: LightweightEngine) -> None:
    with pytest.raises(RequestError, match="storage_dtype"):
        drawn(engine, storage_dtype="int3")


def test_a_model_that_has_lost_a_file_is_chosen_anew(folder: Path, tmp_path: Path) -> None:
    """Or told to be missing, where a setting names the file; once it is there again, jobs go on."""
    root = tmp_path / "models"
    shutil.copytree(folder, root)
    added = root / "VAE" / "added.safetensors"
    shutil.copyfile(root / "VAE" / "ae.safetensors", added)
    (root / "VAE" / "grey.safetensors").unlink()
    free, bound = engine_of(root, vae=None), engine_of(root, vae="added")
    with closing(free), closing(bound):
        first = free.run(request())
        assert {row.role: row.name for row in first.models}["autoencoder"] == "added" and drawn(bound)
        added.unlink()
        again = free.run(request())
        assert {row.role: row.name for row in again.models}["autoencoder"] == "ae"
        assert pixels_sha256(again.images[0]) == pixels_sha256(first.images[0])
        with pytest.raises(ModelNotFoundError, match="'added'"):
            bound.run(request())
        shutil.copyfile(root / "VAE" / "ae.safetensors", added)
        assert drawn(bound) == pixels_sha256(first.images[0])
