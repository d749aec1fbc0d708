"""What unit tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lightweight_engine import Config, LightweightEngine


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LightweightEngine]:
    """The demonstration model on a CPU, ready; nothing else is in its folders."""
    folder = tmp_path_factory.mktemp("engine")
    made = LightweightEngine(Config(models_dir=folder, cache_dir=folder / "cache", device="cpu", offline=True))
    made.setup()
    yield made
    made.close()
