"""The only place that opens sockets to others: a guarded GET.

Guards: https only, public addresses only (checked after the name is resolved, and the checked address is the one that
is connected to, so that a second answer of the name server changes nothing), at most five redirects, each checked
anew, a cap on bytes and on time. An ``allow`` list of ``host:port`` lifts the first two for a server of one's own.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

from ..errors import DownloadError

MAX_REDIRECTS = 5
CHUNK = 1 << 18
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


@dataclass(frozen=True)
class Target:
    """A checked URL. ``shown`` is what messages may say of it: no query, which may hold a secret."""

    scheme: str
    host: str
    port: int
    path: str
    allowed: bool

    @property
    def shown(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.path.partition('?')[0]}"


def check_url(url: str, allow: Collection[str] = ()) -> Target:
    """Read a URL and refuse what is not https, unless its ``host:port`` is in ``allow``.

    Raises:
        DownloadError: not a URL that may be fetched.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise DownloadError(f"not a URL ({error}); give one that begins with https://") from error
    if not host or parts.scheme not in ("http", "https") or any(ord(letter) <= 32 for letter in url):
        raise DownloadError(
            f"not a URL that can be fetched: {parts.scheme}://{host or ''}; give one that begins with https://"
        )
    if parts.username is not None or parts.password is not None:
        raise DownloadError(f"the URL for {host} holds a user name or password; leave them out")
    port = port or (443 if parts.scheme == "https" else 80)
    name = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    allowed = name in {entry.lower() for entry in allow}
    if parts.scheme != "https" and not allowed:
        raise DownloadError(f"{name} was asked for without https; use https, or put {name} on the allow-list")
    path = quote(urlunsplit(("", "", parts.path or "/", parts.query, "")), safe="/?%:@!$&'()*+,;=~-._[]")
    return Target(parts.scheme, host, port, path, allowed)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, also by what it embeds (mapped, 6to4, Teredo, NAT64)."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        teredo = found.teredo
        embedded = [found.ipv4_mapped, found.sixtofour, *(teredo or ())]
        if found in _NAT64:
            embedded.append(ipaddress.IPv4Address(int(found) & 0xFFFFFFFF))
        inner = [item for item in embedded if item is not None]
        if inner:
            return all(is_public(str(item)) for item in inner)
    site_local = isinstance(found, ipaddress.IPv6Address) and found.is_site_local
    return found.is_global and not found.is_multicast and not site_local


def _addresses(target: Target) -> list[str]:
    """The addresses of a host that may be connected to, in the order of the resolver."""
    try:
        rows = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise DownloadError(f"{target.host} cannot be found ({error}); check the name and the connection") from error
    found = list(dict.fromkeys(str(row[4][0]) for row in rows))
    usable = found if target.allowed else [address for address in found if is_public(address)]
    if not usable:
        raise DownloadError(
            f"{target.host} is an address of a private network, which is refused; "
            f"put {target.host}:{target.port} on the allow-list if it is meant"
        )
    return usable


class _Connection(http.client.HTTPConnection):
    """A connection to addresses that were checked, in place of whatever the name resolves to later."""

    def __init__(self, target: Target, timeout: float, clock: _Clock) -> None:
        super().__init__(target.host, target.port, timeout=timeout)
        self.target = target
        self.clock = clock

    def connect(self) -> None:
        failure: OSError | None = None
        for address in _addresses(self.target):
            try:
                self.sock = socket.create_connection((address, self.port), self.timeout)
                break
            except OSError as error:
                failure = error
        else:
            raise failure or OSError("no address")
        if self.target.scheme == "https":
            context = ssl.create_default_context()
            context.set_alpn_protocols(["http/1.1"])
            self.sock = context.wrap_socket(self.sock, server_hostname=self.target.host, do_handshake_on_connect=False)
            self.clock.watch(self.sock)
            self.sock.do_handshake()
        else:
            self.clock.watch(self.sock)


class _Clock:
    """Cuts the socket it watches when the time is up.

    A server that sends one byte now and then never trips the timeout of a single wait.
    """

    def __init__(self, max_seconds: float) -> None:
        self.max_seconds = max_seconds
        self.deadline = time.monotonic() + max_seconds
        self._socket: socket.socket | None = None
        self._timer = threading.Timer(max_seconds, self._cut)
        self._timer.daemon = True
        self._timer.start()

    @property
    def expired(self) -> bool:
        return time.monotonic() >= self.deadline

    def watch(self, connected: socket.socket) -> None:
        self._socket = connected
        if self.expired:
            self._cut()

    def _cut(self) -> None:
        try:
            if self._socket is not None:
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # below TLS, whose own would wait for the peer
        except OSError:
            pass  # already gone

    def stop(self) -> None:
        self._timer.cancel()

    @contextmanager
    def errors(self, shown: str) -> Iterator[None]:
        """Turn what the network raises into a DownloadError."""
        try:
            yield
        except (OSError, http.client.HTTPException) as error:
            reason = (
                f"it took longer than {self.max_seconds:g} s" if self.expired else str(error) or type(error).__name__
            )
            raise DownloadError(f"{shown} could not be fetched: {reason}; try again") from error


class Response:
    """A successful answer, whose body is read by iterating over ``chunks`` once."""

    def __init__(self, raw: http.client.HTTPResponse, target: Target, max_bytes: int, clock: _Clock) -> None:
        self.headers = raw.headers
        self.url = target.shown
        self.size = _content_length(raw, self.url)
        self._raw = raw
        self._max_bytes = max_bytes
        self._clock = clock
        if self.size is not None and self.size > max_bytes:
            raise DownloadError(f"{self.url} is {self.size} bytes long, more than the {max_bytes} that are allowed")

    def chunks(self) -> Iterator[bytes]:
        """The body in pieces.

        Raises:
            DownloadError: it is longer than the cap, shorter than announced, or took too long.
        """
        received = 0
        while piece := self._read():
            received += len(piece)
            if received > self._max_bytes:
                raise DownloadError(f"{self.url} is longer than the {self._max_bytes} bytes that are allowed")
            yield piece
        if self._clock.expired:
            raise DownloadError(f"{self.url} could not be fetched: it took longer than {self._clock.max_seconds:g} s")
        if self.size is not None and received != self.size:
            raise DownloadError(f"{self.url} ended after {received} of {self.size} bytes; try again")

    def _read(self) -> bytes:
        with self._clock.errors(self.url):
            return self._raw.read1(CHUNK)


def _content_length(raw: http.client.HTTPResponse, shown: str) -> int | None:
    if raw.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise DownloadError(f"{shown} came in an encoding that was not asked for; it cannot be checked")
    return raw.length  # None where the body is sent in chunks, which announce their own ends


@contextmanager
def get(
    url: str,
    *,
    max_bytes: int,
    timeout: float = 30.0,
    max_seconds: float = 3600.0,
    allow: Collection[str] = (),
) -> Iterator[Response]:
    """Fetch ``url``; the connection lives as long as the context.

    Args:
        max_bytes: the longest body that is read.
        timeout: seconds that one wait for the network may take.
        max_seconds: seconds that the whole may take, redirects and body included.
        allow: ``host:port`` entries that may be private and may do without https.

    Raises:
        DownloadError: refused by a guard, not answered with success, or broken off; also while the body is read.
    """
    shown = url.partition("?")[0]
    clock = _Clock(max_seconds)
    connection: _Connection | None = None
    try:
        for _ in range(MAX_REDIRECTS + 1):
            target = check_url(url, allow)
            connection = _Connection(target, timeout, clock)
            raw = _ask(connection, clock)
            location = raw.headers.get("Location")
            if raw.status in _REDIRECTS and location:
                raw.close()
                connection.close()
                url = urljoin(url, location)
                continue
            with closing(raw):
                if raw.status != 200:
                    raise DownloadError(f"{target.shown} answered {raw.status} {raw.reason}; check the address")
                yield Response(raw, target, max_bytes, clock)
                return
        raise DownloadError(f"{shown} redirects more than {MAX_REDIRECTS} times; give the final address")
    finally:
        clock.stop()
        if connection is not None:
            connection.close()


def _ask(connection: _Connection, clock: _Clock) -> http.client.HTTPResponse:
    target = connection.target
    with clock.errors(target.shown):
        headers = {"Accept-Encoding": "identity", "User-Agent": "lightweight-engine"}
        connection.request("GET", target.path, headers=headers)
        return connection.getresponse()
