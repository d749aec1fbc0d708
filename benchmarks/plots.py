"""A picture of what ``benchmarks.gpu_sweep`` measured: ``python -m benchmarks.plots``

Time of a step against the size of the picture, pictures at once, and the rank of LoRAs; dashed is what the time at
768x1344 becomes in proportion to the operations.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS

PAGE = Path(__file__).parents[1] / "docs" / "speed.png"
KINDS = {"bf16": "#1f5fa8", "fp8": "#c8501e"}
USUAL = "768x1344"

Row = dict[str, Any]
Points = list[tuple[float, float]]


def megapixels(row: Row) -> float:
    width, height = map(int, row["size"].split("x"))
    return width * height / 1e6


def points(rows: list[Row], kind: str, x: Callable[[Row], float], y: Callable[[Row], float], **fixed: Any) -> Points:
    """The points of a line, from left to right.

    Args:
        kind: what products are in.
        fixed: columns of the rows that count, with ``_`` for a space.
    """
    wanted = {"products in": kind, **{name.replace("_", " "): value for name, value in fixed.items()}}
    chosen = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return sorted((x(row), y(row)) for row in chosen)


def panels(rows: list[Row], kind: str) -> dict[str, Points]:
    """The lines of a kind, by panel."""

    def taken(row: Row) -> float:
        return row["ms"]

    def expected(row: Row) -> float:
        return row["ms"] / row["x expected"]

    return {
        "size": points(rows, kind, megapixels, taken, at_once=1, LoRA_rank=0),
        "expected": points(rows, kind, megapixels, expected, at_once=1, LoRA_rank=0),
        "at once": points(rows, kind, lambda row: row["at once"], taken, size=USUAL, LoRA_rank=0),
        "rank": points(rows, kind, lambda row: row["LoRA rank"], taken, size=USUAL, at_once=1),
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """Write the picture of a result."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = {
        "size": ("megapixels", "size of the picture"),
        "at once": ("pictures at once", f"{USUAL}, time for each"),
        "rank": ("rank", f"{USUAL}, LoRAs on every linear"),
    }
    figure, axes = pyplot.subplots(1, len(titles), figsize=(13, 4), layout="constrained")
    for kind, colour in KINDS.items():
        lines = panels(result["rows"], kind)
        for axis, name in zip(axes, titles, strict=True):
            if lines[name]:
                axis.plot(*zip(*lines[name], strict=True), "o-", color=colour, label=kind)
        if lines["expected"]:
            axes[0].plot(*zip(*lines["expected"], strict=True), "--", color=colour, alpha=0.6)
    for axis, (label, title) in zip(axes, titles.values(), strict=True):
        axis.set(xlabel=label, ylabel="ms a step", title=title)
        axis.set_ylim(0, 1.2 * axis.get_ylim()[1])  # room for the names of the lines
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(f"{result['device']}, torch {result['versions']['torch']}, {result['date']}", fontsize=9)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, default=RESULTS / "gpu_sweep.json")
    parser.add_argument("--out", type=Path, default=PAGE)
    args = parser.parse_args()
    draw(json.loads(args.result.read_text(encoding="utf-8")), args.out)
    print(args.out)


if __name__ == "__main__":
    main()
