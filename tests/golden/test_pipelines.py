"""Second passes, detection and the detailer, against ``pipelines/``: every family that is not tested elsewhere.

A family's check is the function ``check(case)`` of ``checks/<family>.py``. A family without one fails.
"""

from __future__ import annotations

import importlib

import pytest
from goldens import Case, pipeline_cases, pipeline_families

ELSEWHERE = {
    "rng": "test_output",
    "infotext": "test_output",
    "infotext_parse": "test_output",
    "quote": "test_output",
    "filenames": "test_output",
    "metadata": "test_output",
    "api_models": "test_api",
    "api_validation": "test_api",
}
FAMILIES = [family for family in pipeline_families() if family not in ELSEWHERE]


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=f"{family}-{case.id}") for family in FAMILIES for case in pipeline_cases(family)]
)
def test_pipelines(case: Case) -> None:
    importlib.import_module(f"checks.{case.family}").check(case)
