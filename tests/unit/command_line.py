"""The command line in this process, for tests of commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from lightweight_engine.apps.cli import main


class Done(NamedTuple):
    code: int
    out: str
    err: str


Cli = Callable[..., Done]


def command_line(capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run commands in this process, in a working folder."""
    monkeypatch.chdir(folder)

    def call(*arguments: object) -> Done:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Done(int(stopped.value.code or 0), captured.out, captured.err)

    return call
