"""What a LoRA file changes in small networks, against the real loaders: products of each change with two vectors."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import torch
from goldens import Case, unpacked
from safetensors.torch import load_file
from torch import Tensor

from lightweight_engine.backend.lora import Change, merged, side_branch, widened
from lightweight_engine.backend.model_files import open_model
from lightweight_engine.errors import AdapterError
from lightweight_engine.flux.keymaps import Part, Role, find_parts
from lightweight_engine.flux.lora_files import LoraFile, read_lora
from lightweight_engine.flux.params import Shapes

TOLERANCE = 1e-4  # of the largest value of a vector

# Network -> what its parameters are called in the expectations.
PREFIXES: dict[Role, str] = {"transformer": "", "clip": "TE|clip_l.transformer.", "t5": "TE|t5xxl.transformer."}


@cache
def base_parts(golden: Path) -> dict[Role, Part]:
    """The networks that the expectations were made on."""
    files = ("bfl_bf16.safetensors", "tiny_text_encoders_f32.safetensors")
    return {
        role: part for file in files for role, part in find_parts(open_model(unpacked(golden / "ckpt" / file))).items()
    }


def check(case: Case) -> None:
    golden = case.folder.parent
    parts = base_parts(golden)
    shapes: dict[Role, Shapes] = {role: part.shapes for role, part in parts.items()}
    checkpoint = open_model(golden / case["file"])
    if case["expect_refusal"]:
        with pytest.raises(AdapterError) as error:
            read_lora(checkpoint, shapes, compat="forge")
        assert checkpoint.path.name in str(error.value)
        assert _letters(_family(case)) in _letters(str(error.value).partition(" is ")[2].partition(" (")[0])
        return
    lora = read_lora(checkpoint, shapes, compat="forge")
    _check_report(case, lora)
    _check_changes(case, lora, parts, load_file(golden / case["expected"]))


def _family(case: Case) -> str:
    """The model family of a file that must be refused, from its name: ``neg_sdxl``."""
    return case["name"].removeprefix("neg_").partition("_")[0]


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def _check_report(case: Case, lora: LoraFile) -> None:
    patches = lora.report.patches
    assert patches.get("transformer", 0) == case["unet_patch_entries"]
    assert patches.get("clip", 0) + patches.get("t5", 0) == case["n_te_params_changed"]
    ignored = sum(len(row.names) for row in lora.report.ignored)
    assert ignored <= (case["comfy_asis"].get("unmatched") or 0)
    assert lora.report.applied == lora.report.found or ignored


def _check_changes(case: Case, lora: LoraFile, parts: dict[Role, Part], expected: dict[str, Tensor]) -> None:
    changed: dict[str, tuple[Role, str]] = {
        PREFIXES[role] + parameter: (role, parameter)
        for role, parameters in lora.changes.items()
        for parameter in parameters
    }
    assert sorted(changed) == sorted(case["params"])
    for name, (role, parameter) in changed.items():
        stored = parts[role].sources[parameter].read()
        assert isinstance(stored, Tensor)
        base = stored.float()
        changes = [(change, case["strength"]) for change in lora.changes[role][parameter]]
        result = merged(base, changes)
        assert list(result.shape) == case["params"][name]["shape"], name
        wide = widened(base, [change for change, _ in changes])
        if result.dim() == 1:
            _close(f"{name}|full", result.double(), expected)
        else:
            _compare(name, result.double() - wide.double(), expected)
            _check_branch(name, wide, result, changes)


def _compare(name: str, delta: Tensor, expected: dict[str, Tensor]) -> None:
    u = torch.cos(0.7 * torch.arange(delta.shape[0], dtype=torch.float64) + 0.3)
    v = torch.sin(1.3 * torch.arange(delta.shape[1], dtype=torch.float64) + 0.1)
    _close(f"{name}|delta@v", delta @ v, expected)
    _close(f"{name}|u@delta", u @ delta, expected)


def _close(key: str, found: Tensor, expected: dict[str, Tensor]) -> None:
    wanted = expected[key].double()
    assert (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max(), key


def _check_branch(name: str, base: Tensor, result: Tensor, changes: list[tuple[Change, float]]) -> None:
    """Where every change has a side branch, all of them joined do what the merged matrix does."""
    branch = side_branch(changes, (base.shape[0], base.shape[1]), lambda: base)
    if branch is None:
        return
    x = torch.sin(torch.arange(3 * base.shape[1], dtype=torch.float32)).view(3, -1)
    wanted = x @ result.T
    assert (branch(x, x @ base.T) - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name
