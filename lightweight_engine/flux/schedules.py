"""Noise schedules: which sigmas a sampler walks, and where an image-to-image pass enters.

For Flux a sigma is the time itself, 1 (noise) to 0 (picture). Sigmas are computed on the CPU in float32, as the
reference does, and handed on as Python floats, so that no sampler ever waits for the device.

Sources: k-diffusion (MIT) for the Karras and exponential families; the papers of Align Your Steps and GITS for theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..errors import MissingDependencyError
from ..labels import SAMPLERS, own_scheduler

TABLE_SIZE = 10_000
MOST_STRENGTH = 0.999  # of denoising: the reference keeps a trace of the picture even at 1


@dataclass(frozen=True)
class ScheduleOptions:
    """Overrides of a schedule; 0 leaves ``sigma_min``, ``sigma_max`` and ``rho`` at the model's or schedule's own."""

    sigma_min: float = 0.0
    sigma_max: float = 0.0
    rho: float = 0.0
    beta_alpha: float = 0.6
    beta_beta: float = 0.6
    use_old_karras: bool = False
    always_discard_next_to_last: bool = False


@dataclass(frozen=True)
class Levels:
    """What a scheduler may draw on: the model's table of sigmas (rising), the range to cover, and the options."""

    table: Tensor
    sigma_min: float
    sigma_max: float
    rho: float
    options: ScheduleOptions

    @property
    def logarithmic(self) -> bool:
        """Whether times between table entries are interpolated: the short table of LCM; for Flux time is sigma."""
        return len(self.table) != TABLE_SIZE


Scheduler = Callable[[int, Levels], Tensor]


@cache
def sigma_table(mu: float) -> Tensor:
    """The 10,000 sigmas of the model, float32, rising to 1: times i/10000 shifted by ``mu`` (1.15 dev, 1.0 schnell)."""
    times = torch.arange(1, TABLE_SIZE + 1) / TABLE_SIZE
    return math.exp(mu) / (math.exp(mu) + (1 / times - 1))


@cache
def lcm_table(mu: float) -> Tensor:
    """The 50 sigmas that LCM keeps of the first thousand, through the float32 rounding of a cumulative alpha."""
    return alpha_sigma(alpha_bar(sigma_table(mu)[19:1000:20]))


def alpha_bar(sigma: Tensor) -> Tensor:
    """The variance-preserving signal level that belongs to a sigma."""
    return 1 / (sigma**2 + 1)


def alpha_sigma(alpha: Tensor) -> Tensor:
    """The sigma that belongs to a variance-preserving signal level."""
    return ((1 - alpha) / alpha) ** 0.5


def log_linear(values: Tensor, index: Tensor) -> Tensor:
    """``values`` at fractional positions, interpolated linearly in the logarithm."""
    low = index.floor().long()
    weight = index - low
    logs = values.log()
    return ((1 - weight) * logs[low] + weight * logs[index.ceil().long()]).exp()


def karras(count: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """``count`` sigmas falling from max to min, evenly spaced in the ``rho``-th root; no zero at the end."""
    ramp = torch.linspace(0, 1, count)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (high + ramp * (low - high)) ** rho


def _with_zero(sigmas: Tensor) -> Tensor:
    return torch.cat((sigmas, sigmas.new_zeros(1)))


def _uniform(steps: int, levels: Levels) -> Tensor:
    """Evenly spaced table positions, read as times: thousands for Flux, where time is sigma (not valid)."""
    times = torch.linspace(len(levels.table) - 1, 0, steps)
    return _with_zero(log_linear(levels.table, times) if levels.logarithmic else times)


def _simple(steps: int, levels: Levels) -> Tensor:
    stride = len(levels.table) / steps
    return _with_zero(levels.table[[-(1 + int(i * stride)) for i in range(steps)]])


def _from_times(count: int, levels: Levels) -> Tensor:
    """``count`` sigmas from max to min, evenly spaced in time."""
    if not levels.logarithmic:
        return torch.linspace(levels.sigma_max, levels.sigma_min, count)
    logs = levels.table.log()
    ends = [int((logs - math.log(sigma)).abs().argmin()) for sigma in (levels.sigma_max, levels.sigma_min)]
    return log_linear(levels.table, torch.linspace(ends[0], ends[1], count))


def _sgm_uniform(steps: int, levels: Levels) -> Tensor:
    return _with_zero(_from_times(steps + 1, levels)[:-1])


def _normal(steps: int, levels: Levels) -> Tensor:
    return _with_zero(_from_times(steps, levels))


def _ddim(steps: int, levels: Levels) -> Tensor:
    stride = max(len(levels.table) // steps, 1)
    return _with_zero(levels.table[1::stride].flip(0))


def _karras(steps: int, levels: Levels) -> Tensor:
    return _with_zero(karras(steps, levels.sigma_min, levels.sigma_max, levels.rho))


def _exponential(steps: int, levels: Levels) -> Tensor:
    return _with_zero(torch.linspace(math.log(levels.sigma_max), math.log(levels.sigma_min), steps).exp())


def _polyexponential(steps: int, levels: Levels) -> Tensor:
    ramp = torch.linspace(1, 0, steps) ** (levels.rho)
    low, high = math.log(levels.sigma_min), math.log(levels.sigma_max)
    return _with_zero((ramp * (high - low) + low).exp())


def _kl_optimal(steps: int, levels: Levels) -> Tensor:
    """Ends at sigma_min, with no zero after it."""
    ramp = torch.arange(steps + 1) / steps
    return torch.tan(ramp * math.atan(levels.sigma_min) + (1 - ramp) * math.atan(levels.sigma_max))


def _beta(steps: int, levels: Levels) -> Tensor:
    try:
        from scipy.stats import beta
    except ImportError:
        raise MissingDependencyError("the scheduler Beta needs scipy; install it with: pip install scipy") from None
    quantiles = 1 - torch.linspace(0, 1, steps, dtype=torch.float64)
    ramp = torch.as_tensor(beta.ppf(quantiles.numpy(), levels.options.beta_alpha, levels.options.beta_beta))
    return _with_zero(levels.sigma_min + (levels.sigma_max - levels.sigma_min) * ramp).float()


def _turbo(steps: int, levels: Levels) -> Tensor:
    """Whole times up to 999, read as sigmas (not valid for Flux)."""
    times = (torch.arange(1, steps + 1) * (1000.0 / steps) - 1).round().clamp(0, 999).flip(0)
    return _with_zero(times)


# Sigmas of Stable Diffusion 1.5 (not valid for Flux); published by the authors of the two methods.
_ALIGN_11 = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
_GITS_11 = (14.615, 4.617, 2.507, 1.236, 0.702, 0.402, 0.240, 0.156, 0.104, 0.094, 0.029)
_ALIGN_32 = (
    *(14.615, 11.23951352, 8.64363081, 6.64729424, 5.57250862, 4.71648546, 3.99196065, 3.5195609),
    *(3.13490466, 2.79228788, 2.48773628, 2.21663865, 1.97508351, 1.7793172, 1.61475335, 1.46540953),
    *(1.314849, 1.16642497, 1.03475547, 0.91573744, 0.80748169, 0.71202361, 0.621739, 0.53065202),
    *(0.4529096, 0.37491455, 0.27461819, 0.2011529, 0.14105873, 0.06682881, 0.03166121, 0.015),
)


def _tabulated(points: tuple[float, ...]) -> Scheduler:
    values = torch.tensor(points, dtype=torch.float64)

    def scheduler(steps: int, levels: Levels) -> Tensor:
        last = len(points) - 1
        from_the_end = torch.linspace(0, last, steps, dtype=torch.float64).flip(0)
        return _with_zero(log_linear(values, last - from_the_end)).float()

    return scheduler


SCHEDULERS: dict[str, Scheduler] = {
    "Uniform": _uniform,
    "Karras": _karras,
    "Exponential": _exponential,
    "Polyexponential": _polyexponential,
    "SGM Uniform": _sgm_uniform,
    "KL Optimal": _kl_optimal,
    "Align Your Steps": _tabulated(_ALIGN_11),
    "Simple": _simple,
    "Normal": _normal,
    "DDIM": _ddim,
    "Beta": _beta,
    "Turbo": _turbo,
    "Align Your Steps GITS": _tabulated(_GITS_11),
    "Align Your Steps 11": _tabulated(_ALIGN_11),
    "Align Your Steps 32": _tabulated(_ALIGN_32),
}

_RHO_DEFAULTS = {"Karras": 7.0, "Polyexponential": 1.0}

# Schedules between two sigmas, whatever the table holds; and what else one goes by, of the fields of ScheduleOptions.
_RANGED = ("Karras", "Exponential", "Polyexponential", "SGM Uniform", "KL Optimal", "Normal", "Beta")
_OWN_OPTIONS = {
    "Karras": ("rho", "use_old_karras"),
    "Polyexponential": ("rho",),
    "Beta": ("beta_alpha", "beta_beta"),
}


def options_of(scheduler: str) -> tuple[str, ...]:
    """The fields of ``ScheduleOptions`` that act on one schedule and not on all; ``scheduler`` is not Automatic."""
    ranged = ("sigma_min", "sigma_max") if scheduler in _RANGED else ()
    return (*ranged, *_OWN_OPTIONS.get(scheduler, ()))


def make_sigmas(
    scheduler: str, steps: int, mu: float, *, sampler: str = "Euler", options: ScheduleOptions | None = None
) -> list[float]:
    """The sigmas that ``sampler`` walks under ``scheduler``: falling, usually with a final 0.

    Args:
        scheduler: a label of ``labels.SCHEDULERS``; Automatic is the sampler's own, else Uniform.
        sampler: a label of ``labels.SAMPLERS``; LCM has a table of its own, some drop their next-to-last sigma.

    Raises:
        MissingDependencyError: Beta without scipy.
    """
    options = options or ScheduleOptions()
    drop = SAMPLERS[sampler].discard_next_to_last or options.always_discard_next_to_last
    scheduler = own_scheduler(sampler, scheduler)
    levels = _levels(scheduler, lcm_table(mu) if sampler == "LCM" else sigma_table(mu), options)
    sigmas = SCHEDULERS[scheduler](steps + drop, levels).tolist()
    return sigmas[:-2] + sigmas[-1:] if drop else sigmas


def discrete_timesteps(steps: int) -> list[int]:
    """The table positions, falling, that DDIM, DDIM CFG++, PLMS and UniPC walk: within its first thousand."""
    return [min(t + 1, 999) for t in range(0, 1000, 1000 // steps)][::-1]


def image_to_image_steps(steps: int, strength: float, *, exact: bool = False) -> tuple[int, int]:
    """The length of the whole schedule, and the last step's number counted from where an image-to-image pass enters.

    Args:
        strength: denoising strength, 0..1.
        exact: run ``steps`` steps whatever the strength (hires passes, ``img2img_fix_steps``).

    Returns:
        ``(total, last)``: the pass runs ``last + 1`` of ``total`` steps; none where ``total`` is 0.
    """
    strength = min(strength, MOST_STRENGTH)
    if exact:
        return (int(steps / strength) if strength > 0 else 0), steps - 1
    return steps, int(strength * steps)


def _levels(scheduler: str, table: Tensor, options: ScheduleOptions) -> Levels:
    low, high = float(table[0]), float(table[-1])
    if scheduler == "Karras" and options.use_old_karras:
        low, high = 0.1, 10.0
    rho = options.rho or _RHO_DEFAULTS.get(scheduler, 0.0)
    return Levels(table, options.sigma_min or low, options.sigma_max or high, rho, options)
