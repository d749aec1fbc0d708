"""The reference's texts, read back with its defaults; no model or module is known, as in the reference's run."""

from __future__ import annotations

from goldens import Case

from lightweight_engine.core.infotext_parse import parse_infotext


def check(case: Case) -> None:
    assert parse_infotext(case["text"]) == case["parsed"]
