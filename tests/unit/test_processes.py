"""The garbage collector rests for a while, and is as it was afterwards."""

from __future__ import annotations

import gc

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
