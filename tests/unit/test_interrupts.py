"""Ctrl-C of a command at any moment: before it has begun, while it imports, and while it works."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lightweight_engine.apps.interrupts import end_by_interrupt, signals_held

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


def test_an_interrupt_within_a_text_that_is_run_is_no_end_by_signal(tmp_path: Path) -> None:
    """Python would end by SIGINT, as the text was left by ``KeyboardInterrupt``, whoever caught that."""
    code = """
    from lightweight_engine.apps.interrupts import end_by_interrupt
    end_by_interrupt()
    try:
        exec("import signal; signal.raise_signal(signal.SIGINT)")
    except KeyboardInterrupt:
        pass
    """
    assert run(tmp_path, code) == ENDED


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_what_comes_when_all_is_done_leaves_the_exit_code(tmp_path: Path, name: str) -> None:
    code = f"""
    import os, signal, sys
    from lightweight_engine.apps.interrupts import end_by_interrupt

    class Last:
        def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.{name}):
            kill(pid, number)

    end_by_interrupt()
    kept = Last()
    sys.exit(9)
    """
    assert run(tmp_path, code) == (9, "")


@pytest.mark.parametrize(("pid", "code"), [(1, 143), (2, -signal.SIGTERM)])
def test_sigterm_ends_the_first_process_of_a_container_too(tmp_path: Path, pid: int, code: int) -> None:
    text = f"""
    import os, signal
    from lightweight_engine.apps.interrupts import end_by_interrupt
    os.getpid = lambda: {pid}
    end_by_interrupt()
    signal.raise_signal(signal.SIGTERM)
    """
    assert run(tmp_path, text) == (code, "")


def test_held_signals_come_when_they_are_let_through() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    handler = signal.getsignal(signal.SIGINT)
    told: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: told.append(number))
    try:
        with pytest.raises(OSError, match="no process"), signals_held():
            signal.raise_signal(signal.SIGINT)
            assert not told and signal.pthread_sigmask(signal.SIG_BLOCK, ()) >= {signal.SIGINT, signal.SIGTERM}
            raise OSError("no process")
    finally:
        signal.signal(signal.SIGINT, handler)
    assert told == [signal.SIGINT] and signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_where_signals_cannot_be_held_a_process_is_started_all_the_same(tmp_path: Path) -> None:
    code = """
    import signal, sys
    from lightweight_engine.apps.interrupts import leave_signals, signals_held
    del signal.pthread_sigmask
    with signals_held():
        leave_signals()
        signal.raise_signal(signal.SIGINT)
    sys.exit(9)
    """
    assert run(tmp_path, code) == (9, "")
