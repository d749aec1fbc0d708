"""Hashes are information: no picture is lost for want of one."""

from __future__ import annotations

import logging
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from factories import save_drawable

from lightweight_engine import Config, LightweightEngine, Progress
from lightweight_engine.core.hashes import HashCache
from lightweight_engine.core.models import TINY
from lightweight_engine.core.replay import read_recipe, replay, save_result

SMALL = {"prompt": "a cat", "width": 64, "height": 64, "steps": 2, "seed": 7}
FILE = Path("Stable-diffusion", "small.safetensors")


def engine_in(folder: Path) -> LightweightEngine:
    places: dict[str, Any] = {"models_dir": folder, "cache_dir": folder / "cache", "tokenizer_dirs": (TINY,)}
    return LightweightEngine(Config(**places, device="cpu", offline=True))


def test_a_file_that_goes_away_while_the_first_job_draws(tmp_path: Path) -> None:
    root = save_drawable(tmp_path / "models")
    content = (root / FILE).read_bytes()
    with closing(engine_in(root)) as engine:
        engine.setup()

        def lose(report: Progress) -> None:
            if report.stage == "sample":
                (root / FILE).unlink(missing_ok=True)

        result = engine.run(engine.request(**SMALL, num_outputs=2), on_progress=lose)
    told = "small: the file is not there any more, or cannot be read, so that its hash is not told"
    assert len(result.images) == 2 and result.warnings.count(told) == 1
    assert {file.role: file.sha256 is None for file in result.models} == {
        "transformer": True, "t5": False, "clip": False, "autoencoder": False
    }  # fmt: skip
    assert all("Model: small" in text and "Model hash" not in text for text in result.infotexts)
    saved = save_result(result, tmp_path / "out")[0].path
    (root / FILE).write_bytes(content)
    with closing(engine_in(root)) as engine:
        assert read_recipe(saved).request.prompt == "a cat"
        again = replay(engine, saved)
    assert again.identical
    assert "perhaps another transformer file: small, whose hash is not known" in again.differences


def test_hashes_of_files_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    cache = HashCache(tmp_path / "hashes.json")
    files = [tmp_path / "absent", tmp_path / "a"]
    cache.wait(files, lambda: None)
    assert cache.sha256_of(files) is None and cache.sha256_of(files[1:]) == cache.known(files[1:])
    with pytest.raises(FileNotFoundError):
        cache.sha256(files[0])


def test_a_cache_that_cannot_be_written_is_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "taken").write_text("a file")
    files = [tmp_path / name for name in "abc"]
    for path in files:
        path.write_text(path.name)
    cache = HashCache(tmp_path / "taken" / "hashes.json")
    with caplog.at_level(logging.WARNING):
        assert all(cache.sha256_of([path]) for path in files)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1 and f"{tmp_path / 'taken'} cannot be written" in told[0] and "set cache_dir" in told[0]
