"""The picture of a sweep has the lines that the rows describe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.gpu_sweep import finished
from benchmarks.plots import draw, panels


def row(kind: str, size: str, at_once: int, rank: int, tflop: float, ms: float) -> dict[str, Any]:
    told = {"products in": kind, "size": size, "at once": at_once, "LoRA rank": rank, "TFLOP": tflop}
    return finished(told, [ms * at_once] * 3, (100.0, 70.0))


ROWS = [
    row("bf16", "1536x2688", 1, 0, 420.0, 612.0),
    row("bf16", "768x1344", 4, 0, 70.0, 96.0),
    row("bf16", "768x1344", 1, 0, 70.0, 100.0),
    row("bf16", "768x1344", 1, 64, 70.0, 103.0),
    row("fp8", "768x1344", 1, 0, 70.0, 100.0),
]


def test_lines_are_of_rows_that_differ_in_one_thing() -> None:
    lines = panels(ROWS, "bf16")
    assert lines["size"] == [(1.032192, 100.0), (4.128768, 612.0)]
    assert lines["expected"][0] == (1.032192, 100.0)
    assert lines["expected"][1] == pytest.approx((4.128768, 600.0))
    assert lines["at once"] == [(1, 100.0), (4, 96.0)]
    assert lines["rank"] == [(0, 100.0), (64, 103.0)]
    assert panels(ROWS, "fp8")["rank"] == [(0, 100.0)]


def test_the_picture_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="draws plots; in the extra bench")
    draw({"rows": ROWS, "device": "a card", "versions": {"torch": "2"}, "date": "2026-01-01"}, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(1 << 20) or []) > 10
