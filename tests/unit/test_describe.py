"""What is written down of the pictures that a request begins with."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lightweight_engine import GenerationRequest
from lightweight_engine.core.describe import plain_request
from lightweight_engine.core.pictures import PictureReader


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_a_picture_in_memory_is_told_by_its_hash(kind: Any) -> None:
    given = kind(png())
    assert PictureReader(None, True).read(given).size == (8, 8), "it is one that is read"
    told = f"sha256:{hashlib.sha256(png()).hexdigest()}"
    assert plain_request(GenerationRequest(image=given))["image"] == told
    assert plain_request(GenerationRequest(image=[given, given]))["image"] == [told, told]


def test_a_file_is_told_by_its_path_though_it_is_gone_by_now(tmp_path: Path) -> None:
    path = tmp_path / "gone.png"
    assert plain_request(GenerationRequest(image=path))["image"] == str(path)


def test_a_path_is_told_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("start.png").write_bytes(png())
    for given in ("start.png", Path("start.png"), "../" + tmp_path.name + "/start.png"):
        assert plain_request(GenerationRequest(image=given))["image"] == str(tmp_path / "start.png")
