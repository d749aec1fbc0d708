"""How a step grows with the picture, with pictures at once and with LoRAs: ``python -m benchmarks.gpu_sweep``

Random weights of the published size on a GPU, 512 text tokens, in 16 and in 8 bits. Arithmetic is counted; a row says
what a picture takes beside what its share of it would let expect, from the row of 768x1344.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from benchmarks.fullsize import SMALL
from benchmarks.gpu import BF16, Step, Task, in_format, in_turn, packed, random_changes, random_model
from benchmarks.report import publish, write
from lightweight_engine.backend import eight_bit
from lightweight_engine.backend.lora_layers import attach
from lightweight_engine.backend.quantize import ROWS
from lightweight_engine.core.describe import device_name
from lightweight_engine.flux.footprint import step_flops
from lightweight_engine.flux.params import FluxParams
from lightweight_engine.flux.transformer import Flux

SIZES = ((512, 512), (768, 768), (1024, 1024), (1344, 768), (1536, 1536), (2688, 1536))
"""Height and width; the last has four times the pixels of the fourth."""
USUAL = (1344, 768)
BATCHES = (1, 2, 4)
RANKS = (16, 64, 128)


def cases(task: Task, model: Flux) -> Iterator[tuple[dict[str, Any], Step]]:
    """What each row is, and its step."""
    kinds = {"bf16": model}
    if eight_bit.available(task.device):
        kinds["fp8"] = packed(model, task.params, in_format(model, ROWS))
    for kind, network in kinds.items():
        for height, width in SIZES:
            sized = replace(task, rows=height // 16, columns=width // 16)
            for batch in BATCHES if (height, width) == USUAL else (1,):
                yield _row(sized, kind, batch, 0), sized.ours(network, batch)
        for rank in RANKS:
            changed = (
                packed(model, task.params, in_format(model, ROWS)) if kind == "fp8" else packed(model, task.params, {})
            )
            attach(changed, random_changes(model, rank), device=task.device, dtype=BF16)
            yield _row(task, kind, 1, rank), task.ours(changed)


def _row(task: Task, kind: str, batch: int, rank: int) -> dict[str, Any]:
    size = f"{task.columns * 16}x{task.rows * 16}"
    flops = step_flops(task.params, 1, task.tokens, task.text)
    return {"products in": kind, "size": size, "at once": batch, "LoRA rank": rank, "TFLOP": flops / 1e12}


def finished(row: dict[str, Any], times: list[float], usual: tuple[float, float]) -> dict[str, Any]:
    """The row with what a picture takes; ``usual``: milliseconds and TFLOP of 768x1344."""
    taken = statistics.median(times) / row["at once"]
    expected = usual[0] * row["TFLOP"] / usual[1]
    return {**row, "ms": taken, "TFLOP/s": row["TFLOP"] / taken * 1e3, "x expected": taken / expected}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--small", action="store_true", help="a small network: whether it runs")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("a GPU is needed")
    device = torch.device("cuda")
    task = Task(SMALL.transformer if args.small else FluxParams(), USUAL[0] // 16, USUAL[1] // 16, 512, device)
    known = list(cases(task, random_model(task.params, device)))
    name, rows = "gpu_sweep_small" if args.small else "gpu_sweep", []
    for times in in_turn({str(number): step for number, (_, step) in enumerate(known)}, args.rounds):
        usual = {
            row["products in"]: (statistics.median(times[str(number)]), row["TFLOP"])
            for number, (row, _) in reversed(list(enumerate(known)))
            if (row["size"], row["at once"], row["LoRA rank"]) == ("768x1344", 1, 0)
        }
        rows = [finished(row, times[str(i)], usual[row["products in"]]) for i, (row, _) in enumerate(known)]
        write(name, rows, device=device_name(device))
    publish(name, rows, device=device_name(device))


if __name__ == "__main__":
    main()
