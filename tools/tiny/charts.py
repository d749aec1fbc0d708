"""Loss curves from a history: ``python -m tools.tiny.charts outputs/tiny/history.json docs/tiny/losses.png``."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

SIZE = (420, 260)
MARGIN = 44
COLORS = ((40, 90, 200), (200, 70, 40), (40, 140, 70), (140, 60, 160))
SHOWN = {
    "autoencoder": "pixel", "flow": "loss", "distill": "loss", "classifier": "loss", "texts": "loss",
    "lora night": "loss", "lora hat": "loss", "upscaler": "loss", "face detector": "loss", "hand detector": "loss",
}  # fmt: skip


def panel(stage: str, runs: list[list[dict[str, Any]]]) -> Image.Image:
    """One stage: its figure over the steps of all runs in a row, logarithmic."""
    page = Image.new("RGB", SIZE, "white")
    pen, name = ImageDraw.Draw(page), SHOWN.get(stage, "loss")
    rows, before = [], 0
    for number, run in enumerate(run for run in runs if run):
        rows += [(number, before + row["step"], float(row[name])) for row in run]
        before = rows[-1][1]
    low, high = (f(value for _, _, value in rows) for f in (min, max))
    low, high = math.log10(max(low, 1e-6) * 0.9), math.log10(max(high, 1e-6) * 1.1)
    width, height = SIZE[0] - MARGIN - 12, SIZE[1] - 2 * MARGIN

    def at(step: float, value: float) -> tuple[float, float]:
        rise = (math.log10(max(value, 1e-6)) - low) / max(high - low, 1e-9)
        return MARGIN + width * step / max(before, 1), MARGIN + height * (1 - rise)

    pen.rectangle((MARGIN, MARGIN, MARGIN + width, MARGIN + height), outline=(170, 170, 170))
    pen.text((MARGIN, 14), f"{stage}: {name} over {before} steps (log scale)", fill="black")
    for share in (0.0, 0.5, 1.0):
        value = 10 ** (low + share * (high - low))
        pen.text((4, MARGIN + height * (1 - share) - 6), f"{value:.3g}", fill="black")
        pen.text((MARGIN + width * share - 12, MARGIN + height + 6), f"{round(before * share)}", fill="black")
    for number in {row[0] for row in rows}:
        line = [at(step, value) for run, step, value in rows if run == number]
        pen.line(line if len(line) > 1 else line * 2, fill=COLORS[number % len(COLORS)], width=2)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("history", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    runs = json.loads(args.history.read_text(encoding="utf-8"))
    panels = [panel(stage, runs[stage]) for stage in SHOWN if any(runs.get(stage, []))]
    page = Image.new("RGB", (2 * SIZE[0], -(-len(panels) // 2) * SIZE[1]), "white")
    for i, one in enumerate(panels):
        page.paste(one, (i % 2 * SIZE[0], i // 2 * SIZE[1]))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    page.save(args.out)


if __name__ == "__main__":
    main()
