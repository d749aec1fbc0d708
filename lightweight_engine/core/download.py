"""LoRA files by URL, fetched once and kept in a cache by content. Loads no torch."""

from __future__ import annotations

import hashlib
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..backend.checkpoint import open_checkpoint
from ..backend.host_memory import GIB
from ..backend.net import Access, Limits
from ..backend.tar_member import find_member
from ..errors import BlockedURLError, CacheStorageError, DownloadError, ModelError, RequestError, WrongContentError
from ..results import OnBytes
from .file_cache import FileCache, Held
from .lora_sources import Kind, Source, kept_source, lora_source
from .transfer import Received, Wanted, transfer

if TYPE_CHECKING:
    from ..config import EngineConfig

log = logging.getLogger(__name__)


def _silent(received: int, size: int | None) -> None:
    """Progress that nobody wants."""


class Downloads:
    """LoRA files by URL, each fetched once whoever asks, and kept in a cache."""

    def __init__(
        self, cache: FileCache, limits: Limits, access: Access | None = None, *, offline: bool = False
    ) -> None:
        self.cache = cache
        self.limits = limits
        self.access = access or Access()
        self.offline = offline

    @classmethod
    def of(cls, config: EngineConfig) -> Downloads:
        """As configured."""
        limits = Limits(
            int(config.download_max_gib * GIB),
            config.download_timeout,
            config.download_seconds,
            config.download_min_speed,
        )
        tokens = {host: token.get_secret_value() for host, token in config.tokens.items()}
        return cls(cache_of(config), limits, Access(config.allow_hosts, tokens), offline=config.offline)

    def lora(
        self,
        url: str,
        *,
        sha256: str | None = None,
        progress: OnBytes = _silent,
        kind: Kind = "LoRA",
    ) -> Held:
        """The LoRA file of a URL, held in the cache until it is closed. A URL that was fetched is not asked again;
        offline none is asked, so that a file in the cache may be of a host that is not allowed.

        Args:
            kind: of file that is wanted, where it is no LoRA.
            sha256: of the LoRA file, in hex; one that is in the cache already is not fetched.
            progress: told of every piece, and while another fetches the same; what it raises ends the fetch.

        Raises:
            DownloadError: by kind of fault, see there; messages name the host and never the rest of the URL.
            RequestError: ``sha256`` is none.
        """
        sha256 = _checked_sha256(sha256)
        try:
            source = lora_source(url, self.access.allow, kind)
        except BlockedURLError:
            found = self._kept(url, sha256, kind) if self.offline else None
            if found is None:
                raise
            return found
        found = self._find(source, sha256)
        if found is not None:
            return found
        if self.offline:
            raise DownloadError(f"{source.name} is not in the cache, and offline is on; switch it off to fetch it")
        key = self.cache.key(source.given)
        with self.cache.filling(key, self.limits.max_seconds, lambda: progress(0, None)):
            return self._find(source, sha256) or self._fetch(source, key, sha256, progress)

    def _kept(self, url: str, sha256: str | None, kind: Kind) -> Held | None:
        """The file of a URL that may not be asked; where there is no cache, none is made for it."""
        return self._find(kept_source(url, kind), sha256) if self.cache.folder.is_dir() else None

    def _find(self, source: Source, sha256: str | None) -> Held | None:
        """The file in the cache, by its hash or its URL."""
        if sha256:
            return self.cache.find_content(sha256, source.name)
        return self.cache.find(self.cache.key(source.given))

    def _fetch(self, source: Source, key: str, sha256: str | None, progress: OnBytes) -> Held:
        plain = source.member is None
        wanted = Wanted(source.url, source.token, sha256 if plain else None)
        got = transfer(wanted, self.cache, key, self.limits, self.access, progress)
        try:
            lora = got if plain else self._extract(source, key, got)
            _check_content(lora, sha256)
        except DownloadError:
            self.cache.drop(key)
            raise
        log.info("fetched %s from %s: %d bytes, sha256 %s", source.name, got.host, lora.size, lora.sha256)
        return self.cache.adopt(key, lora.path, lora.sha256, source.name)

    def _extract(self, source: Source, key: str, archive: Received) -> Received:
        """Copy the one file of an archive out of it."""
        target = self.cache.part(key, "member")
        try:
            span = find_member(archive.path, source.member or "", self.limits.max_bytes)
        except ModelError as error:
            raise WrongContentError(f"{archive.host}: {_named(error, archive.path, 'the archive')}") from None
        length = span.end - span.start
        state = self.cache.state(key)
        self.cache.reserve(key, replace(state, reserved=archive.size + length))
        digest, left = hashlib.sha256(), length
        try:
            with archive.path.open("rb") as file, target.open("wb") as copy:
                file.seek(span.start)
                while left and (piece := file.read(min(left, 1 << 20))):
                    copy.write(piece)
                    digest.update(piece)
                    left -= len(piece)
        except OSError as error:
            raise CacheStorageError(
                f"{source.name} cannot be written ({error.strerror}); free space for cache_dir"
            ) from error
        return Received(target, length, digest.hexdigest(), archive.host)


def cache_of(config: EngineConfig) -> FileCache:
    """The cache of fetched LoRA files."""
    return FileCache(config.cache_dir / "downloads", int(config.download_cache_gib * GIB))


def _checked_sha256(sha256: str | None) -> str | None:
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise RequestError("sha256 has to be 64 hexadecimal digits", field="sha256")
    return sha256.lower() if sha256 else None


def _check_content(got: Received, sha256: str | None) -> None:
    """Refuse what is not the file that was asked for, or no safetensors file.

    Raises:
        WrongContentError: that is so.
    """
    if sha256 not in (None, got.sha256):
        raise WrongContentError(
            f"{got.host} sent another file: {got.size:,} bytes, sha256 {got.sha256}; expected sha256 {sha256}; "
            "correct what is expected, or use another address"
        )
    try:
        open_checkpoint(got.path)
    except ModelError as error:
        fault = _named(error, got.path, "the file")
        raise WrongContentError(f"what {got.host} sent is not a safetensors file that can be used: {fault}") from None


def _named(error: ModelError, path: Path, name: str) -> str:
    """The text of an error with a name that says more than that of the part."""
    return str(error).replace(path.name, name)
