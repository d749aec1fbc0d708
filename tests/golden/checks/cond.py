"""Flux conditioning of prompts with AND, schedules and BREAK; the context is stored as float16."""

from __future__ import annotations

import json
from contextlib import nullcontext

import torch
from goldens import Case, golden_dir

from checks.text_models import text_encoders
from lightweight_engine.flux.conditioner import Conditioner, EmbeddingCache, resolve_guidance
from lightweight_engine.flux.prompt import plan_prompt


def check(case: Case) -> None:
    encoders = text_encoders()
    conditioner = Conditioner(lambda: nullcontext(encoders), "golden", EmbeddingCache(1 << 30), compat="forge")
    steps = _steps(case)
    plans = [plan_prompt(prompt, steps, compat="forge") for prompt in case["prompts"]]
    compositions = conditioner(plans, resolve_guidance(case["distilled_cfg_scale"], True, "forge"))
    structure = [
        [
            {"weight": weight, "schedule": [end for end, _ in scheduled.entries]}
            for weight, scheduled in composition.parts
        ]
        for composition in compositions
    ]
    assert structure == case["structure"]
    for b, composition in enumerate(compositions):
        for c, (_, scheduled) in enumerate(composition.parts):
            for s, (_, conditioning) in enumerate(scheduled.entries):
                name = f"b{b}.c{c}.s{s}"
                context = case.tensor(f"{name}.crossattn").float()
                atol = 5e-5 * float(context.abs().max())
                torch.testing.assert_close(conditioning.context.half().float(), context, atol=atol, rtol=2**-10)
                vector = case.tensor(f"{name}.vector").float().reshape(-1)
                torch.testing.assert_close(conditioning.pooled, vector, atol=1e-5, rtol=0)
                assert abs(conditioning.guidance - float(case.tensor(f"{name}.guidance"))) < 1e-6


def _steps(case: Case) -> int:
    """The steps that the manifest says all its cases were made with."""
    return int(json.loads((golden_dir() / "core" / "cond.json").read_text(encoding="utf-8"))["about"]["steps"])
