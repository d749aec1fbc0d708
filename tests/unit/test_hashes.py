"""Hashes are information: no picture is lost for want of one."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from factories import save_drawable

from lightweight_engine import Config, LightweightEngine, Progress
from lightweight_engine.backend.kept_files import FileVersion
from lightweight_engine.core.hashes import HashCache, read_sha256
from lightweight_engine.core.models import TINY, ModelLibrary
from lightweight_engine.core.replay import read_recipe, replay, save_result

NOT_TOLD = "the file was replaced, is not there any more, or cannot be read, so that its hash is not told"
SMALL = {"prompt": "a cat", "width": 64, "height": 64, "steps": 2, "seed": 7}
FILE = Path("Stable-diffusion", "small.safetensors")


def engine_in(folder: Path) -> LightweightEngine:
    places: dict[str, Any] = {"models_dir": folder, "cache_dir": folder / "cache", "tokenizer_dirs": (TINY,)}
    return LightweightEngine(Config(**places, device="cpu", offline=True))


def hold_threads(engine: LightweightEngine) -> Callable[[], None]:
    """No file is read for its hash before the returned function is called, as if it were a large one."""
    turns = engine.hashes._turns = threading.Semaphore(0)
    return partial(turns.release, 4)


def test_a_file_that_goes_away_while_the_first_job_draws(tmp_path: Path) -> None:
    root = save_drawable(tmp_path / "models")
    content = (root / FILE).read_bytes()
    with closing(engine_in(root)) as engine:
        engine.setup()
        read = hold_threads(engine)

        def lose(report: Progress) -> None:
            if report.stage == "sample":
                (root / FILE).unlink(missing_ok=True)
                read()

        result = engine.run(engine.request(**SMALL, num_outputs=2), on_progress=lose)
    told = f"small: {NOT_TOLD}"
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


def replace_file(path: Path, content: bytes) -> None:
    """As who downloads does it: another file takes the name, later by its time."""
    other = path.with_name("other.part")
    other.write_bytes(content)
    later = path.stat().st_mtime_ns + 10**9
    os.utime(other, ns=(later, later))
    os.replace(other, path)


@pytest.mark.parametrize("known", [False, True], ids=["hashed for the first time", "hashed before"])
def test_a_file_that_is_replaced_while_the_first_job_draws(tmp_path: Path, known: bool) -> None:
    """The hash of what was drawn with, or none: a service goes on with a model whose file was replaced."""
    root = save_drawable(tmp_path / "models")
    content = (root / FILE).read_bytes()
    with closing(engine_in(root)) as engine:
        engine.setup()
        if known:
            engine.hashes.wait(engine.models.key, lambda: None)
        read = hold_threads(engine)

        def swap(report: Progress) -> None:
            if report.stage == "sample" and (root / FILE).read_bytes() == content:
                replace_file(root / FILE, content[:-1] + bytes([content[-1] ^ 1]))
                read()

        results = [engine.run(engine.request(**SMALL), on_progress=swap), engine.run(engine.request(**SMALL))]
    told = hashlib.sha256(content).hexdigest() if known else None
    for result in results:
        assert [file.sha256 for file in result.models if file.role == "transformer"] == [told]
        assert all(file.sha256 for file in result.models if file.role != "transformer")
        assert (f"small: {NOT_TOLD}" in result.warnings) is not known
        assert ("Model hash" in result.infotexts[0]) is known


def test_a_file_that_is_replaced_before_it_is_read(tmp_path: Path) -> None:
    """A network may be read long after its header: what was mapped counts."""
    root = save_drawable(tmp_path / "models")
    content = (root / FILE).read_bytes()
    chosen = ModelLibrary([root]).choose()
    before, cache = chosen.key, HashCache(tmp_path / "hashes.json")
    replace_file(root / FILE, content[:-1] + bytes([content[-1] ^ 1]))
    assert chosen.key == before and chosen.files(cache)[0].sha256 is None
    checkpoint = chosen.parts["transformer"].checkpoint
    checkpoint.raw(next(iter(checkpoint.tensors)))
    assert chosen.key != before
    assert chosen.files(cache)[0].sha256 == hashlib.sha256((root / FILE).read_bytes()).hexdigest()


def test_a_file_in_place_of_another_is_not_read_for_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint takes 10 to 20 seconds, and each job with a model whose file was replaced asks anew."""
    path = tmp_path / "a"
    path.write_text("a")
    version = FileVersion.of(path)
    replace_file(path, b"b")
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("it is read"))
    with pytest.raises(OSError, match="a was changed or replaced"):
        read_sha256(version)


def test_hashes_of_files_that_are_not_there(tmp_path: Path) -> None:
    for name in ("gone", "a"):
        (tmp_path / name).write_text(name)
    cache = HashCache(tmp_path / "hashes.json")
    files = [FileVersion.of(tmp_path / "gone"), FileVersion.of(tmp_path / "a")]
    (tmp_path / "gone").unlink()
    cache.wait(files, lambda: None)
    assert cache.sha256_of(files) is None and cache.sha256_of(files[1:]) == cache.known(files[1:])
    with pytest.raises(FileNotFoundError):
        cache.sha256(tmp_path / "gone")


def test_a_cache_that_cannot_be_written_is_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "taken").write_text("a file")
    files = [tmp_path / name for name in "abc"]
    for path in files:
        path.write_text(path.name)
    cache = HashCache(tmp_path / "taken" / "hashes.json")
    with caplog.at_level(logging.WARNING):
        assert all(cache.sha256_of([FileVersion.of(path)]) for path in files)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1 and f"{tmp_path / 'taken'} cannot be written" in told[0] and "set cache_dir" in told[0]
