"""The files of tokenizers: found beside a model or where they are kept, else fetched once, by their pins.

Loads no torch.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ..backend.checkpoint import file_sha256
from ..backend.model_folders import bases_of, place_for
from ..backend.net import Access, Limits, get
from ..errors import CacheStorageError, DownloadError, ModelNotFoundError, WrongContentError
from ..flux.tokenizers import Kind, find_tokenizer, is_tokenizer

if TYPE_CHECKING:
    from ..config import EngineConfig
    from .models import ModelSet

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PinnedFile:
    """A file by content; it may be had from any of ``urls``, tried in turn."""

    name: str
    sha256: str
    size: int
    urls: tuple[str, ...]


_SDXL = (
    "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/resolve/462165984030d82259a11f4367a4eed129e94a7b"
)

TOKENIZERS: dict[Kind, tuple[PinnedFile, ...]] = {
    # CLIP-L's own, as the SDXL repository has it, open to all (that of FLUX.1-dev asks for a login).
    "clip": (
        PinnedFile(
            "vocab.json",
            "e089ad92ba36837a0d31433e555c8f45fe601ab5c221d4f607ded32d9f7a4349",
            1_059_962,
            (f"{_SDXL}/tokenizer/vocab.json",),
        ),
        PinnedFile(
            "merges.txt",
            "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a",
            524_619,
            (f"{_SDXL}/tokenizer/merges.txt",),
        ),
    ),
    # T5 v1.1's, from open copies of FLUX.1-schnell.
    "t5": (
        PinnedFile(
            "tokenizer.json",
            "6cd1badb7467cdab971403bbeb1945070ca385652385a2b6549f672b08089dfc",
            2_424_256,
            (
                "https://huggingface.co/YuCollection/FLUX.1-schnell-Diffusers/resolve/main/tokenizer_2/tokenizer.json",
                "https://huggingface.co/black-forest-labs/FLUX.1-schnell/resolve/main/tokenizer_2/tokenizer.json",
            ),
        ),
    ),
}
_HOME = "tokenizers"
_FOLDERS: dict[Kind, str] = {"clip": "clip_l", "t5": "t5xxl"}


def tokenizer_folder(
    kind: Kind,
    folders: Sequence[Path],
    cache: Path,
    *,
    hub: Path | None = None,
    offline: bool = False,
    allow: Collection[str] = (),
) -> Path:
    """The folder of a tokenizer: found in ``folders`` or the Hub's cache, else fetched once into ``cache``.

    Args:
        allow: hosts that may have private addresses, see ``net.Access``.

    Raises:
        ModelNotFoundError: none is found and ``offline`` is set; the message says where to put one by hand.
        DownloadError: none is found and it cannot be fetched; the message says the same.
    """
    found = kept_tokenizer(kind, folders, cache, hub)
    if found is not None:
        return found
    told = by_hand(kind, folders[0] if folders else cache)
    if offline:
        raise ModelNotFoundError(f"no {_FOLDERS[kind]} tokenizer was found, and offline mode is on: {told}")
    target = _home(kind, cache)
    for file in TOKENIZERS[kind]:
        _fetch_any(file, target, allow, told)
    return target


def _home(kind: Kind, folder: Path) -> Path:
    """Where a tokenizer lies in a folder of ours."""
    return folder / _HOME / _FOLDERS[kind]


def tokenizer_places(config: EngineConfig, models: ModelSet | None) -> list[Path]:
    """Where the tokenizers of a model are looked for, the most wanted first; the Hub's cache and ours come last.

    Args:
        models: left out, those are told that any model of the models folder has.
    """
    if models is not None and models.is_tiny:
        return [models.root]
    folders = (*config.tokenizer_dirs, models.root if models else config.models_dir)
    beside = [models.parts[role].checkpoint.path.parent for role in TOKENIZERS] if models else []
    return [*(base for folder in folders for base in bases_of(folder)), *dict.fromkeys(beside)]


def kept_tokenizer(kind: Kind, folders: Sequence[Path], cache: Path, hub: Path | None = None) -> Path | None:
    """The folder of a tokenizer that need not be fetched; None where it has to be."""
    target = _home(kind, cache)
    return find_tokenizer(kind, folders, hub) or (target if is_tokenizer(kind, target) else None)


def hosts_of(kind: Kind) -> list[str]:
    """The hosts that a tokenizer is fetched from, the first wanted first."""
    return list(dict.fromkeys(urlsplit(url).netloc for file in TOKENIZERS[kind] for url in file.urls))


def by_hand(kind: Kind, folder: Path) -> str:
    """What to do about a tokenizer that cannot be fetched; ``folder`` is one that is looked into."""
    names = " and ".join(file.name for file in TOKENIZERS[kind])
    source = "tokenizer" if kind == "clip" else "tokenizer_2"
    return f"put {names} of FLUX.1-dev's {source} folder into {place_for(folder, [_HOME]) / _FOLDERS[kind]}"


def _fetch_any(file: PinnedFile, folder: Path, allow: Collection[str], by_hand: str) -> None:
    """Fetch a file from the first of its places that has it."""
    failures = []
    for url in file.urls:
        try:
            fetch(url, folder / file.name, sha256=file.sha256, size=file.size, allow=allow, max_seconds=300.0)
            return
        except DownloadError as error:
            log.warning("%s", error)
            failures.append(str(error))
    raise DownloadError(f"the tokenizer file {file.name} could not be fetched ({'; '.join(failures)}): {by_hand}")


def fetch(
    url: str,
    destination: Path,
    *,
    sha256: str,
    size: int,
    allow: Collection[str] = (),
    timeout: float = 30.0,
    max_seconds: float = 3600.0,
) -> Path:
    """Fetch one file of known size (bytes) and hash; one that is there with both is kept.

    The file appears whole or not at all: it is written beside its place under a ``.part`` name, checked, then moved.

    Raises:
        DownloadError: refused, broken off, not the pinned content, or not writable; nothing partial is left.
    """
    if is_pinned(destination, sha256=sha256, size=size):
        return destination
    part: Path | None = None
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=destination.parent, prefix=f".{destination.name}.", suffix=".part", delete=False
        ) as file:
            part = Path(file.name)
            with get(url, Limits(size, timeout, max_seconds), Access(allow)) as response:
                digest, received = hashlib.sha256(), 0
                for piece in response.chunks():
                    file.write(piece)
                    digest.update(piece)
                    received += len(piece)
                source = response.url
            if received != size or digest.hexdigest() != sha256:
                raise WrongContentError(
                    f"what {source} sent is not the pinned file: {received} bytes, sha256 {digest.hexdigest()[:16]}…; "
                    f"expected {size} bytes, sha256 {sha256[:16]}…"
                )
            file.flush()
            os.fsync(file.fileno())
        part.chmod(0o644)
        os.replace(part, destination)
    except OSError as error:
        raise CacheStorageError(
            f"{destination} cannot be written ({error}); free space or choose another cache"
        ) from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)
    log.info("fetched %s", destination)
    return destination


def is_pinned(path: Path, *, sha256: str, size: int) -> bool:
    """Whether ``path`` is a file of that size and hash."""
    try:
        if path.stat().st_size != size:
            return False
        return file_sha256(path) == sha256
    except OSError:
        return False
