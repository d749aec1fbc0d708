"""Signals to all processes of a service that starts, as a terminal sends them: its worker has no words of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from running_service import PROJECT

PRESSED = """
import signal, sys
if "--multiprocessing-fork" in sys.argv:
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)
"""
FOREVER = "import time\ntime.sleep(600)\n"
LAUNCH = """
from multiprocessing.context import SpawnProcess
import os, signal
from lightweight_engine import Config
from lightweight_engine.__main__ import main
from lightweight_engine.apps.server.supervisor import launch

start = SpawnProcess.start

def pressed(process):
    start(process)
    signal.raise_signal(signal.SIGINT)

if __name__ == "__main__":
"""


def end_of(folder: Path, code: str) -> tuple[int, str]:
    """Code and words of a process whose workers are sent both signals before all else, and never get torch.

    It is waited for until its workers have ended too, which hold the stream that is read.
    """
    (folder / "sitecustomize.py").write_text(PRESSED)
    (folder / "torch.py").write_text(FOREVER)
    (folder / "launched.py").write_text(f"{LAUNCH}    {code}\n")
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(PROJECT)])}
    command = [sys.executable, str(folder / "launched.py")]
    done = subprocess.run(command, env=environ, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stderr


def test_a_worker_leaves_signals_to_the_front_from_its_first_moment(tmp_path: Path) -> None:
    """When the front closes the pipe it ends, with code 0, and not when it has torch."""
    code = "child = launch(Config()); child.connection.close(); child.process.join(); os._exit(child.process.exitcode)"
    assert end_of(tmp_path, code) == (0, "")


def test_a_worker_that_imports_ends_with_a_front_that_is_killed(tmp_path: Path) -> None:
    assert end_of(tmp_path, "launch(Config()); os.kill(os.getpid(), signal.SIGKILL)") == (-signal.SIGKILL, "")


def test_ctrl_c_while_a_worker_is_started_is_that_of_every_command(tmp_path: Path) -> None:
    code = "SpawnProcess.start = pressed; main(['serve', '--port', '0', '--set', 'device=cpu'])"
    assert end_of(tmp_path, code) == (130, "error: stopped by Ctrl-C\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_service_that_listens_ends_in_order_while_its_worker_imports(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "torch.py").write_text(FOREVER)
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(PROJECT)])}
    command = [sys.executable, "-m", "lightweight_engine", "serve", "--port", "0", "--set", "device=cpu"]
    process = subprocess.Popen(
        command, env=environ, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None
    try:
        before = next(line for line in process.stderr if '"listening"' in line)
        os.killpg(process.pid, number)
        after = process.communicate(timeout=20)[1]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0 and all(line.startswith("{") for line in (before, *after.splitlines()))
