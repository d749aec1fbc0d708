"""Quoting of values with commas, colons or line ends, and back."""

from __future__ import annotations

from goldens import Case

from lightweight_engine.core.infotext import quote
from lightweight_engine.core.infotext_parse import unquote


def check(case: Case) -> None:
    if "text" in case.data:
        assert unquote(case["text"]) == case["unquoted"]
    else:
        assert quote(case["value"]) == case["quoted"]
