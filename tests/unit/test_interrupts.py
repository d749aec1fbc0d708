"""Ctrl-C of a command at any moment: before it has begun, while it imports, and while it works."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lightweight_engine.apps.interrupts import end_by_interrupt

PROJECT = Path(__file__).parents[2]
PRESSED = """
import signal
try:
    signal.raise_signal(signal.SIGINT)
except BaseException:  # as imports of numpy and torch do
    pass
"""
ENDED = (130, "error: stopped by Ctrl-C\n")


def run(folder: Path, code: str) -> tuple[int, str]:
    """Code and words of a process that finds the modules in ``folder`` first."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(PROJECT)])}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize("command", ["models verify tiny", "upscale picture.png", "doctor", "generate a"])
def test_an_import_that_swallows_it_does_not_go_on(tmp_path: Path, command: str) -> None:
    (tmp_path / "torch.py").write_text(PRESSED)
    (tmp_path / "numpy.py").write_text(PRESSED)
    code, words = run(tmp_path, f"from lightweight_engine.__main__ import main; main({command.split()!r})")
    assert (code, words.removeprefix("loading ...\n")) == ENDED


def test_it_is_told_before_the_command_line_is_imported(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("import signal; signal.raise_signal(signal.SIGINT)")
    assert run(tmp_path, "from lightweight_engine.__main__ import main; main(['doctor'])") == ENDED


def test_nothing_slow_is_imported_before_it_is_told(tmp_path: Path) -> None:
    slow = ("typer", "pydantic", "lightweight_engine.errors", "lightweight_engine.apps.console")
    code = f"import lightweight_engine.__main__, sys; sys.exit(any(name in sys.modules for name in {slow}))"
    assert run(tmp_path, code) == (0, "")


def test_what_works_may_close_what_is_open(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        end_by_interrupt()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert capfd.readouterr().err == ""
