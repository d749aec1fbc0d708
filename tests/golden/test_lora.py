"""LoRA files of every dialect and algorithm: what each changes in the networks, and which are refused."""

from __future__ import annotations

import pytest
from checks import lora
from goldens import Case, lora_cases


@pytest.mark.parametrize("case", [pytest.param(case, id=f"{case.id}@{case['strength']}") for case in lora_cases()])
def test_lora(case: Case) -> None:
    lora.check(case)
