"""How much of a LoRA's change survives on each storage format: beside the weights, and merged into them.

    python -m benchmarks.lora_effect

For every linear of the demonstration model's transformer: a LoRA whose change is 0.3, 1 or 3 % of the weight's norm,
seen by random inputs, in float32. *Beside* is the largest relative difference between what it changes there and what it
changes in plain numbers. *Merged* is the share of the wanted change that is left when it is added to the stored weight,
which is then rounded to its format again: <applied, wanted> / <wanted, wanted>, of all linears together.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import publish
from lightweight_engine.backend.linear import numbers
from lightweight_engine.backend.lora import Change
from lightweight_engine.backend.lora_algorithms import LowRank
from lightweight_engine.backend.lora_layers import attach
from lightweight_engine.backend.quantize import quantize
from lightweight_engine.core.models import TINY, ModelLibrary
from lightweight_engine.flux.load import PLAIN, Storage, load_part

STORAGES = ("bf16", "fp8_e4m3", "fp8_e5m2", "gguf:Q8_0", "gguf:Q5_0", "nf4", "fp4", "gguf:Q4_0")
SHARES = (0.003, 0.01, 0.03)
RANK, PROBES = 16, 32
CPU = torch.device("cpu")


def change_of(weight: Tensor, share: float, seed: int) -> Change:
    """A LoRA's change whose norm is a share of the weight's."""
    draw = torch.Generator().manual_seed(seed)
    down = torch.randn(RANK, weight.shape[1], generator=draw)
    up = torch.randn(weight.shape[0], RANK, generator=draw)
    return Change(LowRank(down, up, share * float(weight.norm() / (up @ down).norm())))


def rounded(weight: Tensor, storage: str) -> Tensor:
    """A weight in a format, as numbers."""
    if storage in PLAIN:
        return weight.to(PLAIN[storage]).float()
    return quantize(weight, storage).dequantize(torch.float32)


@torch.no_grad()
def row(storage: str, share: float) -> dict[str, Any]:
    part = ModelLibrary([TINY]).choose().parts["transformer"]
    exact = load_part(part, Storage("fp32", torch.float32), device=CPU)
    stored = load_part(part, Storage(storage, torch.float32), device=CPU)
    worst, kept, whole, linears = 0.0, 0.0, 0.0, 0
    for seed, (name, module) in enumerate(exact.named_modules()):
        if not isinstance(module, torch.nn.Linear):
            continue
        held = stored.get_submodule(name)
        change = change_of(module.weight, share, seed)
        wanted = change.delta.change(module.weight, 1.0)
        x = torch.randn(PROBES, module.in_features, generator=torch.Generator().manual_seed(seed))
        before = held(x)
        attached = attach(stored, {f"{name}.weight": [(change, 1.0)]}, device=CPU, dtype=torch.float32)
        seen, expected = held(x) - before, x @ wanted.T
        attached.close()
        worst = max(worst, float((seen - expected).norm() / expected.norm()))
        base = numbers(held, torch.float32, CPU)  # type: ignore[arg-type]
        applied = rounded(base + wanted, storage) - base
        kept, whole = kept + float((applied * wanted).sum()), whole + float((wanted * wanted).sum())
        linears += 1
    return {
        "storage": storage,
        "change / weight": share,
        "linears": linears,
        "beside: worst difference": worst,
        "merged: share kept": kept / whole,
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    publish("lora_effect", [row(storage, share) for storage in STORAGES for share in SHARES])


if __name__ == "__main__":
    main()
