"""What it costs to change LoRAs, and to draw with them.

    python -m benchmarks.lora_swap

On a CPU: the demonstration model and five LoRAs of over 10 MB, changed 200 times; the time of a change, and what is
left in memory and of open files. On a GPU: full-size random weights and LoRAs of rank 64 on every linear of the blocks;
the time of a change, a step with and without, and the peak beside the plan's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.fullsize import SMALL, Entry, Sizes, draw, scratch_folder, shapes_of, write_model, write_safetensors
from benchmarks.observe import Observed, model_of, observed_engine
from benchmarks.report import publish, spread
from lightweight_engine import Config, LightweightEngine
from lightweight_engine.backend.processes import resident_bytes
from lightweight_engine.core.loras import lora_manager
from lightweight_engine.core.models import TINY, ModelLibrary
from lightweight_engine.flux.params import Shapes
from lightweight_engine.lora_spec import LoraSpec

SWAPS, SETTLED = 200, 50
MIB = 1 << 20


def write_lora(path: Path, shapes: Shapes, rank: int, dtype: torch.dtype, device: torch.device) -> Path:
    """Random factors in kohya's names for every linear of the blocks; a change of about 1 % of the weights' norm."""
    entries: dict[str, Entry] = {}
    for name, shape in shapes.items():
        if len(shape) != 2 or "blocks" not in name:
            continue
        alias = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        sizes = {f"{alias}.lora_down.weight": (rank, shape[1]), f"{alias}.lora_up.weight": (shape[0], rank)}
        for key, size in sizes.items():
            entries[key] = Entry(dtype, size, partial(draw, path.stem + key, size, dtype, device))
        entries[f"{alias}.alpha"] = Entry(torch.float32, (1,), partial(torch.full, (1,), 0.1 * rank))
    write_safetensors(path, entries)
    return path


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def on_cpu(folder: Path) -> dict[str, Any]:
    """Many changes on the demonstration model."""
    shapes = ModelLibrary([TINY]).choose().parts["transformer"].shapes
    names = [f"lora{number}" for number in range(5)]
    sizes = [
        write_lora(folder / "Lora" / f"{name}.safetensors", shapes, 64, torch.float32, torch.device("cpu"))
        .stat()
        .st_size
        for name in names
    ]
    engine = LightweightEngine(Config(models_dir=folder, device="cpu", offline=True))
    engine.setup()
    networks = engine.networks
    before, times, memory = open_files(), [], []
    for swap in range(SWAPS):
        start = time.perf_counter()
        networks.adapt(engine.loras.use([LoraSpec(name=names[swap % 5])]))
        networks.load("transformer")
        times.append(1e3 * (time.perf_counter() - start))
        memory.append(resident_bytes())
    return {
        "MB each": min(sizes) / 1e6,
        "swaps": SWAPS,
        "ms a swap": spread(times[SETTLED:]),
        f"MiB grown after the first {SETTLED}": (memory[-1] - memory[SETTLED - 1]) / MIB,
        "files left open": open_files() - before,
    }


def on_gpu(folder: Path, storage: str, residency: str, device: torch.device, size: tuple[int, int]) -> dict[str, Any]:
    """Changes, steps and peaks at full size."""
    models = model_of({role: folder / path for role, path in _paths(folder).items()}, folder)
    engine, networks = observed_engine(
        models, device=device.type, storage_dtype=storage, residency=residency, models_dir=folder
    )
    ask = partial(engine.request, prompt="a lighthouse", height=size[0], width=size[1], steps=4, seed=1)
    row: dict[str, Any] = {"storage": storage, "residency": residency}
    steps: dict[str, list[float]] = {"none": [], "one": []}
    for name in ("none", "one", "one", "none", "none", "one"):
        request = ask(loras=() if name == "none" else (name,))
        plan, seen = engine.plan(request), networks.observe()
        engine.draw(request)
        networks.finish()
        steps[name] += seen.clock.milliseconds()[1:]
        if name == "one":
            row |= {"plan GiB": plan.peak / (1 << 30), "measured GiB": seen.peak().allocated / (1 << 30)}
            row["lora GiB"] = plan.stage("sample").adapters.get("transformer", 0) / (1 << 30)
            row["at hand GiB"] = plan.placed("transformer").at_hand / (1 << 30)
    row |= {f"ms a step, {name}": statistics.median(times) for name, times in steps.items()}
    row["step ratio"] = row["ms a step, one"] / row["ms a step, none"]
    row["s a swap"] = spread(_swaps(engine, networks, device))
    engine.close()
    return row


def _swaps(engine: LightweightEngine, networks: Observed, device: torch.device) -> list[float]:
    manager = lora_manager(engine.config, networks.models)
    sets = [manager.use([LoraSpec(name=name)]) for name in ("one", "two")]
    times = []
    for swap in range(8):
        _synchronize(device)
        start = time.perf_counter()
        networks.adapt(sets[swap % 2])
        networks.load("transformer")
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return times[1:]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _paths(folder: Path) -> dict[Any, str]:
    from benchmarks.fullsize import PATHS

    return {role: path for role, path in PATHS.items() if (folder / path).exists()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storages", nargs="*", default=["bf16", "nf4", "fp8_e4m3"])
    parser.add_argument("--quick", action="store_true", help="the GPU's part on a small model, on a CPU too")
    parser.add_argument("--residencies", nargs="*", default=["stored", "fast"])
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with scratch_folder() as name:
        folder = Path(name)
        if device.type == "cpu" and not args.quick:
            publish("lora_swap_cpu", [on_cpu(folder)])
            return
        sizes = SMALL if args.quick else Sizes()
        write_model(folder, sizes, device)
        shapes = shapes_of("transformer", sizes.transformer)
        for lora in ("one", "two"):
            path = write_lora(folder / "Lora" / f"{lora}.safetensors", shapes, 64, torch.bfloat16, device)
        size = (128, 128) if args.quick else (1344, 768)
        rows = [
            on_gpu(folder, storage, residency, device, size)
            for storage in args.storages
            for residency in args.residencies
        ]
        name = "lora_swap_quick" if args.quick else "lora_swap"
        publish(name, rows, lora_bytes=path.stat().st_size, device=_name(device))


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "cpu"


if __name__ == "__main__":
    main()
