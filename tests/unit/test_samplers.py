"""Samplers: what they solve, what they ask, what they add, and how a pass is run."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightweight_engine import labels
from lightweight_engine.errors import RequestError
from lightweight_engine.flux import samplers
from lightweight_engine.flux.noise import ImageNoise
from lightweight_engine.flux.sampler_parts import AfterStep, Denoise, ancestral_step, flow_ancestral_step
from lightweight_engine.flux.samplers_ode import deis_weights, ipndm_v_weights, lms_weights
from lightweight_engine.flux.samplers_stochastic import restart_steps
from lightweight_engine.flux.sampling import SamplerOptions, Schedule, forecast, guess, plan, run

DEV = 1.15
SHAPE = (16, 4, 4)
VALID = labels.sampler_labels()
SCHEDULES = [label for label in labels.scheduler_labels() if label != "Automatic"]
ODE = ("Euler", "Heun", "DPM2", "LMS", "DPM++ 2M", "HeunPP2", "IPNDM", "DEIS")
ADDS_NOISE = ("Euler a", "DPM2 a", "DPM++ 2S a", "DPM++ SDE", "DPM++ 2M SDE", "DPM++ 3M SDE", "DPM fast")


def quiet(step: int, x: Tensor, denoised: Tensor) -> None:
    pass


def gaussian(x: Tensor, sigma: float, spread: float = 0.5) -> Tensor:
    """The best guess for pictures that are normal with this spread, under x = (1 - sigma) picture + sigma noise."""
    kept = (1 - sigma) * spread**2
    return x * kept / ((1 - sigma) * kept + sigma**2)


def noise_for(*seeds: int) -> ImageNoise:
    return ImageNoise(SHAPE, seeds or (1,), source="CPU")


def walk(schedule: Schedule, *seeds: int, options: SamplerOptions | None = None) -> Tensor:
    noise = noise_for(*seeds)
    return run(schedule, gaussian, schedule.start(noise.first()), noise, quiet, options)


def test_labels_and_functions_are_the_same_set() -> None:
    assert set(samplers.SAMPLERS) == set(labels.SAMPLERS)


@pytest.mark.parametrize("sampler", VALID)
@pytest.mark.parametrize("steps", [1, 2, 3, 21])
def test_every_valid_pair_makes_a_finite_latent(sampler: str, steps: int) -> None:
    for scheduler in SCHEDULES:
        assert walk(plan(sampler, scheduler, steps, DEV)).isfinite().all(), scheduler


@pytest.mark.parametrize("sampler", ODE)
def test_ode_samplers_reach_the_exact_solution(sampler: str) -> None:
    """For normal pictures the flow scales each noise by the spread."""
    start = noise_for().first()
    finished = walk(plan(sampler, "SGM Uniform", 100, DEV))
    assert float((finished - 0.5 * start).abs().max()) < 0.02 * float(start.abs().max())


@pytest.mark.parametrize("sampler", ["Euler a", "DPM2 a"])
def test_flow_ancestral_samplers_keep_the_spread(sampler: str) -> None:
    finished = walk(plan(sampler, "SGM Uniform", 60, DEV), *range(20))
    assert float(finished.std()) == pytest.approx(0.5, rel=0.06)


@pytest.mark.parametrize("sampler", [label for label in VALID if label != "DPM adaptive"])
def test_a_picture_does_not_depend_on_its_batch(sampler: str) -> None:
    schedule = plan(sampler, "Simple", 6, DEV)
    torch.testing.assert_close(walk(schedule, 4, 5, 6)[1:2], walk(schedule, 5), rtol=0, atol=1e-6)


def test_only_the_adaptive_sampler_couples_its_batch() -> None:
    assert [label for label, row in samplers.SAMPLERS.items() if row.couples_batch] == ["DPM adaptive"]


@pytest.mark.parametrize("sampler", ADDS_NOISE)
def test_eta_0_takes_the_noise_away(sampler: str) -> None:
    schedule = plan(sampler, "Simple", 8, DEV)
    x = schedule.start(noise_for().first())
    still, other = (
        run(schedule, gaussian, x, ImageNoise(SHAPE, [seed], source="CPU"), quiet, SamplerOptions(eta=0.0))
        for seed in (1, 2)
    )
    moved = run(schedule, gaussian, x, ImageNoise(SHAPE, [2], source="CPU"), quiet)
    assert torch.equal(still, other)
    assert not torch.allclose(still, moved, atol=1e-3)


def test_churn_raises_sigmas_between_its_bounds() -> None:
    schedule = plan("Euler", "Simple", 6, DEV)
    options = SamplerOptions(s_churn=20.0, s_tmin=0.5, s_tmax=0.95)
    foreseen = forecast(schedule, options)
    assert foreseen is not None
    for level, sigma in zip(schedule.levels[:-1], foreseen.sigmas, strict=True):
        raised = level * math.sqrt(2) if 0.5 <= level <= 0.95 else level
        assert sigma == pytest.approx(raised)


def test_options_reach_only_the_samplers_that_have_them() -> None:
    loud = SamplerOptions(s_churn=50.0, s_noise=3.0)
    for sampler in ("Euler a", "DPM++ 2M", "LMS", "Restart"):
        schedule = plan(sampler, "Simple", 5, DEV)
        assert torch.equal(walk(schedule), walk(schedule, options=loud))
    assert not torch.equal(walk(plan("DPM2 a", "Simple", 5, DEV)), walk(plan("DPM2 a", "Simple", 5, DEV), options=loud))


@pytest.mark.parametrize("sampler", sorted(set(samplers.SAMPLERS) - {"DPM adaptive"}))
@pytest.mark.parametrize("steps", [1, 7, 24])
def test_the_forecast_is_what_happens(sampler: str, steps: int) -> None:
    schedule = plan(sampler, "Simple", steps, DEV)
    asked: list[float] = []
    reports: list[int] = []
    noise = noise_for()

    def denoise(x: Tensor, sigma: float) -> Tensor:
        asked.append(sigma)
        return gaussian(x, sigma)

    run(schedule, denoise, schedule.start(noise.first()), noise, lambda i, x, d: reports.append(i))
    foreseen = forecast(schedule)
    assert foreseen is not None
    assert list(foreseen.sigmas) == asked
    assert reports == list(range(foreseen.reports))


def test_no_forecast_where_the_latent_decides() -> None:
    assert forecast(plan("DPM adaptive", "Simple", 5, DEV)) is None


ADAPTIVE = plan("DPM adaptive", "Simple", 5, DEV)


def adapt(denoise: Denoise, after_step: AfterStep = quiet, options: SamplerOptions | None = None) -> Tensor:
    noise = noise_for()
    return run(ADAPTIVE, denoise, ADAPTIVE.start(noise.first()), noise, after_step, options)


@pytest.mark.parametrize("eta", [0.0, None, 2.0, 3.0])
@pytest.mark.parametrize("spread", [0.1, 0.5, 2.0])
def test_the_guess_is_more_than_a_smooth_network_takes_and_no_multiple(eta: float | None, spread: float) -> None:
    asked: list[float] = []
    reports: list[int] = []

    def denoise(x: Tensor, sigma: float) -> Tensor:
        asked.append(sigma)
        return gaussian(x, sigma, spread)

    options = SamplerOptions(eta=eta)
    adapt(denoise, lambda i, x, d: reports.append(i), options)
    evaluations, steps = guess(ADAPTIVE, options)
    assert evaluations / 8 < len(asked) <= evaluations and len(reports) <= steps


def test_a_pass_of_no_steps_takes_none() -> None:
    assert guess(plan("DPM adaptive", "Simple", 9, DEV, strength=0.0, exact=True), SamplerOptions()) == (0, 0)


def test_answers_that_never_agree_end_in_an_error_that_says_what_helps() -> None:
    random = torch.Generator().manual_seed(1)
    asked: list[float] = []

    def denoise(x: Tensor, sigma: float) -> Tensor:
        asked.append(sigma)
        return torch.randn(x.shape, generator=random)

    with pytest.raises(RequestError, match="^sampler: DPM adaptive has tried 300 steps.*choose another") as raised:
        adapt(denoise)
    assert raised.value.field == "sampler" and len(asked) == 900


def test_answers_that_are_no_numbers_end_at_once() -> None:
    asked: list[float] = []

    def denoise(x: Tensor, sigma: float) -> Tensor:
        asked.append(sigma)
        assert len(asked) < 9
        return x * math.nan

    assert adapt(denoise).isnan().all()


def test_reports_carry_the_latent_and_the_picture() -> None:
    schedule = plan("Euler", "Simple", 3, DEV)
    noise = noise_for()
    seen: list[tuple[Tensor, Tensor]] = []
    x = schedule.start(noise.first())
    finished = run(schedule, gaussian, x, noise, lambda i, x, denoised: seen.append((x, denoised)))
    assert seen[-1][0] is finished
    assert torch.equal(seen[0][1], gaussian(x, schedule.levels[0]))


def test_raising_from_a_report_stops_the_pass() -> None:
    class Stop(Exception):
        pass

    calls = []

    def stop(step: int, x: Tensor, denoised: Tensor) -> None:
        calls.append(step)
        if step == 2:
            raise Stop

    schedule, noise = plan("Heun", "Simple", 9, DEV), noise_for()
    with pytest.raises(Stop):
        run(schedule, gaussian, schedule.start(noise.first()), noise, stop)
    assert calls == [0, 1, 2]


def test_a_pass_of_no_steps_returns_the_picture() -> None:
    schedule, noise = plan("Euler", "Simple", 9, DEV, strength=0.0, exact=True), noise_for()
    picture = torch.randn(1, *SHAPE)
    x = schedule.start(noise.first(), picture)
    assert torch.equal(run(schedule, gaussian, x, noise, quiet), picture)
    foreseen = forecast(schedule)
    assert foreseen is not None
    assert (foreseen.sigmas, foreseen.reports) == ((), 0)


def test_the_start_latent_mixes_noise_and_picture() -> None:
    schedule, noise, picture = (
        plan("Euler", "Simple", 9, DEV, strength=0.5),
        torch.randn(1, *SHAPE),
        torch.ones(1, *SHAPE),
    )
    sigma = schedule.levels[0]
    torch.testing.assert_close(schedule.start(noise, picture), sigma * noise + (1 - sigma) * picture)
    started = schedule.start(noise, picture, noise_multiplier=0.5, extra_noise=0.2)
    torch.testing.assert_close(started, sigma * 0.5 * noise + (1 - sigma) * picture + 0.2 * 0.5 * noise)


def test_a_schedule_that_reaches_0_early_is_not_a_number_in_forge_mode() -> None:
    schedule = plan("DPM++ 2M", "Uniform", 4, DEV, compat="forge")
    assert schedule.levels[-2:] == (0.0, 0.0)
    assert walk(schedule).isnan().all()


def test_real_arithmetic_faults_are_not_hidden() -> None:
    schedule = plan("Euler", "Simple", 4, DEV)

    def broken(x: Tensor, sigma: float) -> Tensor:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        run(schedule, broken, torch.zeros(1, *SHAPE), noise_for(), quiet)
    with pytest.raises(ValueError, match="broken"):
        run(replace(schedule, sampler="Heun"), broken, torch.zeros(1, *SHAPE), noise_for(), quiet)


def test_ancestral_steps_keep_the_total() -> None:
    down, up = ancestral_step(0.8, 0.5, 0.7)
    assert math.hypot(down, up) == pytest.approx(0.5, rel=1e-6)
    assert ancestral_step(0.8, 0.5, 0.0) == (0.5, 0.0)
    down, shrink, weight = flow_ancestral_step(0.8, 0.5, 0.7)
    assert (1 - down) * shrink == pytest.approx(1 - 0.5)
    assert math.hypot(down * shrink, weight) == pytest.approx(0.5)
    assert flow_ancestral_step(0.8, 0.5, 0.0) == pytest.approx((0.5, 1.0, 0.0))


def test_multistep_weights_add_up_to_the_step() -> None:
    sigmas = plan("LMS", "Simple", 12, DEV).levels
    for i in range(11):
        assert sum(lms_weights(sigmas, i)) == pytest.approx(sigmas[i + 1] - sigmas[i], rel=1e-6)
        assert sum(deis_weights(sigmas, i)) == pytest.approx(sigmas[i + 1] - sigmas[i], rel=0.01)
    for lengths in ([1.0], [1.0, 2.0], [1.0, 2.0, 0.5], [1.0, 0.5, 0.25, 0.125]):  # at order 4 only geometric ones do
        assert sum(ipndm_v_weights(lengths)) == pytest.approx(1.0)


@pytest.mark.parametrize(("steps", "extra", "passes"), [(20, 9, 1), (35, 9, 1), (36, 9, 2), (60, 15, 2)])
def test_restart_jumps_back_to_the_top(steps: int, extra: int, passes: int) -> None:
    sigmas = plan("Restart", "Karras", steps, DEV).levels
    pairs = restart_steps(sigmas)
    jumps = [(end, start) for (_, end), (start, _) in itertools.pairwise(pairs) if start > end]
    assert len(jumps) == passes
    assert all(start == pytest.approx(sigmas[0]) and end == pytest.approx(0.1, abs=0.06) for end, start in jumps)
    assert len(pairs) == steps - extra * passes + extra * passes
    assert pairs[-1][1] == 0.0
