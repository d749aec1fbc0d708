"""A URL read once, by one parser, into what is connected to; refused where another parser might read it differently.

Loads no torch.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from urllib.parse import quote, urlsplit, urlunsplit

from ..errors import BlockedURLError, InvalidURLError
from .addresses import is_public

MAX_URL = 8192
PORTS = {"https": 443, "http": 80}
_HOST = re.compile(r"[\w.:-]+")


@dataclass(frozen=True)
class Target:
    """A checked URL. ``shown`` is what messages may say of it: a path or query may hold a secret."""

    scheme: str
    host: str
    port: int
    path: str = field(repr=False)
    allowed: bool

    @property
    def name(self) -> str:
        """``host:port``, as the allow-list has it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def shown(self) -> str:
        return f"{self.scheme}://{self.name.removesuffix(f':{PORTS[self.scheme]}')}"


def read_url(url: str) -> Target:
    """What a URL would connect to, whether or not that is allowed: for who connects to nothing.

    Raises:
        InvalidURLError: not a URL, or one that another program may read as one of another host.
    """
    if len(url) > MAX_URL or "\\" in url or any(ord(letter) <= 32 or ord(letter) == 127 for letter in url):
        raise InvalidURLError("not a URL: it is too long, or holds spaces, control characters or backslashes")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        path = quote(urlunsplit(("", "", parts.path or "/", parts.query, "")), safe="/?%:@!$&'()*+,;=~-._[]")
    except ValueError:  # its message repeats what was given
        raise InvalidURLError("not a URL: its host or port cannot be read; give one that begins https://") from None
    if not host or parts.scheme not in PORTS or not _HOST.fullmatch(host):
        raise InvalidURLError(f"not a URL that can be fetched ({parts.scheme[:20] or 'no'} scheme); begin it https://")
    if parts.username is not None or parts.password is not None:
        raise InvalidURLError(f"the URL for {host} holds a user name or password; leave them out")
    return Target(parts.scheme, host, PORTS[parts.scheme] if port is None else port, path, False)


def check_url(url: str, allow: Collection[str] = ()) -> Target:
    """Read a URL and refuse what is not https on its own port, or names an address of a private network, unless its
    ``host:port`` is in ``allow``. Nothing is looked up: what a name leads to is for who connects.

    Raises:
        InvalidURLError: see ``read_url``.
        BlockedURLError: a scheme, port or address that may not be used.
    """
    target = read_url(url)
    if target.name in {entry.lower() for entry in allow}:
        return replace(target, allowed=True)
    if target.scheme != "https":
        raise BlockedURLError(f"{target.name} was asked for without https; use https, or add it to allow_hosts")
    if target.port != PORTS["https"]:
        raise BlockedURLError(
            f"port {target.port} of {target.host} is refused; add {target.name} to allow_hosts if it is meant"
        )
    if _is_private(target.host):
        raise private_network(target)
    return target


def private_network(target: Target) -> BlockedURLError:
    """What is said of a host that leads into a private network."""
    return BlockedURLError(
        f"{target.host} is an address of a private network, which is refused; "
        f"add {target.name} to allow_hosts if it is meant"
    )


def _is_private(host: str) -> bool:
    """Whether a host is such an address, as it is usually written; a name is none."""
    try:
        return not is_public(host)
    except ValueError:
        return False
