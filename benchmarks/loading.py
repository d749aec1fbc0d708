"""Peak memory and time of loading a random checkpoint of about 2 GB. ``python -m benchmarks.loading``

Each way of loading runs in a process of its own. Peak is the most resident memory above what the process had after
its imports, pages of the mapped file counted; every weight is read once, so that no lazily mapped page is left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.report import publish

GIGABYTE = 1_000_000_000


def write_checkpoint(path: Path, size: int) -> int:
    """A Flux checkpoint in BFL keys with random bf16 weights of about ``size`` bytes; returns its size."""
    import torch
    from safetensors.torch import save_file

    from lightweight_engine.flux.params import FluxParams
    from lightweight_engine.flux.transformer import Flux

    with torch.device("meta"):
        one = sum(p.numel() for p in Flux(FluxParams(depth=1, depth_single_blocks=1)).parameters())
        two = sum(p.numel() for p in Flux(FluxParams(depth=1, depth_single_blocks=2)).parameters())
        blocks = 1 + round((size / 2 - one) / (two - one))
        model = Flux(FluxParams(depth=1, depth_single_blocks=blocks))
    state = {key: torch.empty(t.shape, dtype=torch.bfloat16).normal_(std=0.02) for key, t in model.state_dict().items()}
    save_file(state, path)
    return path.stat().st_size


def resident(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def load_ours(path: Path) -> object:
    import torch

    from lightweight_engine.backend.checkpoint import open_checkpoint
    from lightweight_engine.flux.keymaps import find_parts
    from lightweight_engine.flux.load import Storage, load_part

    part = find_parts(open_checkpoint(path))["transformer"]
    return load_part(part, Storage("auto", torch.bfloat16), device=torch.device("cpu"))


def load_diffusers(path: Path) -> object:
    import torch
    from diffusers import FluxTransformer2DModel

    config = {
        "num_layers": 1,
        "num_single_layers": json.loads(path.with_suffix(".json").read_text())["single"],
        "guidance_embeds": True,
    }
    folder = path.parent / "config"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel", **config}))
    return FluxTransformer2DModel.from_single_file(str(path), config=str(folder), torch_dtype=torch.bfloat16)


def load_plainly(path: Path) -> object:
    """The textbook way: build, read all, copy."""
    from safetensors.torch import load_file

    from lightweight_engine.flux.params import FluxParams
    from lightweight_engine.flux.transformer import Flux

    state = load_file(path)
    model = Flux(FluxParams.from_shapes({key: tuple(tensor.shape) for key, tensor in state.items()})).bfloat16()
    model.load_state_dict(state)
    return model


WAYS = {"ours": load_ours, "diffusers from_single_file": load_diffusers, "load_file + load_state_dict": load_plainly}


def child(way: str, path: Path) -> None:
    """Load in this process and print the figures."""
    import torch
    from torch import nn

    import lightweight_engine.flux.load  # noqa: F401

    if way.startswith("diffusers"):
        from diffusers import FluxTransformer2DModel  # noqa: F401
    torch.set_grad_enabled(False)
    baseline = resident("VmRSS")
    start = time.perf_counter()
    model = WAYS[way](path)
    seconds = time.perf_counter() - start
    assert isinstance(model, nn.Module)
    checksum = sum(float(parameter.view(-1)[::1024].float().sum()) for parameter in model.parameters())
    print(json.dumps({"seconds": seconds, "peak": resident("VmHWM") - baseline, "checksum": checksum}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=float, default=2.0, help="gigabytes")
    parser.add_argument("--child", nargs=2)
    args = parser.parse_args()
    if args.child:
        return child(args.child[0], Path(args.child[1]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.safetensors"
        size = write_checkpoint(path, int(args.size * GIGABYTE))
        from lightweight_engine.backend.checkpoint import open_checkpoint
        from lightweight_engine.flux.params import FluxParams

        single = FluxParams.from_shapes(open_checkpoint(path).shapes).depth_single_blocks
        path.with_suffix(".json").write_text(json.dumps({"single": single}))
        rows, checksums = [], set()
        for way in WAYS:
            command = [sys.executable, "-m", "benchmarks.loading", "--child", way, str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            figures = json.loads(done.stdout.splitlines()[-1])
            checksums.add(round(figures["checksum"], 3))
            rows.append(
                {
                    "way": way,
                    "seconds": figures["seconds"],
                    "peak_gb": figures["peak"] / GIGABYTE,
                    "peak_over_file": figures["peak"] / size,
                }
            )
    publish("loading", rows, file_gb=size / GIGABYTE)


if __name__ == "__main__":
    main()
