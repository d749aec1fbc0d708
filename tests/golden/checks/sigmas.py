"""Sigma lists: scheduler x steps x model, a sampler's own default, option overrides, errors."""

from __future__ import annotations

import contextlib
import math

import pytest
from goldens import Case

from lightweight_engine.errors import EngineError
from lightweight_engine.flux.schedules import ScheduleOptions, make_sigmas
from lightweight_engine.labels import resolve_sampler

MU = {"flux-dev": 1.15, "flux-schnell": 1.0}
OPTION_NAMES = {
    "sigma_min": "sigma_min",
    "sigma_max": "sigma_max",
    "rho": "rho",
    "beta_dist_alpha": "beta_alpha",
    "beta_dist_beta": "beta_beta",
    "use_old_karras_scheduler_sigmas": "use_old_karras",
    "always_discard_next_to_last_sigma": "always_discard_next_to_last",
}


def schedule_options(options: dict[str, float] | None) -> ScheduleOptions:
    return ScheduleOptions(**{OPTION_NAMES[key]: value for key, value in (options or {}).items()})


def check(case: Case) -> None:
    sampler, scheduler = resolve_sampler(case["sampler"], case["scheduler"], "forge")
    options = schedule_options(case.get("options"))
    mu = case.get("mu", MU[case["model"]])
    if "sigmas" not in case.data:  # the reference raises: ours says so in an error of its own, or has sane values
        with contextlib.suppress(EngineError):
            sigmas = make_sigmas(scheduler, case["steps"], mu, sampler=sampler, options=options)
            assert sigmas and all(map(math.isfinite, sigmas))
        return
    sigmas = make_sigmas(scheduler, case["steps"], mu, sampler=sampler, options=options)
    assert sigmas == pytest.approx(case["sigmas"], rel=3e-6, abs=0)
