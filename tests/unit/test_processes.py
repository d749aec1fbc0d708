"""The garbage collector rests for a while, is as it was afterwards, and leaves out what a process keeps."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from lightweight_engine.backend.processes import collector_paused


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_as_before(enabled: bool) -> None:
    before = gc.isenabled()
    try:
        gc.enable() if enabled else gc.disable()
        with pytest.raises(ZeroDivisionError), collector_paused():
            assert not gc.isenabled()
            _ = 1 / 0
        assert gc.isenabled() is enabled
    finally:
        gc.enable() if before else gc.disable()


@pytest.mark.parametrize("keep", [True, False])
def test_what_a_process_keeps_is_left_out(keep: bool) -> None:
    """In a process of its own: what is left out stays so."""
    code = (
        "import gc\n"
        "from lightweight_engine.backend.processes import collector_paused\n"
        f"with collector_paused(keep={keep}): made = [[] for _ in range(5000)]\n"
        "print(gc.get_freeze_count())"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert (int(told) > 5000) is keep
