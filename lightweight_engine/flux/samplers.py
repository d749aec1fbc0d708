"""The table of samplers: which function, which options, and which noise stand behind a label."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from . import dpm_solver, samplers_discrete, samplers_ode, samplers_stochastic, unipc

NoiseKind = Literal["picture", "brownian", "side"]

_CHURN = ("s_churn", "s_tmin", "s_tmax", "s_noise")
_RANGE = ("sigma_min", "sigma_max", "evaluations")


@dataclass(frozen=True)
class Sampler:
    """One row of the table.

    Args:
        function: ``(denoise, x, sigmas, noise, after_step, **options) -> x``.
        options: the fields of ``SamplerOptions`` that it takes.
        needs: the fields of ``Schedule`` that it takes.
        noise: the pictures' own streams, a Brownian tree each, or the streams beside them.
        discrete: walks table positions, not sigmas.
        couples_batch: pictures of one batch influence one another.
        own_work: of a sampler that chooses its steps itself, by eta: about as many evaluations and steps as it usually
            takes at the most. What is asked for then says no more than where a pass from a picture begins and ends.
    """

    function: Callable[..., Tensor]
    options: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    noise: NoiseKind = "picture"
    discrete: bool = False
    couples_batch: bool = False
    own_work: Callable[[float], tuple[int, int]] | None = None


SAMPLERS: dict[str, Sampler] = {
    "DPM++ 2M": Sampler(samplers_ode.dpmpp_2m),
    "DPM++ SDE": Sampler(samplers_stochastic.dpmpp_sde, ("eta", "s_noise"), noise="brownian"),
    "DPM++ 2M SDE": Sampler(samplers_stochastic.dpmpp_2m_sde, ("eta", "s_noise"), noise="brownian"),
    "DPM++ 2M SDE Heun": Sampler(samplers_stochastic.dpmpp_2m_sde_heun, ("eta", "s_noise"), noise="brownian"),
    "DPM++ 2S a": Sampler(samplers_stochastic.dpmpp_2s_ancestral, ("eta", "s_noise")),
    "DPM++ 3M SDE": Sampler(samplers_stochastic.dpmpp_3m_sde, ("eta", "s_noise"), noise="brownian"),
    "Euler a": Sampler(samplers_stochastic.euler_ancestral, ("eta",)),
    "Euler": Sampler(samplers_ode.euler, _CHURN),
    "LMS": Sampler(samplers_ode.lms),
    "Heun": Sampler(samplers_ode.heun, _CHURN),
    "DPM2": Sampler(samplers_ode.dpm2, _CHURN),
    "DPM2 a": Sampler(samplers_stochastic.dpm2_ancestral, ("eta", "s_noise")),
    "DPM fast": Sampler(dpm_solver.dpm_fast, ("eta", "s_noise"), _RANGE),
    "DPM adaptive": Sampler(
        dpm_solver.dpm_adaptive,
        ("eta", "s_noise"),
        _RANGE[:2],
        couples_batch=True,
        own_work=dpm_solver.adaptive_work,
    ),
    "Restart": Sampler(samplers_stochastic.restart),
    "HeunPP2": Sampler(samplers_ode.heunpp2),
    "IPNDM": Sampler(samplers_ode.ipndm),
    "IPNDM_V": Sampler(samplers_ode.ipndm_v),
    "DEIS": Sampler(samplers_ode.deis),
    "DDIM": Sampler(samplers_discrete.ddim, ("eta",), ("table",), discrete=True),
    "DDIM CFG++": Sampler(samplers_discrete.ddim_cfgpp, ("eta",), ("table",), discrete=True),
    "PLMS": Sampler(samplers_discrete.plms, needs=("table",), discrete=True),
    "UniPC": Sampler(unipc.unipc, needs=("table", "entered"), discrete=True),
    "LCM": Sampler(samplers_discrete.lcm),
    "DDPM": Sampler(samplers_discrete.ddpm, noise="side"),
}
