"""A process after the first compiles nothing: no file of the folder is new or changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lora_models import lora_file, random_lora

from lightweight_engine import Config, LightweightEngine
from lightweight_engine.backend import kernels
from lightweight_engine.core.models import TINY, ModelLibrary
from lightweight_engine.core.warm_up import warm_up

pytestmark = pytest.mark.gpu


def warmed_up(folder: Path) -> dict[str, Any]:
    command = [
        *(sys.executable, "-m", "lightweight_engine", "warmup", "--json", "--models-dir", str(TINY)),
        *("--device", "cuda", "--offline", "--set", f"cache_dir={folder}", "--set", "storage_dtype=nf4"),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_CACHE_DIR"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def programs(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*.cubin")}


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    if not kernels.available():
        pytest.skip("Triton's programs cannot be run here")
    first = warmed_up(tmp_path)
    kept = programs(tmp_path / "kernels")
    assert Path(first["folder"]) == tmp_path / "kernels"
    assert 0 < first["compiled"] <= first["kept"] == len(kept)  # some may be compiled as the model is quantised
    second = warmed_up(tmp_path)
    assert second["compiled"] == 0
    assert programs(tmp_path / "kernels") == kept


def test_after_a_warm_up_loras_of_any_rank_compile_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernels.available():
        pytest.skip("Triton's programs cannot be run here")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "programs"))  # in another one other tests compile meanwhile
    shapes = {role: part.shapes for role, part in ModelLibrary([TINY]).choose().parts.items()}
    (tmp_path / "Lora").mkdir()
    ranks = (2, 20, 40, 100)
    for rank in ranks:
        lora_file(tmp_path / "Lora", random_lora(shapes, seed=rank, rank=rank), name=f"r{rank}.safetensors")
    settings: dict[str, Any] = {"models_dir": tmp_path, "cache_dir": tmp_path / "cache", "storage_dtype": "nf4"}
    engine = LightweightEngine(Config(**settings, checkpoint="tiny", device="cuda", offline=True))
    try:
        folder = Path(str(warm_up(engine).folder))
        kept = programs(folder)
        for rank in ranks:
            engine.run(engine.request(prompt="a man", width=64, height=64, steps=1, loras=(f"r{rank}",)))
        assert programs(folder) == kept
    finally:
        engine.close()
