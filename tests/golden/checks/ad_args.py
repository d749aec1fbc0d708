"""What the arguments of a pass are read as, which are refused, and what they add to the infotext."""

from __future__ import annotations

import pytest
from goldens import Case

from lightweight_engine.errors import RequestError
from lightweight_engine.extensions.detailer_args import read_args
from lightweight_engine.extensions.detailer_infotext import infotext_of


def check(case: Case) -> None:
    if not case["ok"]:
        with pytest.raises(RequestError):
            read_args(case["input"], "args")
        return
    args = read_args(case["input"], "args")
    dump = args.model_dump()
    assert dump == case["dump"] and list(dump) == list(case["dump"])
    assert {name: type(value) for name, value in dump.items()} == {n: type(v) for n, v in case["dump"].items()}
    assert args.is_skipped == case["need_skip"] and args.is_mediapipe == case["is_mediapipe"]
    for number, expected in enumerate((case["extra_tab1"], case["extra_tab2"])):
        found = infotext_of(args, number)
        assert found == expected and list(found) == list(expected)
