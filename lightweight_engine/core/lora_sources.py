"""What the URL of a LoRA means: which file is asked for, as whom, and which part of it is the LoRA. Loads no torch."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Literal
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

from ..backend.urls import Target, check_url, read_url
from ..errors import InvalidURLError, UnsupportedURLError
from ..extensions.lora_library import SUFFIX

# Last part of a URL at Replicate -> the file of that archive which is the LoRA.
TAR_MEMBERS = {
    "trained_model.tar": "output/flux_train_replicate/lora.safetensors",
    "flux-lora.tar": "flux-lora/flux-lora.safetensors",
}
TAR_HOST = "replicate.delivery"
CIVITAI_HOST = "civitai.com"
_CIVITAI_PATH = re.compile(r"/api/download/models/(?P<id>\d+)")
_TOKEN = re.compile(r"[!-~]{1,4096}")

Kind = Literal["LoRA", "checkpoint"]

READ: dict[Kind, str] = {
    "LoRA": "give one that ends in .safetensors, https://civitai.com/api/download/models/ID, or trained_model.tar or "
    "flux-lora.tar of replicate.delivery",
    "checkpoint": "give one that ends in .safetensors, or https://civitai.com/api/download/models/ID",
}


@dataclass(frozen=True)
class Source:
    """Where a LoRA comes from.

    Attributes:
        url: what is asked for; a token that was in it has been taken out.
        given: the URL as it was given, which the cache knows it by.
        name: what a person may be told it is.
        member: the file of an archive that is the LoRA; None where it comes by itself.
        token: that of the caller, in place of the configured one.
    """

    url: str = field(repr=False)
    given: str = field(repr=False)
    name: str
    member: str | None = None
    token: str | None = field(default=None, repr=False)


def lora_source(url: str, allow: Collection[str] = (), kind: Kind = "LoRA") -> Source:
    """What a URL means. A host on the allow-list may stand for any of the known ones.

    Args:
        kind: of file that is wanted: archives are read of a LoRA alone.

    Raises:
        InvalidURLError, BlockedURLError: it may not be fetched at all.
        UnsupportedURLError: nothing that is read as such a file.
    """
    return _source(url, check_url(url, allow), kind)


def kept_source(url: str, kind: Kind = "LoRA") -> Source:
    """What a URL means that nobody will ask: its file is looked for in the cache alone, whichever host it came from.

    Raises:
        InvalidURLError, UnsupportedURLError: as ``lora_source``.
    """
    return _source(url, replace(read_url(url), allowed=True), kind)


def _source(url: str, target: Target, kind: Kind) -> Source:
    path = unquote(urlsplit(url).path)
    last = path.rpartition("/")[2]
    if kind == "LoRA" and last in TAR_MEMBERS and _is_at(target, TAR_HOST):
        return Source(url, url, last.removesuffix(".tar"), TAR_MEMBERS[last])
    if (found := _CIVITAI_PATH.fullmatch(path)) and _is_at(target, CIVITAI_HOST):
        return _civitai(url, found["id"])
    if last.lower().endswith(SUFFIX):
        return Source(url, url, re.sub(r"[^\w.-]+", "_", last[: -len(SUFFIX)])[:80] or "lora")
    raise UnsupportedURLError(f"the URL at {target.host} is not one of a {kind} that is read; {READ[kind]}")


# What may be told of a query; anything else may be a secret: a token, a signature.
_HARMLESS = ("type", "format", "size", "fp")


def shown_url(url: str) -> str:
    """A URL that may be written down: without user, fragment, and what may be secret in its query."""
    parts = urlsplit(url)
    query = urlencode([(name, value) for name, value in parse_qsl(parts.query) if name.lower() in _HARMLESS])
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, query, ""))


def _is_at(target: Target, host: str) -> bool:
    return target.host == host or target.host.endswith(f".{host}") or target.allowed


def _civitai(url: str, number: str) -> Source:
    """The token goes from the query, which servers log, into a header."""
    parts = urlsplit(url)
    query = parse_qsl(parts.query, keep_blank_values=True)
    token = next((value for name, value in query if name == "token"), None)
    kind = dict(query).get("format", "SafeTensor")
    if kind.lower() != "safetensor":
        raise UnsupportedURLError(f"{CIVITAI_HOST} is asked for the format {kind!r:.40}; ask for format=SafeTensor")
    if token is not None and not _TOKEN.fullmatch(token):
        raise InvalidURLError(f"the token in the URL for {parts.hostname} is empty or damaged; copy it again")
    kept = urlencode([(name, value) for name, value in query if name != "token"])
    return Source(urlunsplit(parts._replace(query=kept, fragment="")), url, f"civitai-{number}", token=token)
