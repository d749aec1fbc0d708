"""What a request sets in vain is told."""

from __future__ import annotations

import pytest

from lightweight_engine import GenerationRequest
from lightweight_engine.core.jobs import without_effect


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"ad_prompt": "a face"}, "ad_prompt had no effect without adetailer"),
        ({"color_correction": True}, "color_correction had no effect without image"),
        ({"hr_prompt": "a cat"}, "hr_prompt had no effect without a hires pass"),
        ({"negative_prompt": "a dog"}, "negative_prompt had no effect at cfg_scale 1"),
        ({"negative_prompt": "a dog", "enable_hr": True, "hr_cfg": 1.0}, "negative_prompt had no effect"),
    ],
)
def test_fields_without_effect(fields: dict[str, object], told: str) -> None:
    (sentence,) = without_effect(GenerationRequest(**fields))
    assert sentence.startswith(told)


@pytest.mark.parametrize(
    "fields", [{}, {"cfg_scale": 2.0}, {"enable_hr": True, "hr_cfg": 3.0}], ids=["nothing", "guided", "guided in hires"]
)
def test_what_acts_is_not_told(fields: dict[str, object]) -> None:
    negative = {"negative_prompt": "a dog"} if fields else {}
    assert without_effect(GenerationRequest(**{**negative, **fields})) == []
