"""The LoRAs of a configuration: where files are looked for, and putting one there or taking it away. Loads no torch
until one is read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..backend.checkpoint import file_sha256
from ..errors import (
    AdapterError,
    BlockedURLError,
    ConfigError,
    ModelNotFoundError,
    OutputError,
    about,
    closest,
    placed,
    some_of,
)
from ..extensions.lora_library import SUFFIX, LoraEntry, LoraLibrary, lora_place
from ..flux.prompt import parse_networks, read_lora_tag
from .lora_sources import lora_source, shown_url
from .models import TINY, ModelLibrary, ModelSet

if TYPE_CHECKING:
    from ..config import EngineConfig
    from ..extensions.lora import Fetch, LoRAManager
    from ..flux.keymaps import Role
    from ..request import GenerationRequest
    from ..results import OnBytes
    from .file_cache import Held

ROLES: tuple[Role, ...] = ("transformer", "clip", "t5")
"""The networks that LoRAs may change."""


def lora_library(config: EngineConfig, *, with_tiny: bool | None = None) -> LoraLibrary:
    """The files that requests may name.

    Args:
        with_tiny: those of the demonstration model too; left out, where no other model is there.
    """
    if with_tiny is None:
        with_tiny = not (config.checkpoint or ModelLibrary([config.models_dir]).has_checkpoint)
    return LoraLibrary([config.models_dir, *([TINY] if with_tiny and config.models_dir != TINY else [])])


def check_loras(request: GenerationRequest, config: EngineConfig, library: Callable[[], LoraLibrary]) -> None:
    """Refuse addresses of LoRAs that would not be asked, or are of nothing that is read, as far as they tell it
    themselves; and names and tags of those that are not there or cannot be read. Nothing is looked up or fetched;
    offline, what would not be asked may be in the cache.

    Args:
        library: gives the files that may be named; it is asked where one is.

    Raises:
        EngineError: the one that applying them would raise, which names the field.
    """
    for field, url, sha256 in _lora_urls(request):
        with about(field):
            _check_url(url, sha256, config)
    if names := list(_lora_names(request)):
        there = library()
        for field, name in names:
            with about(field):
                there.find(name)


def _lora_names(request: GenerationRequest) -> Iterator[tuple[str, str]]:
    """The LoRAs that are named, each with the field that does so. Prompts of later passes are left to their turn."""
    for number, spec in enumerate(request.loras):
        if spec.name is not None:
            yield placed("loras", number), spec.name
    for tag in parse_networks(request.prompt)[1]:
        if tag.kind == "lora":
            yield "prompt", read_lora_tag(tag).name


def _lora_urls(request: GenerationRequest) -> Iterator[tuple[str, str, str | None]]:
    """The LoRAs that are given by URL, each with its field, and its hash where it has to have one."""
    for number, url in enumerate(request.lora_urls):
        yield placed("lora_urls", number), url, None
    for number, spec in enumerate(request.loras):
        if spec.url is not None:
            yield placed("loras", number), spec.url, spec.sha256


def _check_url(url: str, sha256: str | None, config: EngineConfig) -> None:
    try:
        lora_source(url, config.allow_hosts)
    except BlockedURLError:
        if not config.offline:
            raise
        from .download import Downloads

        Downloads.of(config).lora(url, sha256=sha256).close()


def lora_manager(config: EngineConfig, models: ModelSet, sha256_of: Callable[[Path], str] = file_sha256) -> LoRAManager:
    """What reads LoRAs for a model."""
    from ..extensions.lora import LoRAManager

    return LoRAManager(
        {role: models.own_parts[role].shapes for role in ROLES},
        lora_library(config, with_tiny=models.is_tiny),
        _fetcher(config),
        sha256_of=sha256_of,
        shown=shown_url,
        exact_dora=config.exact_dora,
    )


def _fetcher(config: EngineConfig) -> Fetch:
    """Gets LoRAs by URL, through the cache. What that takes is imported with the first: most jobs fetch nothing."""

    def fetch(url: str, *, sha256: str | None, progress: OnBytes) -> Held:
        from .download import Downloads

        return Downloads.of(config).lora(url, sha256=sha256, progress=progress)

    return fetch


def add_lora(config: EngineConfig, source: Path, name: str, *, force: bool = False) -> Path:
    """Copy a LoRA file into the models folder; it appears there whole or not at all.

    Raises:
        ConfigError: the name is none of a file.
        AdapterError: another file has the name, and ``force`` is not set.
        OutputError: it cannot be written.
    """
    stem = name.removesuffix(SUFFIX)
    if not stem or stem in (".", "..") or set("/\\:<>\0") & set(stem):
        raise ConfigError(f"{name!r:.80} cannot be the name of a LoRA: give one without / \\ : < >")
    target = lora_place(config.models_dir) / f"{stem}{SUFFIX}"
    if target.exists() and not force:
        if file_sha256(target) == file_sha256(source):
            return target
        raise AdapterError(f"{target} is there already, with other content; give --name or --force")
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, part)
        os.replace(part, target)
    except OSError as error:
        raise OutputError(f"{target} cannot be written ({error.strerror}); free space, or check permissions") from error
    finally:
        part.unlink(missing_ok=True)
    return target


def remove_lora(config: EngineConfig, name: str) -> LoraEntry:
    """Remove a LoRA file of the models folder.

    Raises:
        ModelNotFoundError: there is none of that name.
        AdapterError: it ships with the package.
        OutputError: it cannot be removed.
    """
    own = lora_library(config, with_tiny=False)
    names = [entry.name for entry in own.ls()]
    shipped = [entry.name for entry in LoraLibrary([TINY]).ls()]
    if name in shipped and name not in names:
        raise AdapterError(
            f"{name} ships with the package, which keeps it; only files of {config.models_dir} are removed"
        )
    try:
        entry = own.find(name, broken=True)
    except ModelNotFoundError:
        meant = closest(name, names)
        hint = f"did you mean {meant!r}?" if meant else f"it has {some_of(names)}"
        raise ModelNotFoundError(f"{config.models_dir} has no LoRA called {name!r:.120}; {hint}") from None
    try:
        entry.path.unlink()
    except OSError as error:
        raise OutputError(f"{entry.path} cannot be removed ({error.strerror}); check permissions") from error
    return entry
