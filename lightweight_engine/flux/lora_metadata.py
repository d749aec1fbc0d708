"""What a LoRA file says of its factors' scale outside its tensors: diffusers in the metadata, peft in a file beside it.

A scale is alpha / r, or alpha / √r with ``use_rslora``. It holds where a module has no ``alpha`` of its own; Forge and
ComfyUI do not read it. What kohya writes (``ss_network_alpha``) only repeats the tensors.

Source: ``LoraConfig`` of peft; ``lora_adapter_metadata`` of diffusers. Loads no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..backend.checkpoint import Checkpoint
from ..errors import AdapterError
from .layouts import Role

MAX_BYTES = 1 << 20
KEY = "lora_adapter_metadata"

# peft saves an adapter under one of these names, and its sizes beside it.
PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PEFT_CONFIG = "adapter_config.json"

# Network -> what stands before its settings; peft's own file is of the transformer and has nothing there.
_PREFIXES: dict[Role, tuple[str, ...]] = {
    "transformer": ("transformer.", ""),
    "clip": ("text_encoder.",),
    "t5": ("text_encoder_2.",),
}


@dataclass(frozen=True)
class DeclaredScale:
    """The settings of one network.

    Attributes:
        alphas: alpha of modules that have another, by the end of their name.
    """

    alpha: float
    alphas: Mapping[str, float]
    rank_stabilised: bool

    def __call__(self, alias: str, rank: int) -> float:
        """What the product of the factors of a module is multiplied with."""
        own = (value for end, value in self.alphas.items() if alias == end or alias.endswith(f".{end}"))
        alpha = next(own, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank) if rank else 0.0


def declared_scales(checkpoint: Checkpoint) -> dict[Role, DeclaredScale]:
    """The scale of each network that the file speaks of.

    Raises:
        AdapterError: the declaration is damaged.
    """
    rows = _settings(checkpoint)
    found: dict[Role, DeclaredScale] = {}
    for role, prefixes in _PREFIXES.items():
        prefix = next((prefix for prefix in prefixes if f"{prefix}lora_alpha" in rows), None)
        if prefix is not None:
            alphas = rows.get(f"{prefix}alpha_pattern") or {}
            if not isinstance(alphas, dict):
                raise _damaged(checkpoint, "alpha_pattern is no object")
            found[role] = DeclaredScale(
                _number(checkpoint, rows[f"{prefix}lora_alpha"]),
                {str(end): _number(checkpoint, value) for end, value in alphas.items()},
                bool(rows.get(f"{prefix}use_rslora")),
            )
    return found


def _settings(checkpoint: Checkpoint) -> Mapping[str, Any]:
    text = checkpoint.metadata.get(KEY)
    beside = checkpoint.path.with_name(PEFT_CONFIG)
    try:
        if text is None and checkpoint.path.name in PEFT_FILES and beside.is_file():
            if beside.stat().st_size > MAX_BYTES:
                raise ValueError(f"{beside.name} has {beside.stat().st_size:,} bytes")
            text = beside.read_text(encoding="utf-8")
        if text is None:
            return {}
        if len(text) > MAX_BYTES:
            raise ValueError(f"it has {len(text):,} characters")
        rows = json.loads(text)
        if not isinstance(rows, dict):
            raise ValueError("it is not an object")
    except (ValueError, RecursionError) as error:
        raise _damaged(checkpoint, str(error)) from None
    return rows


def _number(checkpoint: Checkpoint, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _damaged(checkpoint, f"{str(value)[:50]!r} is no alpha")
    return float(value)


def _damaged(checkpoint: Checkpoint, fault: str) -> AdapterError:
    return AdapterError(
        f"{checkpoint.path.name}: {KEY} (or {PEFT_CONFIG} beside it) cannot be read: {fault}; download it again"
    )
