"""Sanitising, patterns and running numbers of file names.

A pattern row names seed, prompt and picture; sampler, steps, CFG, denoising and style are fixed for all rows by the
specification. The job's own prompt and negative prompt are those whose hashes the reference's rows show. A token
whose value none of these give is skipped with that reason.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest
from goldens import Case
from PIL import Image

from lightweight_engine.core.filenames import NameFacts, expand, picture_name, sanitize

JOB = {"job_prompt": "main p", "negative_prompt": "neg"}
FIXED = {"sampler": "Euler", "steps": 20, "cfg_scale": 1.0, "denoising_strength": 0.4, "styles": ("A",)}
NOT_GIVEN = {
    *("scheduler", "sampler_scheduler", "model_hash", "model_name", "vae_filename", "user", "clip_skip"),
    *("date", "datetime", "job_timestamp"),
}


def check(case: Case) -> None:
    {"sanitize": _sanitize, "pattern": _pattern, "save_sequence": _sequence}[case["kind"]](case)


def _sanitize(case: Case) -> None:
    assert sanitize(case["text"]) == case["spaces_replaced"]
    assert sanitize(case["text"], replace_spaces=False) == case["spaces_kept"]


def _pattern(case: Case) -> None:
    unknown = {token.lower() for token in re.findall(r"\[([a-z_]+)", case["pattern"], re.IGNORECASE)} & NOT_GIVEN
    if unknown:
        pytest.skip(f"the row does not give the context of {sorted(unknown)}")
    width, height, *colour = map(int, re.findall(r"\d+", case["image"]))
    image = Image.new("RGB", (width, height), tuple(colour))
    facts = NameFacts(seed=case["seed"], prompt=case["prompt"], width=width, height=height, image=image, **JOB, **FIXED)
    assert expand(case["pattern"], facts) == case["out"]


def _sequence(case: Case) -> None:
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        for row in case["calls"]:
            call = row["call"]
            unknown = set(call) - {"basename", "suffix", "extension", "seed", "prompt", "forced_filename"}
            if unknown:
                pytest.skip(f"the row does not say what {sorted(unknown)} do to the name")
            extension = call.get("extension", "png")
            name = call.get("forced_filename") or picture_name(
                folder, call.get("seed", 5), basename=call.get("basename", ""), suffix=call.get("suffix", "")
            )
            (folder / f"{name}.{extension}").touch()
            assert f"{name}.{extension}" == Path(row["file"]).name
        assert sorted(path.name for path in folder.iterdir()) == sorted(case["dir"])
