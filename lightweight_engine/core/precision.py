"""What each network is kept as and computes in on a device, and the rules of its memory, from the settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..backend import eight_bit
from ..backend.devices import Card, compute_dtype
from ..backend.host_memory import GIB
from ..backend.memory_manager import MemoryManager
from ..backend.quantize import ROWS
from ..config import EngineConfig
from ..flux.footprint import inventory
from ..flux.load import PLAIN, Storage, stored_as
from .models import ModelSet

# On a CPU a text encoder of this size is cast at each use, so that its pages can be those of the file.
LARGE = 1 * GIB


@dataclass(frozen=True)
class Precision:
    """How each part is kept and what it computes in.

    Unless set, the text encoders compute in float32 whatever their file holds, as the reference does.
    """

    transformer: Storage
    autoencoder: Storage
    t5: Storage
    clip: Storage

    @classmethod
    def plain(cls, transformer: torch.dtype, autoencoder: torch.dtype) -> Precision:
        """All weights in the dtype that they are computed with."""
        text = Storage("auto", torch.float32)
        return cls(Storage("auto", transformer), Storage("auto", autoencoder), text, text)


def choose_precision(config: EngineConfig, models: ModelSet, card: Card, notes: list[str]) -> Precision:
    """The precision that the settings ask for on a card.

    Args:
        notes: gets a sentence where a setting does nothing with these files.
    """
    cpu = card.kind == "cpu"
    if config.variant == "schnell" and models.parts["transformer"].variant != "schnell":
        notes.append(
            f"variant = schnell ({config.origin('variant')}): {models.parts['transformer'].checkpoint.path.name} has "
            "guidance weights, as dev has and schnell has not; it is drawn with the schedule of schnell all the same"
        )

    def text(role: str) -> Storage:
        compute = PLAIN[config.text_compute_dtype]
        large = models.parts[role].nbytes > LARGE  # type: ignore[index]
        automatic = "file" if compute == torch.float32 and (large or not cpu) else "auto"
        return Storage(automatic if config.text_storage_dtype == "auto" else config.text_storage_dtype, compute)

    return Precision(
        transformer=_transformer(config, models, card, notes),
        autoencoder=Storage("auto", compute_dtype(_vae_dtype(config, card), card)),
        t5=text("t5"),
        clip=text("clip"),
    )


def settings_in_effect(config: EngineConfig, models: ModelSet, card: Card) -> dict[str, Any]:
    """The settings that decide the numbers of a picture beside its request, as they hold on this card."""
    return {
        "storage_dtype": _storage_dtype(config, models, card),
        "text_storage_dtype": config.text_storage_dtype,
        "text_compute_dtype": config.text_compute_dtype,
        "variant": config.variant,
        "compute_dtype": config.compute_dtype,
        "speed": config.speed,
        "vae_dtype": _vae_dtype(config, card),
        "residency": config.residency,
        "lora_merge": config.lora_merge,
        "exact_dora": config.exact_dora,
    }


def in_effect(precision: Precision, models: ModelSet) -> dict[str, str]:
    """What holds of the settings that files and a device may outvote, in the words that the settings have."""
    words = {dtype: word for word, dtype in PLAIN.items()}
    return {
        "storage_dtype": stored_as(models.parts["transformer"], precision.transformer),
        "compute_dtype": words[precision.transformer.compute],
        "speed": "fp8" if precision.transformer.format == ROWS else "exact",
        "vae_dtype": words[precision.autoencoder.compute],
    }


def _storage_dtype(config: EngineConfig, models: ModelSet, card: Card) -> str:
    """Unless set, a GPU keeps nf4, and a CPU or the demonstration model what the file has."""
    as_the_file = card.kind == "cpu" or models.is_tiny
    return "auto" if as_the_file and not config.is_set("storage_dtype") else config.storage_dtype


def _vae_dtype(config: EngineConfig, card: Card) -> str:
    return config.vae_dtype if card.kind != "cpu" or config.is_set("vae_dtype") else "auto"


def _transformer(config: EngineConfig, models: ModelSet, card: Card, notes: list[str]) -> Storage:
    part = models.parts["transformer"]
    compute = compute_dtype(config.compute_dtype, card)
    cpu = card.kind == "cpu"
    if config.speed == "fp8":
        refusal = _no_eight_bits(compute, card)
        if refusal is None:
            return Storage(ROWS, compute)
        notes.append(f"speed = fp8 ({config.origin('speed')}) has no effect: {refusal}")
    wanted = _storage_dtype(config, models, card)
    packed = part.storage != "plain"
    if packed and config.is_set("storage_dtype") and wanted not in ("auto", part.storage, *PLAIN):
        notes.append(
            f"{part.checkpoint.path.name} is stored as {part.storage} already and is used as it is; "
            f"storage_dtype = {wanted} ({config.origin('storage_dtype')}) has no effect on it"
        )
    if wanted == "auto" and cpu and inventory(part, Storage("auto", compute)).nbytes > card.free:
        wanted = "file"
    if cpu and config.vram_state == "NO_VRAM" and not inventory(part, Storage(wanted, compute)).mapped:
        notes.append(
            f"vram_state = NO_VRAM ({config.origin('vram_state')}) has no effect beyond LOW_VRAM's: on a CPU only "
            f"weights that are computed with as the file has them can stay there, and those of "
            f"{part.checkpoint.path.name} are converted; set compute_dtype to that of the file"
        )
    storage = Storage(wanted, compute)
    if cpu and config.residency == "fast" and PLAIN.get(stored_as(part, storage)) == compute:
        notes.append(
            f"residency = fast ({config.origin('residency')}) has no effect on a CPU but with LoRAs: what is kept of "
            f"{part.checkpoint.path.name} are the numbers that it computes with"
        )
    return storage


def _no_eight_bits(compute: torch.dtype, card: Card) -> str | None:
    """Why products cannot be computed in 8 bits; None where they can, as a card that is only planned for."""
    if card.kind == "cpu":
        return "it needs a GPU"
    if compute != torch.bfloat16:
        return f"products in 8 bits answer in bfloat16, and compute_dtype is {str(compute).removeprefix('torch.')}"
    if card.is_known_without_eight_bits or (card.device is not None and not eight_bit.available(card.device)):
        return f"{card.name} has no products in 8 bits with a scale for each row"
    return None


def memory_manager(config: EngineConfig, card: Card) -> MemoryManager:
    """The rules of memory on a card, as set."""
    return MemoryManager(
        card,
        config.vram_state,
        reserve=config.inference_reserve,
        fraction=config.allocator_fraction,
        limit=None if config.vram_limit is None else int(config.vram_limit * GIB),
        pinned=config.pinned_memory,
        overlap=config.async_swap,
        fast=config.residency == "fast",
        record=config.cuda_graphs,
    )
