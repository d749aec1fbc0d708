"""A benchmark's table for a person and its JSON under ``benchmarks/results``."""

from __future__ import annotations

import json
import platform
import statistics
import time
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "bitsandbytes", "diffusers", "torchao", "transformers", "safetensors", "numpy")


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    import os

    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version(), "system": platform.system()}


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Minimum, median and maximum."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def publish(name: str, rows: list[dict[str, Any]], **facts: Any) -> None:
    """Print ``rows`` as a table and write them with machine and versions."""
    columns = list(rows[0])
    cells = [columns] + [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
    for key, value in facts.items():
        print(f"{key}: {value}")
    write(name, rows, **facts)


def write(name: str, rows: list[dict[str, Any]], **facts: Any) -> None:
    """Write ``rows`` with machine and versions; a program that may be cut off does so after each row."""
    RESULTS.mkdir(exist_ok=True)
    data = {
        "benchmark": name,
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": versions(),
        **facts,
        "rows": rows,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
