"""What all tests share: options, reasons for skips, and an environment that is the same on every machine."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
from goldens import PROJECT, golden_dir, tokenizer_dir

from lightweight_engine.backend.torch_import import import_torch

import_torch()  # as a start does it

KEPT = ("LWE_GOLDEN_DIR", "LWE_TOKENIZER_DIR")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_report_header() -> list[str]:
    folder = golden_dir()
    kind = "slim copy" if folder == PROJECT / "tests" / "golden" / "data" else "full"
    return [f"goldens: {folder} ({kind})", f"tokenizers: {tokenizer_dir() or 'recorded ids only'}"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marks = [] if config.getoption("--slow") else [("slow", "takes minutes; run with --slow")]
    if any(item.get_closest_marker("gpu") for item in items) and not _has_gpu():
        marks.append(("gpu", "needs a CUDA GPU, and torch sees none"))
    for item in items:
        for name, reason in marks:
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session", autouse=True)
def _same_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No setting, cache or network of the person who runs the tests takes part."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for variable in [name for name in os.environ if name.startswith("LWE_") and name not in KEPT]:
            patch.delenv(variable)
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        patch.setenv("XDG_CONFIG_HOME", str(home / "config"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def small_jobs() -> Iterator[None]:
    """For jobs of a few milliseconds: one thread, as threads on a busy machine wait for one another longer than they
    compute; and each collection of garbage looks only at what the tests have made."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)
