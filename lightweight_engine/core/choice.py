"""Which model the settings name. Loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ModelNotFoundError
from .folders import stray_models
from .models import TINY, ModelLibrary, ModelSet

if TYPE_CHECKING:
    from ..config import EngineConfig


def choose_models(config: EngineConfig, notes: list[str], library: ModelLibrary | None = None) -> ModelSet:
    """The model that the settings name; without one, the first that is found, or the demonstration model.

    Args:
        notes: gets what is worth saying of the choice.
        library: that of the settings' folder, with what it remembers of it.

    Raises:
        ModelNotFoundError: a folder, a file or a part is missing.
        ModelError: a named file cannot be used.
    """
    if config.is_set("models_dir") and not config.models_dir.is_dir():
        raise ModelNotFoundError(f"models_dir: there is no folder {config.models_dir}; correct it or leave it out")
    named = {"t5": config.t5, "clip": config.clip, "autoencoder": config.vae}
    library = library or ModelLibrary.of(config)
    models = library.choose(config.checkpoint, **named)
    if models.is_tiny and not config.checkpoint and config.models_dir != TINY:
        problems = [entry.problem for entry in library.ls() if entry.problem]
        unusable = f" ({len(problems)} files there cannot be used: {problems[0]})" if problems else ""
        notes += filter(None, [stray_models(config.models_dir)])
        notes.append(
            f"no Flux checkpoint was found in {config.models_dir}{unusable}: the demonstration model 'tiny' is used, "
            "which draws small cartoon people and nothing else"
        )
    return models
