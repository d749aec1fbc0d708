"""The network that the sampler goldens were made with, and how their cases become calls of ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from goldens import Case
from torch import Tensor

from lightweight_engine.flux.conditioning import Composition, Conditioning, Scheduled
from lightweight_engine.flux.guidance import Guided, SkipRules
from lightweight_engine.flux.noise import ImageNoise
from lightweight_engine.flux.sampling import SamplerOptions, Schedule
from lightweight_engine.flux.schedules import ScheduleOptions
from lightweight_engine.labels import schedule_steps

MU = {"flux-dev": 1.15, "flux-schnell": 1.0}
TOLERANCE = 1e-4  # of the largest value of the result


@dataclass
class FakeFlux:
    """v = 0.6 A tanh(x) + 0.5 B + sigma C + mean(pooled) G; keeps what it was called with."""

    case: Case
    calls: list[tuple[int, float]] = field(default_factory=list)

    def __call__(self, x: Tensor, sigma: float, conditionings: Sequence[Conditioning]) -> Tensor:
        a, b, c, g = (self.case.common(name) for name in "ABCG")
        assert len(x) == len(conditionings)
        self.calls.append((len(x), sigma))
        pooled = torch.stack([cond.pooled.mean() for cond in conditionings]).view(-1, 1, 1, 1)
        return 0.6 * a * torch.tanh(x) + 0.5 * b + sigma * c + pooled * g


def options_of(case: Case) -> dict[str, float]:
    return case.get("opts") or case.get("options") or {}


def constant(value: float) -> Scheduled:
    """A conditioning whose pooled vector has one value all over."""
    return Scheduled(((10_000, Conditioning(torch.zeros(256, 4), torch.full((8,), float(value)), 3.5)),))


def guided(case: Case, network: FakeFlux) -> Guided:
    parts = case.get("weights") or [[1.0, 1.0]]  # (pooled value, weight)
    positive = Composition(tuple((weight, constant(pooled)) for pooled, weight in parts))
    opts = options_of(case)
    rules = SkipRules(
        opts.get("s_min_uncond", 0.0),
        bool(opts.get("s_min_uncond_all", False)),
        opts.get("skip_early_cond", 0.0),
        schedule_steps(case["sampler"], case["steps"]),
    )
    batch = case["batch"]
    return Guided(network, [positive] * batch, [constant(-0.5)] * batch, case["cfg_scale"], rules=rules, compat="forge")


def image_noise(case: Case) -> ImageNoise:
    """Seeds count up over the batch; with a variation it is the subseeds that do."""
    batch, strength = case["batch"], case.get("subseed_strength", 0.0)
    return ImageNoise(
        tuple(case.common("A").shape),
        [case["seed"] + (0 if strength else i) for i in range(batch)],
        source="CPU",
        subseeds=[case.get("subseed", 0) + i for i in range(batch)],
        subseed_strength=strength,
        seed_delta=int(options_of(case).get("eta_noise_seed_delta", 0)),
        compat="forge",
    )


def sampler_options(case: Case) -> SamplerOptions:
    opts = options_of(case)
    churn = {name: opts[name] for name in ("s_churn", "s_tmin", "s_tmax", "s_noise") if name in opts}
    return SamplerOptions(eta=case.get("eta", opts.get("eta_ancestral")), **churn)


def schedule_options(case: Case) -> ScheduleOptions:
    from checks.sigmas import OPTION_NAMES

    return ScheduleOptions(**{OPTION_NAMES[k]: v for k, v in options_of(case).items() if k in OPTION_NAMES})


def assert_walk(case: Case, schedule: Schedule, network: FakeFlux, final: Tensor, expected: list[float] | None) -> None:
    """The sigmas walked, the sequence of calls, and the latent."""
    if isinstance(expected, list):
        assert list(schedule.levels) == pytest.approx(expected, rel=3e-6, abs=0)
    assert [rows for rows, _ in network.calls] == [rows for rows, _ in case["calls"]]
    assert [sigma for _, sigma in network.calls] == pytest.approx([sigma for _, sigma in case["calls"]], rel=1e-5)
    golden = case.tensor("final")
    if case.get("finite", True):
        assert torch.isfinite(final).all()
    final = torch.nan_to_num(final, 0.0, 0.0, 0.0)
    torch.testing.assert_close(final, golden, rtol=0, atol=TOLERANCE * float(golden.abs().max()))
