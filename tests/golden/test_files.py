"""Model files and storage formats: every case of ``ckpt/`` and ``quant/``.

A file of ``quant/`` has a function of its own in ``checks/quant.py``. One without fails.
"""

from __future__ import annotations

import pytest
from checks import ckpt, quant
from goldens import Case, ckpt_cases, quant_cases


@pytest.mark.parametrize("case", [pytest.param(case, id=f"{case.family}-{case.id}") for case in quant_cases()])
def test_quant(case: Case) -> None:
    quant.CHECKS[case.family](case)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in ckpt_cases()])
def test_ckpt(case: Case) -> None:
    ckpt.check(case)
