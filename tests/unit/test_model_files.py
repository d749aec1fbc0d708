"""Folders and shards: one model of several files, and nothing from outside their folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from factories import CLIP, network, save, save_flux
from safetensors.torch import save_file

from lightweight_engine.backend.model_files import open_model
from lightweight_engine.errors import CorruptCheckpointError, ModelError, ModelNotFoundError, UnsupportedCheckpointError
from lightweight_engine.flux.clip import CLIPText

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
TENSORS = {"a": torch.randn(3), "b": torch.randn(2, 2), "c": torch.zeros(1)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    folder.mkdir()
    save_file({"a": TENSORS["a"], "c": TENSORS["c"]}, folder / A)
    save_file({"b": TENSORS["b"]}, folder / B)
    write_index(folder, {"a": A, "b": B, "c": A})
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("opened", [".", INDEX])
def test_shards_are_one_model(folder: Path, opened: str) -> None:
    checkpoint = open_model(folder / opened)
    assert set(checkpoint.tensors) == set(TENSORS) and checkpoint.container == "folder"
    for name, tensor in TENSORS.items():
        assert torch.equal(checkpoint.tensor(name), tensor)
    assert checkpoint.file_of("b") == folder / B
    assert checkpoint.read_bytes("c", 4) == b"\0" * 4


def test_a_shard_alone_says_what_to_open(folder: Path) -> None:
    with pytest.raises(UnsupportedCheckpointError, match=rf"{B} is piece 2 of 2.*open {INDEX} or its folder"):
        open_model(folder / B)
    (folder / INDEX).unlink()
    with pytest.raises(UnsupportedCheckpointError, match="put it beside the others"):
        open_model(folder / B)


@pytest.mark.parametrize(
    ("weight_map", "error", "words"),
    [
        ({"a": A, "b": "model-00003-of-00003.safetensors", "c": A}, ModelNotFoundError, "is not beside it; download"),
        ({"a": A, "b": "../elsewhere.safetensors", "c": A}, UnsupportedCheckpointError, "no file beside it"),
        ({"a": A, "b": "/etc/passwd", "c": A}, UnsupportedCheckpointError, "no file beside it"),
        ({"a": A, "b": "", "c": A}, UnsupportedCheckpointError, "no file beside it"),
        ({"a": A, "b": "..", "c": A}, UnsupportedCheckpointError, "no file beside it"),
        ({"a": A, "b": A, "c": A}, CorruptCheckpointError, "1 tensors are in none of its files .b."),
        ({"a": A, "b": B, "c": B}, CorruptCheckpointError, "'c' is in model-00001-of-00002.safetensors and not in"),
        ({"a": A, "b": B, "c": A, "d": B}, CorruptCheckpointError, "1 tensors are in none .*d"),
        ({"a": 5}, CorruptCheckpointError, "no weight_map"),
        ([], CorruptCheckpointError, "no weight_map"),
    ],
    ids=str,
)
def test_an_index_that_does_not_fit(folder: Path, weight_map: object, error: type[Exception], words: str) -> None:
    write_index(folder, weight_map)
    with pytest.raises(error, match=words):
        open_model(folder)


def test_a_tensor_in_two_shards(folder: Path) -> None:
    save_file({"a": TENSORS["a"], "b": TENSORS["b"]}, folder / B)
    with pytest.raises(CorruptCheckpointError, match="'a' is in two of its files"):
        open_model(folder)


@pytest.mark.parametrize("content", ["", "[1]", '{"weight_map": {"a": "x", "a": "y"}}', "[" * 100_000])
def test_a_damaged_index(folder: Path, content: str) -> None:
    (folder / INDEX).write_text(content)
    with pytest.raises(CorruptCheckpointError, match="index.json: it is damaged"):
        open_model(folder)


def test_a_truncated_shard(folder: Path) -> None:
    (folder / B).write_bytes((folder / B).read_bytes()[:-3])
    with pytest.raises(CorruptCheckpointError, match=f"{B} is incomplete"):
        open_model(folder)


def test_links_out_of_a_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    (folder / B).rename(outside)
    (folder / B).symlink_to(outside)
    for opened in (folder, folder / INDEX):
        with pytest.raises(UnsupportedCheckpointError, match="leads out of its folder; put the file itself there"):
            open_model(opened)


def test_a_single_file_in_a_folder_may_not_lead_out_either(tmp_path: Path) -> None:
    save(tmp_path / "outside.safetensors", network(CLIPText, CLIP))
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "model.safetensors").symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(UnsupportedCheckpointError, match="leads out of its folder"):
        open_model(tmp_path / "text_encoder")
    assert open_model(tmp_path / "text_encoder" / "model.safetensors").tensors  # the user's own link, by its own name


def test_links_inside_a_folder_and_to_a_folder(folder: Path, tmp_path: Path) -> None:
    (folder / B).rename(folder / "moved.safetensors")
    (folder / B).symlink_to("moved.safetensors")
    (tmp_path / "link").symlink_to(folder)
    assert set(open_model(tmp_path / "link").tensors) == set(TENSORS)


def test_a_snapshot_of_the_hub_cache(folder: Path, tmp_path: Path) -> None:
    """There every file is a link to the blobs of its repository, and nowhere else."""
    repository = tmp_path / "models--someone--something"
    snapshot = repository / "snapshots" / "0123"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        file.rename(repository / "blobs" / file.name)
        (snapshot / file.name).symlink_to(os.path.join("..", "..", "blobs", file.name))
    assert set(open_model(snapshot).tensors) == set(TENSORS)
    (repository / "blobs" / B).rename(tmp_path / "outside")
    (repository / "blobs" / B).symlink_to(tmp_path / "outside")
    with pytest.raises(UnsupportedCheckpointError, match="leads out"):
        open_model(snapshot)


def test_a_folder_with_one_file_or_a_plain_one_among_variants(tmp_path: Path) -> None:
    save_flux(tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    assert open_model(tmp_path).files[0].name == "diffusion_pytorch_model.fp16.safetensors"
    save_flux(tmp_path / "diffusion_pytorch_model.safetensors")
    assert open_model(tmp_path).files[0].name == "diffusion_pytorch_model.safetensors"
    save_flux(tmp_path / "other.safetensors")
    with pytest.raises(UnsupportedCheckpointError, match="holds several models .*; name one of them"):
        open_model(tmp_path)


def test_nunchaku_folders(tmp_path: Path) -> None:
    for name in ("transformer_blocks.safetensors", "unquantized_layers.safetensors"):
        save_flux(tmp_path / name)
    with pytest.raises(UnsupportedCheckpointError, match="SVDQuant/nunchaku"):
        open_model(tmp_path)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    (tmp_path / "gone.safetensors").symlink_to("nowhere")
    for name in ("pipe", "loop", "gone", "none"):
        with pytest.raises(ModelNotFoundError, match=f"{name}.safetensors"):
            open_model(tmp_path / f"{name}.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="holds no model; name a model file"):
        open_model(tmp_path / "empty")
