"""What the Makefile's targets set up in a fresh clone."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(("target", "installed"), [("demo", ".[upscale]"), ("test", ".[test]"), ("serve", ".[serve]")])
def test_a_target_installs_what_it_runs_with(target: str, installed: str, tmp_path: Path) -> None:
    run = subprocess.run(
        ["make", "--dry-run", target, f"VENV={tmp_path / 'new'}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert f"--editable '{installed}'" in run.stdout
