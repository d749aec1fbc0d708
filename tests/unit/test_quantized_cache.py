"""The cache of quantised parts: written once, the same pictures from it, bounded, and never a half file."""

from __future__ import annotations

import os
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch
from factories import save_family, save_flux

from lightweight_engine import Config, GenerationRequest, LightweightEngine
from lightweight_engine.core.describe import pixels_sha256
from lightweight_engine.core.models import TINY, ModelLibrary
from lightweight_engine.core.quantized_cache import QuantizedCache, file_name
from lightweight_engine.errors import MemoryBudgetError, OutputError
from lightweight_engine.flux.convert import converted_size
from lightweight_engine.flux.keymaps import Part

CPU = torch.device("cpu")
GIB = 1 << 30


def config(folder: Path, **settings: object) -> Config:
    own = {"models_dir": folder, "cache_dir": folder / "cache", "device": "cpu", "offline": True}
    return Config(**{**own, "storage_dtype": "nf4", "quantized_cache": True, **settings})


def files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "cache" / "quantized").glob("*")}


def picture(engine: LightweightEngine) -> tuple[str, str, list[str | None]]:
    """Pixels, text and hashes of files."""
    result = engine.run(GenerationRequest(prompt="a man", width=64, height=64, steps=2, seed=3))
    return pixels_sha256(result.images[0]), result.infotexts[0], [file.sha256 for file in result.models]


def test_the_second_start_reads_what_the_first_has_written(tmp_path: Path) -> None:
    without = picture(LightweightEngine(config(tmp_path, quantized_cache=False)))
    assert files(tmp_path) == {}
    first = LightweightEngine(config(tmp_path, text_storage_dtype="fp8_e4m3"))
    picture(first)
    assert sorted(name.rsplit("-", 1)[0] for name in files(tmp_path)) == [
        "clip_l-clip-fp8_e4m3",
        "t5xxl-t5-fp8_e4m3",
        "tiny-transformer-nf4",
    ]
    written = files(tmp_path)
    second = LightweightEngine(config(tmp_path))
    assert picture(second) == without  # pixels, and the user's own files by name and hash
    assert second.networks.models.parts["transformer"].storage == "nf4"
    assert second.models.name == "tiny"
    assert set(files(tmp_path)) == set(written)
    assert any(files(tmp_path)[name] > written[name] for name in written)  # used now


def test_another_source_is_another_file(tmp_path: Path) -> None:
    part = flux(tmp_path)
    before = file_name(part, "nf4")
    assert file_name(part, "fp4") != before
    os.utime(part.checkpoint.path, (1, 1))
    assert file_name(part, "nf4") == before, "of what was opened"
    assert file_name(opened(tmp_path), "nf4") != before


def test_a_source_that_is_replaced_meanwhile_is_not_kept(tmp_path: Path) -> None:
    """It would be taken for the one that was there before, which may come back."""
    part = flux(tmp_path)
    file_name(part, "nf4")  # the source is known from here on
    os.utime(part.checkpoint.path, (1, 1))
    cache = QuantizedCache(tmp_path / "q", GIB)
    with pytest.raises(OutputError, match="replaced"):
        cache.part(part, "nf4", CPU)
    assert cache.ls() == []


def flux(folder: Path, name: str = "a") -> Part:
    save_family(folder)
    save_flux(folder / "Stable-diffusion" / f"{name}.safetensors")
    return opened(folder, name)


def opened(folder: Path, name: str = "a") -> Part:
    return ModelLibrary([folder]).choose(name).parts["transformer"]


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    parts = [flux(tmp_path, name) for name in "abc"]
    size = converted_size(parts[0], "nf4")
    cache = QuantizedCache(tmp_path / "q", int(2.5 * size))
    folder = cache.folder
    for age, part in zip((300, 200), parts[:2], strict=True):
        cache.part(part, "nf4", CPU)
        (path,) = folder.glob(f"{part.checkpoint.path.stem}-*")
        os.utime(path, (time.time() - age, time.time() - age))
    cache.part(parts[0], "nf4", CPU)  # now b is the oldest
    cache.part(parts[2], "nf4", CPU)
    assert sorted(path.name[0] for path in folder.iterdir()) == ["a", "c"]


def test_a_part_outlives_its_file(tmp_path: Path) -> None:
    """Another process may make room while this one has opened a file and not yet read it."""
    part = QuantizedCache(tmp_path / "q", GIB).part(flux(tmp_path), "nf4", CPU)
    part.checkpoint.path.unlink()
    assert part.sources["img_in.weight"].read().shape == (64, 64)


def test_one_that_is_too_large_is_no_error(tmp_path: Path) -> None:
    part = flux(tmp_path)
    with pytest.raises(OutputError, match="more than quantized_cache_gib"):
        QuantizedCache(tmp_path / "q", 100).part(part, "nf4", CPU)
    engine = LightweightEngine(config(TINY, cache_dir=tmp_path / "cache", quantized_cache_gib=1e-6))
    engine.setup()
    assert any(note.startswith("quantized_cache: tiny") and "at each start" in note for note in engine.notes)
    assert files(tmp_path) == {}


@pytest.mark.parametrize("fault", [PermissionError(13, "Permission denied"), OSError(116, "Stale file handle")])
@pytest.mark.parametrize("where", ["stat", "glob"])
def test_a_folder_that_cannot_be_used_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: OSError, where: str
) -> None:
    """As that of another user: whoever tests may be root, to whom every folder is open."""
    real = getattr(Path, where)

    def fails(path: Path, *arguments: object, **options: object) -> object:
        if "quantized" in path.parts:
            raise fault
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, where, fails)
    engine = LightweightEngine(config(TINY, cache_dir=tmp_path / "cache"))
    engine.setup()
    assert any(note.startswith("quantized_cache: tiny") and "at each start" in note for note in engine.notes)
    assert picture(engine)[0]


def test_a_model_may_have_a_long_name(tmp_path: Path) -> None:
    part = flux(tmp_path, "é" * 115)
    assert QuantizedCache(tmp_path / "q", GIB).part(part, "nf4", CPU).storage == "nf4"


def test_a_damaged_file_is_made_anew_and_an_abandoned_one_removed(tmp_path: Path) -> None:
    part = flux(tmp_path)
    cache = QuantizedCache(tmp_path / "q", GIB)
    path = cache.part(part, "nf4", CPU).checkpoint.path
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    half, fresh = path.with_name("x.1.part"), path.with_name("y.2.part")
    for each in (half, fresh):
        each.write_bytes(b"half")
    os.utime(half, (1, 1))
    assert cache.part(part, "nf4", CPU).storage == "nf4"
    assert path.read_bytes() == whole
    assert (half.exists(), fresh.exists()) == (False, True)


def test_formats_that_are_not_written_are_told(tmp_path: Path) -> None:
    engine = LightweightEngine(config(TINY, cache_dir=tmp_path / "cache", storage_dtype="gguf:Q8_0"))
    engine.setup()
    assert any("no effect on tiny.safetensors: files in gguf:Q8_0 are not written" in note for note in engine.notes)
    assert engine.networks.storage("transformer").format == "gguf:Q8_0"


def test_planning_writes_nothing(tmp_path: Path) -> None:
    engine = LightweightEngine(config(TINY, cache_dir=tmp_path / "cache"))
    assert engine.plan(engine.request(prompt="a man")).storages["transformer"] == "nf4"
    assert files(tmp_path) == {}


def test_memory_that_runs_out_while_weights_are_quantised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crowded(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("injected")

    with closing(LightweightEngine(config(tmp_path))) as engine:
        with monkeypatch.context() as patch, pytest.raises(MemoryBudgetError, match="injected"):
            patch.setattr("lightweight_engine.core.quantized_cache.convert_part", crowded)
            engine.setup()
        engine.setup()
        assert picture(engine)
