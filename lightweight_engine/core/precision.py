"""What each network is kept as and computes in on a device, and the rules of its memory, from the settings."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..backend.devices import Card, compute_dtype
from ..backend.memory_manager import GIB, MemoryManager
from ..config import EngineConfig
from ..flux.footprint import inventory
from ..flux.load import PLAIN, Storage
from .models import ModelSet

# On a CPU a text encoder of this size is cast at each use, so that its pages can be those of the file.
LARGE = 1 * GIB


@dataclass(frozen=True)
class Precision:
    """How each part is kept and what it computes in.

    The text encoders compute in float32 whatever their file holds, as the reference does.
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
    vae_dtype = config.vae_dtype if not cpu or config.is_set("vae_dtype") else "auto"

    def text(role: str) -> Storage:
        large = models.parts[role].nbytes > LARGE  # type: ignore[index]
        automatic = "file" if large or not cpu else "auto"
        return Storage(automatic if config.text_storage_dtype == "auto" else config.text_storage_dtype, torch.float32)

    return Precision(
        transformer=_transformer(config, models, card, notes),
        autoencoder=Storage("auto", compute_dtype(vae_dtype, card)),
        t5=text("t5"),
        clip=text("clip"),
    )


def _transformer(config: EngineConfig, models: ModelSet, card: Card, notes: list[str]) -> Storage:
    """Unless set, a GPU keeps nf4, and a CPU or the demonstration model what the file has."""
    part = models.parts["transformer"]
    compute = compute_dtype(config.compute_dtype, card)
    cpu = card.kind == "cpu"
    wanted = "auto" if (cpu or models.is_tiny) and not config.is_set("storage_dtype") else config.storage_dtype
    packed = part.storage != "plain"
    if packed and config.is_set("storage_dtype") and wanted not in ("auto", part.storage, *PLAIN):
        notes.append(
            f"{part.checkpoint.path.name} is stored as {part.storage} already and is used as it is; "
            f"storage_dtype = {wanted} ({config.origin('storage_dtype')}) has no effect on it"
        )
    if wanted == "auto" and cpu and inventory(part, Storage("auto", compute)).nbytes > card.free:
        wanted = "file"
    return Storage(wanted, compute)


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
    )
