"""What a job takes of the GPU beside what its plan says, at full size with random weights.

    python -m benchmarks.memory

Each row is a job of 768x1344 pixels that begins with nothing loaded: storage of the transformer, VRAM state or a cap
in GiB, the plan's peak, the measured one, and a step's time. What does not fit below a cap is streamed, and the latent
must be that of the resident row, bit for bit. Then: what quantising costs while loading, and the step of diffusers in
bf16 and with bitsandbytes. Each row is printed and written as soon as it is known; ``--quick`` tries the program out on
a small model, on a CPU too, where no memory is measured.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.fullsize import SMALL, Sizes, scratch_folder, write_model
from benchmarks.observe import Clock, Observations, model_of, observed_engine
from benchmarks.report import write
from benchmarks.step import diffusers_config
from lightweight_engine.core.models import ModelSet
from lightweight_engine.core.plan import Plan
from lightweight_engine.errors import EngineError
from lightweight_engine.flux.load import Storage, load_part

GIB = 1 << 30
BF16 = torch.bfloat16

STATES = ("HIGH_VRAM", "NORMAL_VRAM", "LOW_VRAM")
SPEED = "speed=fp8"  # which decides what weights are kept as
# storage -> caps in GiB. In the order in which they are measured, as time may run out.
CAPS: dict[str, tuple[float, ...]] = {
    "nf4": (2.5, 4, 6.5),
    "bf16": (8, 12, 16, 24),
    "fp8_e4m3": (8, 12, 16, 24),
    SPEED: (6, 11),
    "gguf:Q8_0": (),
}
QUICK_CAPS: dict[str, tuple[float, ...]] = dict.fromkeys(CAPS, (0.0001, 0.35))

# Of the printed table, with their widths; the JSON has more.
COLUMNS = {
    "storage": 27, "state": 11, "cap GiB": 7, "plan GiB": 8, "measured GiB": 12, "measured/plan": 13,
    "reserved GiB": 12, "ms/step": 7, "streamed GB/step": 16, "floor ms": 8, "load s": 6, "note": 40,
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    storage: str
    state: str
    cap: float | None = None


@dataclass(frozen=True)
class Work:
    """The job that is measured: pixels and steps."""

    size: tuple[int, int]
    steps: int

    def tokens(self) -> tuple[int, int]:
        return self.size[0] // 16, self.size[1] // 16


class Report:
    """Rows as they come."""

    def __init__(self, **facts: Any) -> None:
        self.rows: list[dict[str, Any]] = []
        self.facts = facts
        print("  ".join(name.ljust(width) for name, width in COLUMNS.items()), flush=True)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        cells = (_cell(row.get(name)).ljust(width) for name, width in COLUMNS.items())
        print("  ".join(cells).rstrip(), flush=True)
        self.save()

    def save(self, **facts: Any) -> None:
        for name, value in facts.items():
            print(f"{name}: {value}", flush=True)
        self.facts.update(facts)
        write("memory_quick" if self.facts["quick"] else "memory", self.rows, **self.facts)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def settings(caps: dict[str, tuple[float, ...]], storage: str) -> Iterator[Setting]:
    for state in STATES:
        yield Setting(storage, state)
    for cap in caps[storage]:
        yield Setting(storage, "HIGH_VRAM", cap)


def measure(setting: Setting, models: ModelSet, work: Work, device: str, expected: dict[str, Tensor]) -> dict[str, Any]:
    """The row of a setting.

    Args:
        expected: the latent of each storage, kept from its first row.
    """
    row = {"storage": setting.storage, "state": setting.state, "cap GiB": setting.cap}
    kept = {"speed": "fp8"} if setting.storage == SPEED else {"storage_dtype": setting.storage}
    engine, networks = observed_engine(models, device=device, vram_state=setting.state, vram_limit=setting.cap, **kept)
    try:
        height, width = work.size
        request = engine.request(prompt="a lighthouse at dusk", width=width, height=height, steps=work.steps, seed=1)
        plan, seen = engine.plan(request), networks.observe()
        row |= planned(plan)
        latent = engine.draw(request).latent.cpu()
        networks.finish()
        row |= measured(plan, seen) | {"note": note(seen, latent, expected.setdefault(setting.storage, latent))}
    except EngineError as error:
        row["note"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    finally:
        engine.close()
    return row


def planned(plan: Plan) -> dict[str, Any]:
    """The columns of a plan."""
    sample = plan.stage("sample")
    floor = sample.floor(plan.card)
    return {
        "plan GiB": plan.peak / GIB,
        "streamed GB/step": sample.moved / 1e9,
        "floor ms": None if floor is None else floor * 1e3,
        "plan": plan.rows(),
    }


def measured(plan: Plan, seen: Observations) -> dict[str, Any]:
    """The columns of what was seen of a job, and each stage's peaks beside the plan's."""
    peak, steps = seen.peak(), seen.clock.milliseconds()
    stages = [
        {
            "stage": stage.name,
            "plan": stage.peak,
            "load": seen.peaks[stage.name, "load"].allocated if (stage.name, "load") in seen.peaks else None,
            "work": seen.peaks[stage.name, "work"].allocated,
        }
        for stage in plan.stages
        if (stage.name, "work") in seen.peaks
    ]
    return {
        "measured GiB": peak.allocated / GIB or None,
        "measured/plan": peak.allocated / plan.peak or None,
        "reserved GiB": peak.reserved / GIB or None,
        "ms/step": statistics.median(steps[1:]),  # the first one compiles and chooses algorithms
        "steps ms": steps,
        "load s": sum(seen.load_seconds.values()),
        "load seconds": seen.load_seconds,
        "stages": stages,
    }


def note(seen: Observations, latent: Tensor, expected: Tensor) -> str:
    """What a row's figures are worth."""
    faults = {
        "memory ran out, and it was done with less": len(seen.plans) > 1,
        "NOT FINITE": not bool(torch.isfinite(latent).all()),
        "ANOTHER LATENT than the first row's": not torch.equal(latent, expected),
    }
    return ", ".join(fault for fault, found in faults.items() if found)


def loading(models: ModelSet, device: torch.device, rounds: int = 2) -> dict[str, Any]:
    """Seconds from file to device of the transformer as it is and quantised to nf4 on the way, A B B A, medians."""
    ways = {"as it is": Storage("auto", BF16), "to nf4": Storage("nf4", BF16)}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    order = [*ways, *reversed(ways)] * (rounds // 2)
    for way in [*ways, *order]:
        start = time.perf_counter()
        module = load_part(models.parts["transformer"], ways[way], device=device)
        _synchronize(device)
        seconds[way].append(time.perf_counter() - start)
        del module
        _forget(device)
    medians = {way: statistics.median(times[1:]) for way, times in seconds.items()}
    gigabytes = models.parts["transformer"].nbytes / 1e9
    return {
        "seconds": medians,
        "GB/s of the file": {way: gigabytes / each for way, each in medians.items()},
        "quantising costs times": medians["to nf4"] / medians["as it is"],
    }


def peer(pack: bool, sizes: Sizes, work: Work, device: torch.device) -> dict[str, Any]:
    """The row of diffusers' transformer with random weights: one evaluation, nothing else on the device."""
    row: dict[str, Any] = {
        "storage": "diffusers + bitsandbytes nf4" if pack else "diffusers bf16",
        "state": "step only",
    }
    try:
        module = build_peer(sizes, device)
        if pack:
            pack_linears(module, device)
    except (
        ImportError,
        AttributeError,
        RuntimeError,
        OSError,
    ) as error:  # others' packages, as they are installed here
        return row | {"note": f"{type(error).__name__}: {error}"}
    inputs = peer_inputs(sizes, work, device)
    _forget(device)
    _reset_peak(device)
    clock, out = Clock(device), torch.empty(0)
    for _ in range(3 + work.steps):
        clock.mark()
        out = module(**inputs)[0]
    clock.mark()
    times = clock.milliseconds()
    row |= {"ms/step": statistics.median(times[3:]), "steps ms": times}
    row["note"] = "" if bool(torch.isfinite(out).all()) else "NOT FINITE"
    if device.type == "cuda":
        row["measured GiB"] = torch.cuda.max_memory_allocated(device) / GIB
        row["reserved GiB"] = torch.cuda.max_memory_reserved(device) / GIB
    return row


def build_peer(sizes: Sizes, device: torch.device) -> nn.Module:
    """diffusers' transformer with random weights in bf16."""
    from diffusers import FluxTransformer2DModel  # type: ignore[attr-defined]

    with torch.device("meta"):
        module: Any = FluxTransformer2DModel(**diffusers_config(sizes.transformer))
    module = module.to(BF16).to_empty(device=device).eval().requires_grad_(False)
    torch.manual_seed(0)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, parameter[0].numel() ** -0.5)
        else:
            parameter.normal_(0.0, 0.02)
    for name, parameter in module.named_parameters():
        if "norm_" in name and parameter.ndim == 1 and name.endswith(".weight"):
            parameter.add_(1.0)
    return module


def pack_linears(module: nn.Module, device: torch.device) -> None:
    """What diffusers' BitsAndBytesConfig does for nf4: every linear becomes bitsandbytes' own."""
    from bitsandbytes.nn import Linear4bit, Params4bit  # type: ignore[import-not-found]

    options: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": False}
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear:
                continue
            bias = child.bias is not None
            packed = Linear4bit(
                child.in_features, child.out_features, bias, compute_dtype=BF16, device="meta", **options
            )
            packed.weight = Params4bit(child.weight.data, requires_grad=False, **options)
            packed.bias = child.bias
            setattr(parent, name, packed.to(device))


def peer_inputs(sizes: Sizes, work: Work, device: torch.device) -> dict[str, Any]:
    params, (rows, columns), text = sizes.transformer, work.tokens(), 256
    ids = torch.zeros(rows, columns, 3, device=device)
    ids[..., 1] = torch.arange(rows, device=device)[:, None]
    ids[..., 2] = torch.arange(columns, device=device)[None]
    random = partial(torch.randn, device=device, dtype=BF16)
    return {
        "hidden_states": random(1, rows * columns, params.in_channels),
        "encoder_hidden_states": random(1, text, params.context_in_dim),
        "pooled_projections": random(1, params.vec_in_dim),
        "timestep": torch.tensor([0.7], device=device, dtype=BF16),
        "guidance": torch.tensor([3.5], device=device, dtype=BF16),
        "img_ids": ids.view(-1, 3),
        "txt_ids": torch.zeros(text, 3, device=device),
        "return_dict": False,
    }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _forget(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def run(args: argparse.Namespace, folder: Path, started: float) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = SMALL if args.quick else Sizes()
    work = Work((128, 128) if args.quick else (1344, 768), 4)
    caps = QUICK_CAPS if args.quick else CAPS
    begin = time.perf_counter()
    models = model_of(write_model(folder, sizes, device), folder)
    _forget(device)
    report = Report(
        device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        size=list(work.size),
        steps=work.steps,
        quick=args.quick,
        seconds_to_write_files=time.perf_counter() - begin,
    )
    tasks = tasks_of(args.storages, caps, models, sizes, work, device, report)
    left_out = []
    for name, task in tasks:
        if time.perf_counter() - started > 60 * args.minutes:
            left_out.append(name)
        else:
            task()
            _forget(device)
    report.save(left_out=left_out, seconds=time.perf_counter() - started)


def tasks_of(
    storages: Sequence[str], caps: dict[str, tuple[float, ...]], models: ModelSet, sizes: Sizes, work: Work,
    device: torch.device, report: Report,
) -> list[tuple[str, Callable[[], None]]]:  # fmt: skip
    """(name, what measures it) in order: the formats that matter most, loading and peers, then the other formats."""
    expected: dict[str, Tensor] = {}

    def job(setting: Setting) -> None:
        report.add(measure(setting, models, work, device.type, expected))

    jobs = {s: [(str(each), partial(job, each)) for each in settings(caps, s)] for s in storages}
    between: list[tuple[str, Callable[[], None]]] = [
        ("loading", lambda: report.save(loading=loading(models, device))),
        ("diffusers bf16", lambda: report.add(peer(False, sizes, work, device))),
        ("diffusers nf4", lambda: report.add(peer(True, sizes, work, device))),
    ]
    first, others = storages[:2], storages[2:]
    return [*(t for s in first for t in jobs[s]), *between, *(t for s in others for t in jobs[s])]


@torch.inference_mode()
def main() -> None:
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small networks, to try this program out")
    parser.add_argument("--minutes", type=float, default=4.5, help="begin nothing new after so many")
    parser.add_argument("--storages", nargs="+", choices=CAPS, default=list(CAPS), help="only these")
    parser.add_argument("--folder", type=Path, help="write the files there and leave them; else a temporary folder")
    args = parser.parse_args()
    if not args.quick and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device, and this measures one; --quick runs on a CPU")
    if args.folder:
        return run(args, args.folder, started)
    with scratch_folder() as folder:
        run(args, Path(folder), started)


if __name__ == "__main__":
    main()
