"""Text-to-image through every sampler: the sigmas, the sequence of calls, and the latent."""

from __future__ import annotations

import torch
from fake_flux import MU, FakeFlux, assert_walk, guided, image_noise, sampler_options, schedule_options
from goldens import Case

from lightweight_engine.flux.sampling import plan, run
from lightweight_engine.labels import resolve_sampler


@torch.inference_mode()
def check(case: Case) -> None:
    sampler, scheduler = resolve_sampler(case["sampler"], case["scheduler"], "forge")
    schedule = plan(
        sampler, scheduler, case["steps"], MU[case["model"]], options=schedule_options(case), compat="forge"
    )
    noise, network = image_noise(case), FakeFlux(case)
    state = torch.get_rng_state()
    first = noise.first()
    torch.testing.assert_close(first, case.tensor("noise"), rtol=0, atol=1e-6)
    x = schedule.start(first)
    final = run(schedule, guided(case, network), x, noise, lambda i, x, denoised: None, sampler_options(case))
    torch.set_rng_state(state)
    sigmas = case.get("sigmas")
    if isinstance(sigmas, dict):
        assert list(schedule.levels)[::-1] == sigmas["timesteps"]
    assert_walk(case, schedule, network, final, sigmas)
