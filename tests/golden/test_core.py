"""Every case that the manifests under ``core/`` list, at the stated tolerances.

Each family has a module ``checks/<family>.py`` with one function ``check(case)``. A family without one fails.
"""

from __future__ import annotations

import importlib

import pytest
from goldens import Case, core_cases, core_families


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=f"{family}-{case.id}") for family in core_families() for case in core_cases(family)]
)
def test_core(case: Case) -> None:
    importlib.import_module(f"checks.{case.family}").check(case)
