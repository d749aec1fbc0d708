"""A service for all tests that leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from running_service import Running, service


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, _same_environment: None) -> Iterator[Running]:
    with service(tmp_path_factory.mktemp("service"), "--set", "queue_max=3") as running:
        yield running.ready()
