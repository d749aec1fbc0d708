"""Files below a folder: links to folders are followed, and a circle of links ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from lightweight_engine.backend.kept_files import files_below
from lightweight_engine.core.folders import models_below


@pytest.mark.parametrize(
    "below", [models_below, lambda folder: files_below(folder, (".pt",))], ids=["models", "other files"]
)
def test_linked_folders_are_looked_into_once(tmp_path: Path, below: Callable[[Path], Iterable[Path]]) -> None:
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    for path in (folder / "b" / "2.pt", folder / "b" / "1.PT", folder / "3.pt", elsewhere / "deep" / "4.pt"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for link, target in ((folder / "a", elsewhere), (elsewhere / "back", folder), (folder / "b" / "again", elsewhere)):
        link.symlink_to(target)
    found = [str(path.relative_to(folder)) for path in below(folder)]
    assert found == ["3.pt", "a/deep/4.pt", "b/1.PT", "b/2.pt"]
    assert list(below(tmp_path / "missing")) == []
