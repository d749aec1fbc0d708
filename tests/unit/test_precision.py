"""What networks are kept as and compute in: by device, by setting, for the demonstration model and for packed files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import save_drawable

from lightweight_engine import Config, GenerationRequest, LightweightEngine
from lightweight_engine.apps.settings import ON_A_CPU
from lightweight_engine.backend.devices import Card
from lightweight_engine.backend.host_memory import GIB
from lightweight_engine.core import precision
from lightweight_engine.core.models import TINY, ModelLibrary, ModelSet
from lightweight_engine.core.precision import Precision, choose_precision, in_effect, memory_manager
from lightweight_engine.flux.load import Storage
from lightweight_engine.labels import STORAGE

GPU = Card("a card", "cuda", 24 * GIB, 24 * GIB)
HOST = Card("CPU", "cpu", 64 * GIB, 64 * GIB)
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> ModelSet:
    return ModelLibrary([save_drawable(tmp_path_factory.mktemp("plain"))]).choose()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> ModelSet:
    """A model whose files are fp8."""
    return ModelLibrary([save_drawable(tmp_path_factory.mktemp("packed"), dtype=FP8)]).choose()


def chosen(models: ModelSet, card: Card, notes: list[str] | None = None, **settings: Any) -> Precision:
    return choose_precision(Config(**settings), models, card, [] if notes is None else notes)


def test_the_defaults_of_a_gpu_and_of_a_host(plain: ModelSet) -> None:
    gpu, host = chosen(plain, GPU), chosen(plain, HOST)
    assert gpu.transformer == Storage("nf4", BF16) and host.transformer == Storage("auto", FP32)
    assert gpu.autoencoder == Storage("auto", BF16) and host.autoencoder == Storage("auto", FP32)
    assert gpu.t5 == gpu.clip == Storage("file", FP32), "weights as the file has them, cast at each use"
    assert host.t5 == host.clip == Storage("auto", FP32), "small ones are cast once"


@pytest.mark.parametrize("card", [GPU, HOST], ids=["gpu", "host"])
@pytest.mark.parametrize(("setting", "dtype"), [("bf16", BF16), ("fp16", FP16), ("fp32", FP32)])
def test_dtypes_that_are_set_hold_anywhere(plain: ModelSet, card: Card, setting: str, dtype: torch.dtype) -> None:
    precision = chosen(plain, card, compute_dtype=setting, vae_dtype=setting)
    assert precision.transformer.compute == precision.autoencoder.compute == dtype
    assert precision.t5.compute == precision.clip.compute == FP32


@pytest.mark.parametrize("card", [GPU, HOST], ids=["gpu", "host"])
@pytest.mark.parametrize("storage", [name for name in STORAGE if name != "auto"])
def test_a_storage_that_is_set_holds_anywhere(plain: ModelSet, card: Card, storage: str) -> None:
    notes: list[str] = []
    assert chosen(plain, card, notes, storage_dtype=storage).transformer.format == storage
    assert chosen(plain, card, notes, text_storage_dtype=storage).t5.format == storage
    assert notes == []


def test_what_is_told_of_a_cpu_is_what_it_takes(plain: ModelSet) -> None:
    for name, value in ON_A_CPU.items():
        assert chosen(plain, HOST) == chosen(plain, HOST, **{name: value}) != chosen(plain, HOST, **{name: "fp16"})


def test_what_is_in_effect(plain: ModelSet, packed: ModelSet) -> None:
    def told(models: ModelSet, card: Card, **settings: Any) -> list[str]:
        found = in_effect(chosen(models, card, **settings), models)
        return [found[name] for name in ("storage_dtype", "compute_dtype", "speed", "vae_dtype")]

    assert told(plain, GPU) == ["nf4", "bf16", "exact", "bf16"]
    assert told(plain, HOST) == ["fp32", "fp32", "exact", "fp32"]
    assert told(plain, HOST, storage_dtype="nf4", compute_dtype="bf16") == ["nf4", "bf16", "exact", "fp32"]
    assert told(packed, GPU) == ["fp8_e4m3", "bf16", "exact", "bf16"], "files that are packed stay as they are"
    assert told(plain, GPU, speed="fp8")[2] == "fp8" and told(plain, HOST, speed="fp8")[2] == "exact"


@pytest.mark.parametrize(
    ("card", "settings", "told"),
    [
        (HOST, {}, True),
        (HOST, {"storage_dtype": "nf4"}, False),
        (HOST, {"compute_dtype": "bf16"}, True),
        (GPU, {}, False),
    ],
)
def test_weights_at_hand_that_are_at_hand_anyway_are_told(
    plain: ModelSet, card: Card, settings: dict[str, str], told: bool
) -> None:
    notes: list[str] = []
    chosen(plain, card, notes, residency="fast", **settings)
    assert bool(notes) == told and all("residency = fast" in each and "no effect" in each for each in notes)


def test_tiny_stays_as_it_is_unless_told() -> None:
    tiny = ModelLibrary([TINY]).choose()
    assert chosen(tiny, GPU).transformer.format == "auto"
    assert chosen(tiny, GPU, storage_dtype="nf4").transformer.format == "nf4"


def test_large_text_encoders_are_used_from_their_file(plain: ModelSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "LARGE", plain.parts["t5"].nbytes - 1)
    host = chosen(plain, HOST)
    assert (host.t5.format, host.clip.format) == ("file", "auto")


def test_a_transformer_too_large_for_the_host_is_used_from_its_file(plain: ModelSet) -> None:
    full = replace(HOST, free=1000)
    assert chosen(plain, full).transformer == Storage("file", FP32)
    assert chosen(plain, full, storage_dtype="nf4").transformer.format == "nf4"


@pytest.mark.parametrize("card", [GPU, HOST], ids=["gpu", "host"])
@pytest.mark.parametrize("storage", ["nf4", "gguf:Q8_0", "fp8_e5m2"])
def test_a_setting_that_does_nothing_with_a_packed_file_is_said(packed: ModelSet, card: Card, storage: str) -> None:
    notes: list[str] = []
    chosen(packed, card, notes, storage_dtype=storage)
    assert notes == [
        "small.safetensors is stored as fp8_e4m3 already and is used as it is; "
        f"storage_dtype = {storage} (argument) has no effect on it"
    ]


@pytest.mark.parametrize("settings", [{}, {"storage_dtype": "auto"}, {"storage_dtype": "fp8_e4m3"},
                                      {"storage_dtype": "bf16"}])  # fmt: skip
def test_nothing_is_said_where_nothing_was_asked_in_vain(packed: ModelSet, settings: dict[str, str]) -> None:
    notes: list[str] = []
    chosen(packed, GPU, notes, **settings)
    assert notes == []


def test_the_note_reaches_the_caller(tmp_path: Path) -> None:
    config = Config(models_dir=save_drawable(tmp_path, dtype=FP8), device="cpu", offline=True, cache_dir=tmp_path,
                    storage_dtype="nf4", tokenizer_dirs=(TINY,))  # fmt: skip
    engine = LightweightEngine(config)
    result = engine.run(GenerationRequest(prompt="a", width=64, height=64, steps=1))
    assert [note for note in result.warnings if "has no effect on it" in note] == list(engine.notes) != []
    engine.close()


def test_rules_of_memory_are_those_of_the_settings() -> None:
    manager = memory_manager(
        Config(vram_state="LOW_VRAM", inference_reserve=0.5, allocator_fraction=0.5, vram_limit=1.5,
               pinned_memory=False, async_swap=False),
        GPU,
    )  # fmt: skip
    assert (manager.card, manager.state, manager.reserve, manager.fraction) == (GPU, "LOW_VRAM", 0.5, 0.5)
    assert (manager.limit, manager.pinned, manager.overlap) == (int(1.5 * GIB), False, False)
    assert memory_manager(Config(), GPU).limit is None


def test_streaming_of_converted_weights_on_a_cpu_is_said_to_be_none(plain: ModelSet) -> None:
    notes: list[str] = []
    chosen(plain, HOST, notes, vram_state="NO_VRAM")
    assert [note for note in notes if "NO_VRAM (argument) has no effect beyond" in note] == notes != []
    for card, dtype in ((HOST, "bf16"), (GPU, "auto")):
        notes.clear()
        chosen(plain, card, notes, vram_state="NO_VRAM", compute_dtype=dtype)
        assert notes == []


def test_text_encoders_compute_in_what_is_asked_for(plain: ModelSet) -> None:
    asked = chosen(plain, GPU, text_compute_dtype="bf16")
    assert asked.t5 == asked.clip == Storage("auto", BF16), "a file in float16 is converted once"
    assert asked.transformer == chosen(plain, GPU).transformer
