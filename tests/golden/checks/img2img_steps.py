"""How many steps image-to-image runs of how many it counts."""

from __future__ import annotations

from goldens import Case

from lightweight_engine.flux.sampling import forecast, plan
from lightweight_engine.flux.schedules import image_to_image_steps

RULES = {
    "default": ("default_calls", False),
    "fix_steps": ("fix_calls", True),
    "hires_second_pass": ("hires_calls", True),
}


def check(case: Case) -> None:
    for rule, (calls, exact) in RULES.items():
        total, last = image_to_image_steps(case["steps"], case["denoise"], exact=exact)
        assert [total, last] == case[rule], rule
        schedule = plan("Euler", "Simple", case["steps"], 1.15, strength=case["denoise"], exact=exact, compat="forge")
        foreseen = forecast(schedule)
        assert foreseen is not None
        assert len(foreseen.sigmas) == foreseen.reports == case[calls], rule
