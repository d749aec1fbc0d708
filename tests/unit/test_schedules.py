"""Labels, schedules, and where an image-to-image pass enters."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import pytest

from lightweight_engine import labels
from lightweight_engine.errors import RequestError
from lightweight_engine.flux import schedules
from lightweight_engine.flux.sampling import plan
from lightweight_engine.flux.schedules import ScheduleOptions, image_to_image_steps, make_sigmas, sigma_table

DEV = 1.15
VALID = [label for label in labels.scheduler_labels() if label != "Automatic"]


def test_labels_and_functions_are_the_same_set() -> None:
    assert set(schedules.SCHEDULERS) == set(labels.SCHEDULERS) - {"Automatic"}


def test_labels_load_no_torch() -> None:
    code = "import sys, lightweight_engine.labels; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("sampler", "scheduler", "expected"),
    [
        ("Euler", "Simple", ("Euler", "Simple")),
        ("euler A", "sgm_uniform", ("Euler a", "SGM Uniform")),
        ("Euler", "Automatic", ("Euler", "Simple")),
        ("DPM++ 2M", "Automatic", ("DPM++ 2M", "Karras")),
        ("DPM++ 2M SDE", None, ("DPM++ 2M SDE", "Exponential")),
        ("DPM++ 2M SDE Karras", "Simple", ("DPM++ 2M SDE", "Karras")),
        ("DPM++ 2M SDE Karras", "Beta", ("DPM++ 2M SDE", "Beta")),
        ("DPM++ 2M SDE Heun", "Automatic", ("DPM++ 2M SDE Heun", "Exponential")),
        ("DPM++ 3M SDE Exponential", "Automatic", ("DPM++ 3M SDE", "Exponential")),
        ("Euler", "DDIM", ("Euler", "DDIM")),
    ],
)
def test_names_that_can_run(sampler: str, scheduler: str | None, expected: tuple[str, str]) -> None:
    assert labels.resolve_sampler(sampler, scheduler) == expected


@pytest.mark.parametrize(
    ("sampler", "scheduler", "field"),
    [
        *((name, "Simple", "sampler") for name in ("LCM", "DDPM", "DDIM", "DDIM CFG++", "PLMS", "UniPC")),
        *((name, "Simple", "sampler") for name in ("[Forge] Flux Realistic", "Oiler", "Euler Turbo")),
        *(("Euler", name, "scheduler") for name in ("Uniform", "Turbo", "Align Your Steps", "Align Your Steps 11")),
        *(("Euler", name, "scheduler") for name in ("Align Your Steps GITS", "Align Your Steps 32")),
        *(("Euler", name, "scheduler") for name in ("SGM Karras", "SGM Exponential", "Sample")),
    ],
)
def test_invalid_names_are_refused_with_the_valid_ones(sampler: str, scheduler: str, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        labels.resolve_sampler(sampler, scheduler)
    assert caught.value.field == field
    valid = labels.sampler_labels() if field == "sampler" else labels.scheduler_labels()
    assert all(label in str(caught.value) for label in valid)


@pytest.mark.parametrize(
    ("sampler", "scheduler", "meant"),
    [
        ("Eulr", "Simple", "'Euler'"),
        ("euler_ancestral", "Simple", "'Euler a'"),
        ("dpmpp_2m", "Simple", "'DPM++ 2M'"),
        ("Euler", "Karas", "'Karras'"),
        ("Euler", "sgm_unifrm", "'SGM Uniform'"),
    ],
)
def test_a_slip_is_answered_with_the_name_that_was_meant(sampler: str, scheduler: str, meant: str) -> None:
    with pytest.raises(RequestError, match="did you mean") as caught:
        labels.resolve_sampler(sampler, scheduler)
    assert f"(did you mean {meant}?); choose one of" in str(caught.value)


@pytest.mark.parametrize("sampler", ["Zzz", "DDIM"])  # like none; known, but not one to choose
def test_no_name_is_guessed_where_none_is_near(sampler: str) -> None:
    with pytest.raises(RequestError) as caught:
        labels.resolve_sampler(sampler, "Simple")
    assert "did you mean" not in str(caught.value)


def test_the_reference_falls_back_in_silence() -> None:
    assert labels.resolve_sampler("Oiler", "Sample", "forge") == ("DPM++ 2M", "Automatic")
    assert labels.resolve_sampler("Euler Turbo", "Simple", "forge") == ("Euler", "Turbo")
    assert labels.resolve_sampler("DPM++ 2M", "Karras", "forge") == ("DPM++ 2M", "Automatic")
    assert labels.resolve_sampler("LCM", "Simple", "forge") == ("LCM", "Simple")


@pytest.mark.parametrize(("scheduler", "steps", "mu"), list(itertools.product(VALID, (1, 2, 9, 50, 200), (DEV, 1.0))))
def test_valid_schedules_fall_from_within_0_to_1(scheduler: str, steps: int, mu: float) -> None:
    sigmas = make_sigmas(scheduler, steps, mu)
    assert all(a > b for a, b in itertools.pairwise(sigmas))
    assert 0 <= sigmas[-1] < sigmas[0] <= 1
    assert (sigmas[-1] == 0) == (scheduler != "KL Optimal")
    assert len(sigmas) == steps + 1 or scheduler == "DDIM"


def test_simple_is_the_shifted_time() -> None:
    for steps in (1, 4, 25):
        times = [1 - i / steps for i in range(steps)]
        expected = [math.exp(DEV) / (math.exp(DEV) + 1 / t - 1) for t in times]
        assert make_sigmas("Simple", steps, DEV) == pytest.approx([*expected, 0.0], rel=1e-6)


def test_options_change_what_they_name() -> None:
    plain = make_sigmas("Karras", 8, DEV)
    cut = make_sigmas("Karras", 8, DEV, options=ScheduleOptions(sigma_min=0.1, sigma_max=0.9))
    assert (cut[0], cut[-2]) == pytest.approx((0.9, 0.1), rel=1e-5)
    assert make_sigmas("Karras", 8, DEV, options=ScheduleOptions(rho=3))[1] != plain[1]
    assert make_sigmas("Simple", 8, DEV, options=ScheduleOptions(rho=3)) == make_sigmas("Simple", 8, DEV)
    old = make_sigmas("Karras", 8, DEV, options=ScheduleOptions(use_old_karras=True))
    assert (old[0], old[-2]) == pytest.approx((10, 0.1), rel=1e-5)


def test_dropping_the_next_to_last_sigma_keeps_the_number_of_steps() -> None:
    longer = make_sigmas("Simple", 9, DEV)
    for sigmas in (
        make_sigmas("Simple", 8, DEV, sampler="DPM2"),
        make_sigmas("Simple", 8, DEV, options=ScheduleOptions(always_discard_next_to_last=True)),
    ):
        assert sigmas == [*longer[:-2], 0.0]


def test_equal_neighbours_of_an_extreme_beta_are_one_step() -> None:
    options = ScheduleOptions(beta_alpha=0.05, beta_beta=0.05)
    assert len(set(make_sigmas("Beta", 50, DEV, options=options))) < 51
    levels = plan("DPM++ 2M", "Beta", 50, DEV, options=options).levels
    assert all(a > b for a, b in itertools.pairwise(levels))


@pytest.mark.parametrize(
    ("steps", "strength", "exact", "expected"),
    [
        (20, 0.5, False, (20, 10)),
        (20, 1.0, False, (20, 19)),
        (20, 0.0, False, (20, 0)),
        (8, 0.5, True, (16, 7)),
        (6, 0.55, True, (10, 5)),
        (8, 1.0, True, (8, 7)),
        (8, 0.0, True, (0, 7)),
    ],
)
def test_image_to_image_steps(steps: int, strength: float, exact: bool, expected: tuple[int, int]) -> None:
    assert image_to_image_steps(steps, strength, exact=exact) == expected


def test_a_pass_from_a_picture_enters_midway() -> None:
    whole = plan("Euler", "Simple", 20, DEV)
    half = plan("Euler", "Simple", 20, DEV, strength=0.5)
    assert half.levels == whole.levels[9:]
    assert (half.steps, half.entered, whole.entered) == (11, True, False)
    assert half.noise_weight + half.picture_weight == pytest.approx(1)
    assert plan("Euler", "Simple", 20, DEV, strength=1.0).picture_weight == 0


def test_an_exact_pass_of_strength_0_runs_nothing() -> None:
    nothing = plan("Euler", "Simple", 20, DEV, strength=0.0, exact=True)
    assert (nothing.levels, nothing.noise_weight, nothing.picture_weight) == ((), 0.0, 1.0)


def test_table_ends() -> None:
    assert float(sigma_table(DEV)[0]) == pytest.approx(0.000315751153, rel=1e-6)
    assert float(sigma_table(1.0)[0]) == pytest.approx(0.000271781464, rel=1e-6)
    assert float(sigma_table(DEV)[-1]) == 1.0
