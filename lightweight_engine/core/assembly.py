"""From the files of a model to its networks: precision settled, nothing loaded yet."""

from __future__ import annotations

import os

import torch

from ..backend.devices import Card
from ..config import EngineConfig
from ..flux.tokenizers import CLIPTokenizer, T5Tokenizer, hub_cache
from .models import ModelSet
from .networks import Networks
from .precision import choose_precision, memory_manager
from .quantized_cache import through_cache
from .tokenizer_files import tokenizer_folder, tokenizer_places


def assemble(
    models: ModelSet,
    config: EngineConfig,
    device: torch.device,
    card: Card,
    notes: list[str],
    of_cache: list[str] | None = None,
    *,
    load: bool,
) -> Networks:
    """The networks of a model, none of them loaded yet.

    Args:
        notes: gets what is worth saying of settings and files.
        of_cache: gets what is of the cache of quantised weights instead, which is only known as it is used.
        load: they will be; what is quantised on load may be kept for the next time.
    """
    precision = choose_precision(config, models, card, notes)
    if load:
        models, precision = through_cache(config, models, precision, device, notes if of_cache is None else of_cache)
    rules = memory_manager(config, card)
    networks = Networks(
        models,
        device,
        precision,
        rules,
        tokenizers=lambda: read_tokenizers(config, models),
        merge_loras=config.lora_merge,
    )
    networks.params = networks.params.scheduled_as(config.variant)
    return networks


def read_tokenizers(config: EngineConfig, models: ModelSet) -> tuple[CLIPTokenizer, T5Tokenizer]:
    """The CLIP and the T5 tokenizer, found beside the model or elsewhere, or fetched once."""
    folders, hub = tokenizer_places(config, models), hub_cache(dict(os.environ))
    clip, t5 = (
        tokenizer_folder(kind, folders, config.cache_dir, hub=hub, offline=config.offline, allow=config.allow_hosts)
        for kind in ("clip", "t5")
    )
    return CLIPTokenizer.load(clip), T5Tokenizer.load(t5)
