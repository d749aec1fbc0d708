"""The model that an engine works with: made ready when first asked for, and changed when a request names another."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from ..backend import kernels
from ..backend.devices import Card, card_of, pick_device
from ..backend.kept_files import FileVersion
from ..config import EngineConfig
from ..errors import MemoryBudgetError
from ..extensions.lora import LoRAManager
from . import head_start
from .assembly import assemble
from .choice import choose_models
from .folders import kernels_folder
from .loras import lora_manager
from .models import ModelSet
from .networks import Networks
from .plan import Plan
from .precision import choose_precision, settings_in_effect
from .recovery import within_memory

T = TypeVar("T")


class CurrentModel:
    """One model at a time: its networks, the settings that it was chosen by, and what reads LoRAs for it.

    Args:
        config: the settings of the model that is used where a request names none.
        sha256_of: hashes a LoRA file.
        usual: the plan of a request that says nothing: what is kept through all its stages is loaded at once.

    Attributes:
        library: the model files; it remembers the headers that were read, so that a change reads few.
        networks: None until a model is asked for.
        settings: the configured ones, with the choice of the last request that named a model.
        notes: what is worth saying of the settings and the model's files, a sentence each; the same for the same
            settings, whatever model was in use before.
    """

    def __init__(
        self,
        config: EngineConfig,
        sha256_of: Callable[[Path], str],
        usual: Callable[[Networks, LoRAManager], Plan],
    ) -> None:
        self.settings = self._config = config
        self.library = head_start.library_of(config)
        self.networks: Networks | None = None
        self.notes: list[str] = []
        self._sha256_of, self._usual = sha256_of, usual
        self._given: Networks | None = None
        self._files: tuple[FileVersion, ...] | None = None
        self._of_cache: list[str] = []  # of the notes, those that were made as the networks were
        self._loras: LoRAManager | None = None

    @property
    def loras(self) -> LoRAManager:
        """What reads LoRAs for the model in use; before there is one, for that of the settings: nothing is loaded."""
        if self._loras is None:
            models = self.chosen(self.settings, []) if self.networks is None else self.networks.models
            self._loras = self.loras_of(models)
        return self._loras

    def loras_of(self, models: ModelSet) -> LoRAManager:
        return lora_manager(self._config, models, self._sha256_of)

    def chosen(self, settings: EngineConfig, notes: list[str]) -> ModelSet:
        """The files of the model that settings name, as they are now; raises as ``choose_models``."""
        return choose_models(settings, notes, self.library.refresh())

    def is_of(self, settings: EngineConfig) -> bool:
        """Whether the model in use is the one that these settings name."""
        if self._given is not None and (self.networks is self._given or settings is self._config):
            return self.networks is self._given and settings is self._config
        return self.networks is not None and self.settings.model == settings.model

    def card_without(self, device: torch.device) -> Card:
        """What the device would have, had the model in use been released."""
        card = card_of(device)
        if self.networks is None or device.type != "cuda":  # on a host, most of what is held are pages of files
            return card
        return replace(card, free=card.free + self.networks.held, device=None)

    def use(self, settings: EngineConfig) -> Networks:
        """The networks of the model that the settings name; those in use, where they are of the same.

        What cannot be used is told while the model in use is still loaded. That one is released before another is
        loaded, and stays the one in use where this fails.

        Raises:
            ModelError: a file is missing or cannot be used.
            ConfigError: the device cannot be used.
            MemoryBudgetError: it does not fit.
        """
        if not self.is_of(settings) or self._has_lost_a_file:
            try:
                self._change(settings)
            finally:
                head_start.end()
        assert self.networks is not None
        return self.networks

    def load(self) -> None:
        """Load what a usual job keeps of the model in use, where it has been released.

        Raises:
            EngineError: as of ``use``.
        """
        self._load(self.use(self.settings), self.loras)

    def give(self, networks: Networks) -> None:
        """Work with networks that somebody else has put together, wherever a request names no model."""
        self.networks = self._given = networks
        self.settings, self._files, self._loras, self.notes = self._config, None, None, []

    def close(self) -> None:
        """Release the networks and forget them; whatever is used next is read anew."""
        if self.networks is not None:
            self.networks.release_all()
        self.networks = self._given = self._loras = self._files = None
        self.settings, self.notes = self._config, []

    def _change(self, settings: EngineConfig) -> None:
        if self._given is not None and settings is self._config:
            if self.networks is not None:
                self.networks.release_all()
            self.give(self._given)
            return
        notes: list[str] = []
        models = self.chosen(settings, notes)
        files = models.key  # as they were chosen: what is replaced while it is loaded is chosen anew by the next job
        if self._has(models, settings):
            assert self.networks is not None
            choose_precision(settings, models, self.networks.manager.card, notes)  # for what it says of these settings
            self.settings, self.notes = settings, [*notes, *self._of_cache]
            return
        device = self.networks.device if self.networks is not None else ready_device(self._config)
        head_start.stand(device.type)
        if self.networks is not None:
            self.networks.release_all()
        card, of_cache, said = card_of(device), [], len(notes)

        def forget() -> None:
            del notes[said:]
            of_cache.clear()

        networks = _with_room(  # weights may be quantised for the cache
            device, lambda: assemble(models, settings, device, card, notes, of_cache, load=True), forget
        )
        loras = self.loras_of(models)
        with ExitStack() as failed:
            failed.callback(networks.release_all)
            self._load(networks, loras)
            failed.pop_all()
        self.networks, self.settings, self.notes = networks, settings, [*notes, *of_cache]
        self._files, self._loras, self._of_cache = files, loras, of_cache
        head_start.leave(self._config, device.type)

    def _load(self, networks: Networks, loras: LoRAManager) -> None:
        _with_room(
            networks.device, lambda: networks.load_all(self._usual(networks, loras)), lambda: networks.release_all()
        )

    @property
    def _has_lost_a_file(self) -> bool:
        """Whether a file of the model in use is not there any more: its weights could not be read again."""
        return not all(os.path.exists(path) for path, *_ in self._files or ())

    def _has(self, models: ModelSet, settings: EngineConfig) -> bool:
        """Whether the model in use is of the same files, and kept in the same way, by whatever names."""
        if self.networks is None or self._files != models.key:
            return False
        card = self.networks.manager.card
        return settings_in_effect(settings, models, card) == settings_in_effect(self.settings, models, card)


def _with_room(device: torch.device, work: Callable[[], T], undo: Callable[[], object]) -> T:
    """What ``work`` returns; where memory runs out beside what a start has fetched, that is given up first.

    Args:
        undo: takes back what it has done so far.
    """
    try:
        return within_memory(device, work)
    except MemoryBudgetError:
        undo()
        if not head_start.end(wait=True):
            raise
    return within_memory(device, work)


def ready_device(config: EngineConfig) -> torch.device:
    """The device of the settings, with the threads, the share of its memory and the folder of programs that they name.

    Raises:
        ConfigError: it cannot be used.
    """
    device = pick_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    if device.type == "cuda":
        kernels.keep_in(kernels_folder(config.cache_dir))
        torch.cuda.set_per_process_memory_fraction(config.allocator_fraction, device)
    return device
