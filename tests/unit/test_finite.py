"""Numbers that are not finite: seen at once on a CPU, and on a device once it has been told what to do next."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightweight_engine.core.finite import check_finite, settle
from lightweight_engine.errors import ModelError

GOOD, BAD = torch.ones(3), torch.tensor([1.0, float("nan")])


def networks(kind: str) -> Any:
    parts = {
        role: SimpleNamespace(checkpoint=SimpleNamespace(path=Path(f"{role}.x"))) for role in ("transformer", "t5")
    }
    return SimpleNamespace(
        device=torch.device(kind),
        unsettled=[],
        models=SimpleNamespace(own_parts=parts),
        storage=lambda role: SimpleNamespace(compute=torch.bfloat16),
    )


def test_a_cpu_sees_at_once() -> None:
    of = networks("cpu")
    check_finite(of, "transformer", [GOOD, GOOD])
    with pytest.raises(ModelError, match=r"transformer\.x: the transformer computed numbers that are not finite"):
        check_finite(of, "transformer", [GOOD, BAD])
    assert not of.unsettled


def test_a_device_goes_on_and_what_was_found_is_told_by_the_next_look() -> None:
    of = networks("cuda")  # what is looked at lies on a CPU, which changes nothing
    check_finite(of, "transformer", [BAD])
    with pytest.raises(ModelError, match="the transformer computed"):
        check_finite(of, "t5", [GOOD])
    settle(of)  # it is told once


def test_a_device_is_waited_for_where_that_is_asked() -> None:
    of = networks("cuda")
    check_finite(of, "transformer", [BAD])
    with pytest.raises(ModelError, match="the transformer computed"):
        settle(of)
    with pytest.raises(ModelError, match=r"t5\.x"):
        check_finite(of, "t5", [BAD], wait=True)
