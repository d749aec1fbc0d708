"""Image-to-image on latents: where a pass enters, what it starts from, masks, hires-style steps."""

from __future__ import annotations

import torch
from fake_flux import MU, FakeFlux, assert_walk, guided, image_noise, options_of, sampler_options, schedule_options
from goldens import Case

from lightweight_engine.flux.guidance import Inpainting
from lightweight_engine.flux.sampling import plan, run
from lightweight_engine.flux.schedules import image_to_image_steps
from lightweight_engine.labels import resolve_sampler


@torch.inference_mode()
def check(case: Case) -> None:
    sampler, scheduler = resolve_sampler(case["sampler"], case["scheduler"], "forge")
    exact = "explicit steps" in case.get("mode", "") or bool(options_of(case).get("img2img_fix_steps"))
    strength, mu = case["denoising_strength"], MU[case["model"]]
    assert image_to_image_steps(case["steps"], strength, exact=exact) == (case["internal_steps"], case["t_enc"])
    schedule = plan(
        sampler,
        scheduler,
        case["steps"],
        mu,
        options=schedule_options(case),
        strength=strength,
        exact=exact,
        compat="forge",
    )
    noise, network = image_noise(case), FakeFlux(case)
    state = torch.get_rng_state()
    first, init = noise.first(), case.common("init")[: case["batch"]]
    torch.testing.assert_close(first, case.tensor("noise"), rtol=0, atol=1e-6)
    x = schedule.start(
        first,
        init,
        noise_multiplier=case["initial_noise_multiplier"],
        extra_noise=options_of(case).get("img2img_extra_noise", 0.0),
    )
    denoise = guided(case, network)
    painted = Inpainting(denoise, init, case.common("mask"), noise.side()) if case["masked"] else None
    final = run(schedule, painted or denoise, x, noise, lambda i, x, denoised: None, sampler_options(case))
    torch.set_rng_state(state)
    assert_walk(case, schedule, network, painted.blend(final) if painted else final, case.get("sigma_sched"))
