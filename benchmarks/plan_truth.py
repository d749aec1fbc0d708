"""Is a memory plan true on the CPU? ``python -m benchmarks.plan_truth``

Each row is a job in a fresh process: the most memory that was resident above what was after importing, beside the
plan's peak. Files are random models of middling size and ``tiny``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from benchmarks.report import publish

MIB = 1 << 20

# name -> (model, settings, fields of the request)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "tiny": ("tiny", {}, {"width": 256, "height": 256}),
    "tiny 768": ("tiny", {}, {"width": 768, "height": 768}),
    "tiny 320": ("tiny", {}, {"width": 320, "height": 320}),
    "tiny wide": ("tiny", {}, {"width": 1024, "height": 512}),
    "tiny tall": ("tiny", {}, {"width": 448, "height": 896}),
    "tiny nf4": ("tiny", {"storage_dtype": "nf4"}, {"width": 512, "height": 512}),
    "middling fp32": ("middling", {}, {"width": 384, "height": 384}),
    "middling fp32 high": ("middling", {}, {"width": 384, "height": 640}),
    "middling nf4": ("middling", {"storage_dtype": "nf4"}, {"width": 384, "height": 384}),
    "middling nf4 wide": ("middling", {"storage_dtype": "nf4"}, {"width": 512, "height": 320}),
    "middling fp8": ("middling", {"storage_dtype": "fp8_e4m3"}, {"width": 384, "height": 384, "cfg_scale": 2.0}),
    "middling bf16 decoder": ("middling", {"vae_dtype": "bf16"}, {"width": 256, "height": 192}),
    "middling in turn": ("middling", {"vram_state": "LOW_VRAM"}, {"width": 384, "height": 384}),
    "middling streamed": (
        "middling",
        {"vram_state": "NO_VRAM", "compute_dtype": "bf16"},
        {"width": 384, "height": 384},
    ),
    "middling two at once": ("middling", {"storage_dtype": "gguf:Q8_0"}, {"width": 256, "height": 256,
                                                                        "num_outputs": 2, "batch_size": 2}),
}  # fmt: skip


def make_middling(folder: Path) -> None:
    """A random family of 0.6 GB in the layouts of users' files."""
    import torch
    from safetensors.torch import save_file

    from lightweight_engine.flux.load import NETWORKS
    from lightweight_engine.flux.params import AutoencoderParams, CLIPParams, FluxParams, T5Params

    sizes = {
        "transformer": FluxParams(hidden_size=1024, mlp_hidden=4096, num_heads=8, depth=5, depth_single_blocks=10,
                                  context_in_dim=640, vec_in_dim=384),
        "t5": T5Params(vocab_size=2048, hidden_size=640, num_layers=12, num_heads=10, head_dim=64, mlp_hidden=1280),
        "clip": CLIPParams(vocab_size=2048, hidden_size=384, num_layers=4, num_heads=6, mlp_hidden=1024),
        "autoencoder": AutoencoderParams(widths=(64, 128, 256, 256)),
    }  # fmt: skip
    places = {"transformer": "Stable-diffusion", "t5": "text_encoder", "clip": "text_encoder", "autoencoder": "VAE"}
    torch.manual_seed(0)
    for role, params in sizes.items():
        module = NETWORKS[role][1](params).to(torch.bfloat16)  # type: ignore[index]
        target = folder / places[role]
        target.mkdir(exist_ok=True)
        save_file(module.state_dict(), target / f"{role}.safetensors")


def resident(field: str = "VmRSS") -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


class Peak(threading.Thread):
    """The most that was resident, by the kernel's own high-water mark, and for each stage by looking often."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.stage, self.stages, self.over = "load", {}, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.002):
            self.stages[self.stage] = max(self.stages.get(self.stage, 0), resident())


def measure(name: str, models_dir: Path) -> dict[str, Any]:
    """One job in this process."""
    import torch

    from lightweight_engine import Config, LightweightEngine

    model, settings, fields = CASES[name]
    torch.ones(8, 8) @ torch.ones(8, 8)  # libraries that torch loads at first use
    folder = models_dir if model == "middling" else models_dir / "none"
    with tempfile.TemporaryDirectory() as cache:
        tokenizers = (str(Path(__file__).resolve().parents[1] / "lightweight_engine" / "tiny"),)
        config = Config(cache_dir=cache, device="cpu", offline=True, tokenizer_dirs=tokenizers, **settings,
                        **({"models_dir": folder} if model == "middling" else {}))  # fmt: skip
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = resident()
        engine = LightweightEngine(config)
        engine.setup()
        request = engine.request(prompt="a smiling woman with red hair", steps=2, seed=1, **fields)
        plan = engine.plan(request)
        peak = Peak()
        peak.start()
        engine.run(request, on_progress=lambda progress: setattr(peak, "stage", progress.stage))
        peak.over.set()
        measured = resident("VmHWM") - before
    stages = {row["stage"]: row["peak"] for row in plan.rows()}
    return {
        "case": name,
        "plan_mib": plan.peak / MIB,
        "measured_mib": measured / MIB,
        "measured_over_plan": measured / plan.peak,
        "stages": {s: [stages[s] / MIB, (peak.stages.get(s, 0) - before) / MIB] for s in stages},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", help="measure one, in this process, and print it as JSON")
    parser.add_argument("--models-dir", type=Path)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(args.case, args.models_dir)))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_middling(Path(folder))
        command = [sys.executable, "-m", "benchmarks.plan_truth", "--models-dir", folder, "--case"]
        rows = []
        for name in CASES:
            done = subprocess.run([*command, name], capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"error: {name}: {done.stderr[-2000:]}")
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    publish("plan_truth", [{k: v for k, v in row.items() if k != "stages"} for row in rows],
            stages_plan_and_measured_mib={row["case"]: row["stages"] for row in rows})  # fmt: skip


if __name__ == "__main__":
    main()
