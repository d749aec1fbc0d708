"""Model files and storage formats: every case of ``quant/``.

A file of ``quant/`` has a function of its own in ``checks/quant.py``. One without fails.
"""

from __future__ import annotations

import pytest
from checks import quant
from goldens import Case, quant_cases


@pytest.mark.parametrize("case", [pytest.param(case, id=f"{case.family}-{case.id}") for case in quant_cases()])
def test_quant(case: Case) -> None:
    quant.CHECKS[case.family](case)
