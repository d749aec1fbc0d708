"""The networks of one model on a device: loaded when first used, kept or released after.

What ``with networks.use(role)`` yields is resident for as long as the block lasts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ..backend.devices import release_cached
from ..flux.keymaps import Role
from ..flux.load import load_part, read_params
from ..flux.params import AutoencoderParams, FluxParams
from ..flux.preview import Preview
from ..flux.text_encoders import TextEncoders
from ..flux.tokenizers import CLIPTokens, T5Tokens
from .models import ModelSet

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Precision:
    """The dtype that each part computes in.

    The text encoders compute in float32 whatever their file holds, as the reference does; on a GPU their matrices
    stay in the file's dtype and are cast at each use.
    """

    transformer: torch.dtype
    autoencoder: torch.dtype
    text: torch.dtype = torch.float32


class Networks:
    """The four networks and two tokenizers of a model.

    Args:
        keep: networks stay resident once loaded; otherwise each is released after use.
        tokenizers: reads the CLIP and the T5 tokenizer; called once.
    """

    def __init__(
        self,
        models: ModelSet,
        device: torch.device,
        precision: Precision,
        *,
        tokenizers: Callable[[], tuple[CLIPTokens, T5Tokens]],
        keep: bool = True,
    ) -> None:
        self.models = models
        self.device = device
        self.precision = precision
        self.keep = keep
        self.params: FluxParams = read_params(models.parts["transformer"])
        autoencoder: AutoencoderParams = read_params(models.parts["autoencoder"])
        self.autoencoder_factor = autoencoder.factor
        self._read_tokenizers = tokenizers
        self._loaded: dict[Role, nn.Module] = {}
        self._preview: Preview | None = None

    def load_all(self) -> None:
        """Load every network now, where they are kept."""
        if self.keep:
            for role in self.models.parts:
                self._load(role)
        _ = self.tokenizers

    @cached_property
    def tokenizers(self) -> tuple[CLIPTokens, T5Tokens]:
        """The CLIP and the T5 tokenizer."""
        return self._read_tokenizers()

    @contextmanager
    def use(self, role: Role) -> Iterator[Any]:
        """The network of a role, resident inside the block."""
        module = self._load(role)
        try:
            yield module
        finally:
            del module
            if not self.keep:
                self.release(role)

    @contextmanager
    def text_encoders(self) -> Iterator[TextEncoders]:
        """Both text encoders with their tokenizers, resident inside the block."""
        clip_tokenizer, t5_tokenizer = self.tokenizers
        with self.use("clip") as clip, self.use("t5") as t5:
            yield TextEncoders(clip, clip_tokenizer, t5, t5_tokenizer)

    def preview(self) -> Preview:
        """The preview of this model's autoencoder, fitted when first asked for."""
        if self._preview is None:
            with self.use("autoencoder") as autoencoder:
                self._preview = Preview.fit(autoencoder)
        return self._preview

    def release(self, *roles: Role) -> None:
        """Drop the networks of these roles (all, if none is named) and give their memory back."""
        for role in roles or tuple(self._loaded):
            self._loaded.pop(role, None)
        release_cached(self.device)

    def _load(self, role: Role) -> nn.Module:
        if role not in self._loaded:
            text = role in ("t5", "clip")
            dtype = self.precision.text if text else getattr(self.precision, role)
            part = self.models.parts[role]
            keep_file_dtype = text and (self.device.type == "cuda" or part.nbytes > 1 << 30)
            self._loaded[role] = load_part(part, device=self.device, dtype=dtype, keep_file_dtype=keep_file_dtype)
            log.info("loaded %s from %s", role, part.checkpoint.path.name)
        return self._loaded[role]
