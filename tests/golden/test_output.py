"""Infotext, its parser, quoting, file names, metadata and the pixel-side random source, against ``pipelines/``.

Each family has a module ``checks/<family>.py`` with one function ``check(case)``.
"""

from __future__ import annotations

import importlib

import pytest
from goldens import Case, pipeline_cases

FAMILIES = ("rng", "infotext", "infotext_parse", "quote", "filenames", "metadata")


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=f"{family}-{case.id}") for family in FAMILIES for case in pipeline_cases(family)]
)
def test_output(case: Case) -> None:
    importlib.import_module(f"checks.{case.family}").check(case)
