"""Which model the settings name. Loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ModelNotFoundError
from .folders import put_into, stray_models
from .models import TINY, Entry, ModelLibrary, ModelSet

if TYPE_CHECKING:
    from ..config import EngineConfig


def choose_models(config: EngineConfig, notes: list[str], library: ModelLibrary | None = None) -> ModelSet:
    """The model that the settings name; without one, the first that is found, or the demonstration model.

    Args:
        notes: gets what is worth saying of the choice.
        library: that of the settings' folder, with what it remembers of it.

    Raises:
        ModelNotFoundError: a folder, a file or a part is missing; or there is no checkpoint, and one is required.
        ModelError: a named file cannot be used.
    """
    if config.is_set("models_dir") and not config.models_dir.is_dir():
        raise ModelNotFoundError(f"models_dir: there is no folder {config.models_dir}; correct it or leave it out")
    named = {"t5": config.t5, "clip": config.clip, "autoencoder": config.vae}
    library = library or ModelLibrary.of(config)
    models = library.choose(config.checkpoint, **named)
    if models.is_tiny and not config.checkpoint and config.models_dir != TINY:
        problems = [entry.problem for entry in library.ls() if entry.problem]
        files = f"{len(problems)} file{'s' * (len(problems) != 1)}"
        stray = stray_models(config.models_dir)
        if config.require_model:
            unusable = f" ({files} there cannot be used: {problems[0]})" if problems else ""
            none = f"no Flux checkpoint was found in {config.models_dir}{unusable}"
            told = "; ".join(filter(None, [none, stray]))
            place = put_into(config.models_dir)
            raise ModelNotFoundError(f"{told}; put one into {place} there, or switch require_model off")
        notes += filter(None, [stray])
        unusable = f" ({files} unusable)" if problems else ""
        notes.append(  # short, as it comes with every job
            f"no Flux checkpoint in {config.models_dir}{unusable}: 'tiny' is used, which draws cartoon people only; "
            "see `lightweight-engine doctor`"
        )
    return models


def broken_checkpoints(library: ModelLibrary) -> list[Entry]:
    """Files in the folders of checkpoints that somebody has to look at: damaged ones, and where no checkpoint can be
    read, those of other kinds too. Beside a checkpoint, models of other engines are no fault."""
    meant = [entry for entry in library.ls() if entry.problem and entry.is_meant_as("transformer")]
    own = any("transformer" in entry.roles and TINY not in entry.path.parents for entry in library.ls())
    return [entry for entry in meant if not own or entry.damage()]
