"""What a detailer's prompt becomes: parts, blanks and the main prompt, by the number of the picture."""

from __future__ import annotations

from goldens import Case

from lightweight_engine.extensions.detailer_prompts import prompts_of


def check(case: Case) -> None:
    assert list(prompts_of(case["ad_prompt"], case["all_prompts"], case["i"], "DEF")) == case["out"]
    assert list(prompts_of(case["ad_prompt"], [], case["i"], "DEF")) == case["out_no_all"]
