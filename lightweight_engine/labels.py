"""The names of samplers, schedulers and storage formats, and how a request's become what can run. Loads no torch.

``flux.samplers`` and ``flux.schedules`` hold the functions behind these labels; a test holds both sides equal.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from .errors import RequestError, closest

Compat = Literal["fixed", "forge"]

AUTOMATIC = "Automatic"
DEFAULT_SCHEDULER = "Simple"


@dataclass(frozen=True)
class SamplerLabel:
    """What is known of a sampler by name.

    Args:
        scheduler: the schedule it brings along when none is chosen.
        second_order: evaluates the model about twice a step, so prompt schedules count twice the steps.
        discard_next_to_last: runs on a schedule of one more step whose next-to-last sigma is dropped.
        uses_ensd: its noise after the first is that of ``eta_noise_seed_delta``, which the picture's text then names.
        valid: makes sense for a flow model.
        aliases: other spellings that callers use, which are k-diffusion's names.
    """

    label: str
    scheduler: str | None = None
    second_order: bool = False
    discard_next_to_last: bool = False
    uses_ensd: bool = False
    valid: bool = True
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class SchedulerLabel:
    """What is known of a scheduler by name; ``name`` and ``aliases`` are other spellings that callers use."""

    label: str
    name: str
    aliases: tuple[str, ...] = ()
    valid: bool = True


SAMPLERS: dict[str, SamplerLabel] = {
    row.label: row
    for row in (
        SamplerLabel("DPM++ 2M", "Karras", aliases=("k_dpmpp_2m",)),
        SamplerLabel("DPM++ SDE", "Karras", second_order=True, aliases=("k_dpmpp_sde",)),
        SamplerLabel("DPM++ 2M SDE", "Exponential", aliases=("k_dpmpp_2m_sde",)),
        SamplerLabel("DPM++ 2M SDE Heun", "Exponential", aliases=("k_dpmpp_2m_sde_heun",)),
        SamplerLabel("DPM++ 2S a", "Karras", second_order=True, uses_ensd=True, aliases=("k_dpmpp_2s_a",)),
        SamplerLabel("DPM++ 3M SDE", "Exponential", discard_next_to_last=True, aliases=("k_dpmpp_3m_sde",)),
        SamplerLabel("Euler a", uses_ensd=True, aliases=("k_euler_a", "k_euler_ancestral")),
        SamplerLabel("Euler", aliases=("k_euler",)),
        SamplerLabel("LMS", aliases=("k_lms",)),
        SamplerLabel("Heun", second_order=True, aliases=("k_heun",)),
        SamplerLabel("DPM2", "Karras", second_order=True, discard_next_to_last=True, aliases=("k_dpm_2",)),
        SamplerLabel(
            "DPM2 a", "Karras", second_order=True, discard_next_to_last=True, uses_ensd=True, aliases=("k_dpm_2_a",)
        ),
        SamplerLabel("DPM fast", uses_ensd=True, aliases=("k_dpm_fast",)),
        SamplerLabel("DPM adaptive", uses_ensd=True, aliases=("k_dpm_ad", "k_dpm_adaptive")),
        SamplerLabel("Restart", "Karras", second_order=True),
        SamplerLabel("HeunPP2"),
        SamplerLabel("IPNDM"),
        SamplerLabel("IPNDM_V"),
        SamplerLabel("DEIS"),
        SamplerLabel("DDIM", valid=False),
        SamplerLabel("DDIM CFG++", valid=False),
        SamplerLabel("PLMS", valid=False),
        SamplerLabel("UniPC", valid=False),
        SamplerLabel("LCM", valid=False),
        SamplerLabel("DDPM", valid=False),
    )
}

SCHEDULERS: dict[str, SchedulerLabel] = {
    row.label: row
    for row in (
        SchedulerLabel(AUTOMATIC, "automatic"),
        SchedulerLabel("Uniform", "uniform", valid=False),
        SchedulerLabel("Karras", "karras"),
        SchedulerLabel("Exponential", "exponential"),
        SchedulerLabel("Polyexponential", "polyexponential"),
        SchedulerLabel("SGM Uniform", "sgm_uniform", ("SGMUniform",)),
        SchedulerLabel("KL Optimal", "kl_optimal"),
        SchedulerLabel("Align Your Steps", "align_your_steps", valid=False),
        SchedulerLabel("Simple", "simple"),
        SchedulerLabel("Normal", "normal"),
        SchedulerLabel("DDIM", "ddim"),
        SchedulerLabel("Beta", "beta"),
        SchedulerLabel("Turbo", "turbo", valid=False),
        SchedulerLabel("Align Your Steps GITS", "align_your_steps_GITS", valid=False),
        SchedulerLabel("Align Your Steps 11", "align_your_steps_11", valid=False),
        SchedulerLabel("Align Your Steps 32", "align_your_steps_32", valid=False),
    )
}


def sampler_labels(*, valid_only: bool = True) -> list[str]:
    """The sampler labels to choose from."""
    return [row.label for row in SAMPLERS.values() if row.valid or not valid_only]


def scheduler_labels(*, valid_only: bool = True) -> list[str]:
    """The scheduler labels to choose from."""
    return [row.label for row in SCHEDULERS.values() if row.valid or not valid_only]


def resolve_sampler(
    sampler: str | None,
    scheduler: str | None,
    compat: Compat = "fixed",
    *,
    default_scheduler: str = DEFAULT_SCHEDULER,
    fields: tuple[str, str] = ("sampler", "scheduler"),
    offered: tuple[Iterable[str], Iterable[str]] = (SAMPLERS, SCHEDULERS),
) -> tuple[str, str]:
    """The sampler and scheduler labels that a request's two names mean.

    A sampler may carry a scheduler as a suffix ("DPM++ 2M Karras"). With ``fixed`` the suffix wins only where the
    scheduler is left at ``default_scheduler`` or Automatic, case does not matter, and Automatic becomes the sampler's
    own scheduler, else Simple. With ``forge`` the suffix always wins, an unknown sampler becomes DPM++ 2M, and an
    unknown scheduler Automatic, which stays as it is.

    Args:
        fields: what the two are called where they were given; errors name them so.
        offered: names that can be given there; errors list those of them that are valid.

    Raises:
        RequestError: (``fixed`` only) a name is unknown or not valid for a flow model; the message lists valid ones.
    """
    if compat == "forge":
        return _resolve_as_reference(sampler, scheduler)
    name, suffix = _split_suffix(sampler or "Euler", ignore_case=True)
    chosen = _find_scheduler(scheduler or AUTOMATIC, ignore_case=True)
    row = _find(SAMPLERS, name, ignore_case=True)
    if row is None or not row.valid:
        raise _refusal(fields[0], sampler, row is not None, _valid_samplers(offered[0]))
    if chosen is None or not chosen.valid:
        raise _refusal(fields[1], scheduler, chosen is not None, _valid_schedulers(offered[1]))
    if suffix and chosen.label in (AUTOMATIC, default_scheduler):
        chosen = suffix
        if not chosen.valid:
            raise _refusal(fields[0], sampler, True, _valid_samplers(offered[0]))
    return row.label, chosen.label if chosen.label != AUTOMATIC else row.scheduler or DEFAULT_SCHEDULER


def _valid_samplers(names: Iterable[str]) -> list[str]:
    rows = ((name, _find(SAMPLERS, _split_suffix(name, ignore_case=True)[0], ignore_case=True)) for name in names)
    return [name for name, row in rows if row is not None and row.valid]


def _valid_schedulers(names: Iterable[str]) -> list[str]:
    rows = ((name, _find_scheduler(name, ignore_case=True)) for name in names)
    return [name for name, row in rows if row is not None and row.valid]


def own_scheduler(sampler: str, scheduler: str) -> str:
    """The scheduler that a pair of labels runs on: Automatic is the sampler's own, else (invalid for Flux) Uniform."""
    return scheduler if scheduler != AUTOMATIC else SAMPLERS[sampler].scheduler or "Uniform"


def schedule_steps(sampler: str, steps: int) -> int:
    """The step total that prompt schedules and ``skip_early_cond`` count with: doubled for second-order samplers."""
    return steps * 2 if SAMPLERS[sampler].second_order else steps


def _resolve_as_reference(sampler: str | None, scheduler: str | None) -> tuple[str, str]:
    name, suffix = _split_suffix(sampler or "DPM++ 2M", ignore_case=False)
    row = SAMPLERS.get(name, SAMPLERS["DPM++ 2M"])
    chosen = suffix or _find_scheduler(scheduler or AUTOMATIC, ignore_case=False) or SCHEDULERS[AUTOMATIC]
    return row.label, AUTOMATIC if chosen.label == row.scheduler else chosen.label


def _split_suffix(name: str, *, ignore_case: bool) -> tuple[str, SchedulerLabel | None]:
    if _find(SAMPLERS, name, ignore_case=ignore_case):
        return name, None
    folded = name.lower() if ignore_case else name
    for row in SCHEDULERS.values():
        for spelling in _spellings(row):
            ending = " " + (spelling.lower() if ignore_case else spelling)
            if folded.endswith(ending):
                return name[: -len(ending)].rstrip(), row
    return name, None


def _spellings(row: SchedulerLabel) -> tuple[str, ...]:
    return (row.label, row.name, *row.aliases)


def _find(rows: dict[str, SamplerLabel], name: str, *, ignore_case: bool) -> SamplerLabel | None:
    if not ignore_case:
        return rows.get(name)
    wanted = name.strip().lower()
    return next((row for label, row in rows.items() if wanted in (label.lower(), *row.aliases)), None)


def _find_scheduler(name: str, *, ignore_case: bool) -> SchedulerLabel | None:
    wanted = name.strip().lower() if ignore_case else name
    for row in SCHEDULERS.values():
        spellings: Iterable[str] = _spellings(row)
        if wanted in ((s.lower() for s in spellings) if ignore_case else spellings):
            return row
    return None


def _refusal(field: str, given: str | None, known: bool, valid: list[str]) -> RequestError:
    why = "is not valid for Flux" if known else "is not known"
    folded = {_folded(label): label for label in valid}
    meant = None if known or not given else closest(_folded(given), folded)
    hint = f" (did you mean {folded[meant]!r}?)" if meant else ""
    return RequestError(f"{field}: {given!r:.80} {why}{hint}; choose one of: {', '.join(valid)}", field=field)


def _folded(name: str) -> str:
    """A name as slips are measured: other programs write dpmpp_2m for DPM++ 2M."""
    return name.lower().replace("_", " ").replace("pp", "++")


LATENT_UPSCALERS = (
    *("Latent", "Latent (antialiased)", "Latent (bicubic)", "Latent (bicubic antialiased)"),
    *("Latent (nearest)", "Latent (nearest-exact)"),
)
"""Ways of a hires pass to enlarge the latent itself, without an upscaler; ``extensions.hires_fix`` has them."""


# Forge's names of storage types; each may be followed by " (fp16 LoRA)".
_FORGE_STORAGE = {
    "Automatic": "auto",
    "FP16": "fp16",
    "FP32": "fp32",
    "bnb-nf4": "nf4",
    "bnb-fp4": "fp4",
    "float8-e4m3fn": "fp8_e4m3",
    "float8-e5m2": "fp8_e5m2",
}
STORAGE = (
    *("auto", "bf16", "fp16", "fp32", "fp8_e4m3", "fp8_e5m2", "nf4", "fp4"),
    *("gguf:Q8_0", "gguf:Q5_1", "gguf:Q5_0", "gguf:Q4_1", "gguf:Q4_0"),
)
"""What weights can be kept as; other GGUF types are read, not written."""


def storage_name(text: str) -> str | None:
    """The storage format of a name of ours or Forge's, in any case; None where there is no such format."""
    names = {name.lower(): name for name in STORAGE} | {name.lower(): ours for name, ours in _FORGE_STORAGE.items()}
    return names.get(text.strip().lower().removesuffix(" (fp16 lora)"))


def storage_format(text: str) -> str:
    """As ``storage_name``, of a setting or a field.

    Raises:
        ValueError: there is no such format; lists those that there are.
    """
    name = storage_name(text)
    if name is None:
        raise ValueError(f"must be one of {', '.join([*STORAGE, *_FORGE_STORAGE])}")
    return name
