"""The only place that opens sockets to others: a guarded GET, which can go on from where an earlier one broke off, and
a guarded POST.

Guards: https on its own port only, public addresses only (checked after the name is resolved, and the checked address
is the one that is connected to, so that a second answer of the name server changes nothing), at most five redirects,
each checked anew, caps on bytes and time, and a least speed. An ``allow`` list of ``host:port`` lifts the first two for
a server of one's own. Tokens go in a header to their own host alone. Messages name the host and nothing else of a URL.
"""

from __future__ import annotations

import http.client
import re
import socket
import ssl
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import urljoin

from ..errors import (
    DownloadBrokenError,
    DownloadError,
    DownloadTimeoutError,
    DownloadTooLargeError,
    InvalidURLError,
    WrongContentError,
)
from .addresses import is_public
from .urls import PORTS, Target, check_url, private_network

MAX_REDIRECTS = 5
USER_AGENT = "lightweight-engine"
CHUNK = 1 << 18
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")

# Status -> the one thing to do about it.
_FIXES = {
    401: "it wants a token: set one for this host in `tokens`",
    403: "it wants a token with more rights, or the address has expired: set one for this host in `tokens`",
    404: "check the address",
    410: "it has been removed; use another address",
    429: "wait, then try again",
}


@dataclass(frozen=True)
class Limits:
    """What one fetch may take.

    Attributes:
        max_bytes: the longest file.
        timeout: seconds that one wait for the network may take.
        max_seconds: seconds for the whole, redirects and body included.
        min_speed: bytes a second that a body must reach over each ``timeout``; 0 asks for none.
    """

    max_bytes: int
    timeout: float = 30.0
    max_seconds: float = 3600.0
    min_speed: float = 0.0


@dataclass(frozen=True)
class Access:
    """Whom one may connect to, and as whom.

    Attributes:
        allow: ``host:port`` entries that may be private and may do without https.
        tokens: host (``host:port`` where the port is not that of https) to bearer token. Never sent to another host,
            nor to any host after a redirect from another.
    """

    allow: Collection[str] = ()
    tokens: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Resume:
    """What an earlier fetch left: ``start`` bytes of a file of ``size`` (None: not known) and ``validator``, the mark
    by which the server tells whether it is still the same."""

    start: int
    size: int | None = None
    validator: str = ""


def _addresses(target: Target) -> list[str]:
    """The addresses of a host that may be connected to, in the order of the resolver."""
    try:
        rows = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise DownloadError(f"{target.host} cannot be found ({error}); check the name and the connection") from error
    found = list(dict.fromkeys(str(row[4][0]) for row in rows))
    usable = found if target.allowed else [address for address in found if is_public(address)]
    if not usable:
        raise private_network(target)
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

    def late(self, shown: str) -> DownloadTimeoutError:
        return DownloadTimeoutError(
            f"{shown} could not be fetched: it took longer than {self.max_seconds:g} s; "
            "try again, or raise download_seconds"
        )

    @contextmanager
    def errors(self, shown: str, kind: type[DownloadError] = DownloadError) -> Iterator[None]:
        """Turn what the network raises into ``kind``, or into a DownloadTimeoutError."""
        try:
            yield
        except (OSError, http.client.HTTPException) as error:
            if self.expired:
                raise self.late(shown) from None
            if isinstance(error, TimeoutError):
                raise DownloadTimeoutError(f"{shown} timed out; try again, or raise download_timeout") from None
            # The text of an HTTPException is the server's, which may repeat what it was sent.
            reason = str(error) if isinstance(error, OSError) and str(error) else type(error).__name__
            raise kind(f"{shown} could not be fetched: {reason}; try again") from None


class Response:
    """A successful answer, whose body is read by iterating over ``chunks`` once.

    Attributes:
        start: how many bytes of the file were left out, as asked; 0 where the server sends it whole.
        size: bytes of the whole file; None where it is not told.
        validator: to be given back when the rest is asked for.
        is_page: whether the server calls it a web page.
    """

    def __init__(self, raw: http.client.HTTPResponse, target: Target, limits: Limits, clock: _Clock) -> None:
        self.headers = raw.headers
        self.url = target.shown
        self.start, self.size = _extent(raw)
        self.validator = _validator(raw)
        self.is_page = raw.headers.get_content_type() in ("text/html", "application/xhtml+xml")
        self._raw, self._limits, self._clock = raw, limits, clock
        if raw.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise WrongContentError(f"{self.url} sent an encoding that was not asked for; use another address")
        if self.size is not None and self.size > limits.max_bytes:
            raise DownloadTooLargeError(
                f"{self.url} offers {self.size:,} bytes, more than the {limits.max_bytes:,} that are allowed"
            )

    def chunks(self) -> Iterator[bytes]:
        """The body in pieces.

        Raises:
            DownloadTooLargeError: the file is longer than the cap.
            DownloadTimeoutError: it took too long, or came too slowly.
            DownloadBrokenError: it is shorter than announced.
        """
        received, pace = self.start, _Pace(self._limits)
        while piece := self._read():
            received += len(piece)
            if received > self._limits.max_bytes:
                raise DownloadTooLargeError(f"{self.url} sent more than the {self._limits.max_bytes:,} bytes allowed")
            if not pace.keeps(len(piece)):
                raise DownloadTimeoutError(
                    f"{self.url} sends less than {self._limits.min_speed:,.0f} bytes a second; "
                    "try again, or use another address"
                )
            yield piece
            if self._clock.expired:
                break
        if self._clock.expired and received != self.size:
            raise self._clock.late(self.url)
        if self.size is not None and received != self.size:
            raise DownloadBrokenError(f"{self.url} broke off after {received:,} of {self.size:,} bytes; try again")

    def _read(self) -> bytes:
        with self._clock.errors(self.url, DownloadBrokenError):
            return self._raw.read1(CHUNK)


class _Pace:
    """The speed of a body, looked at once in each ``timeout``: a server that trickles holds a place for hours."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.began, self.count = time.monotonic(), 0

    def keeps(self, count: int) -> bool:
        self.count += count
        took = time.monotonic() - self.began
        if took < self.limits.timeout:
            return True
        enough = self.count >= self.limits.min_speed * took
        self.began, self.count = time.monotonic(), 0
        return enough


def _extent(raw: http.client.HTTPResponse) -> tuple[int, int | None]:
    """Where the body starts in the file, and the file's size; None where the body is sent in chunks."""
    found = _RANGE.fullmatch(raw.headers.get("Content-Range", "")) if raw.status == 206 else None
    if found is None:
        return 0, raw.length
    start, whole = int(found[1]), found[2]
    return start, int(whole) if whole != "*" else None if raw.length is None else start + raw.length


def _validator(raw: http.client.HTTPResponse) -> str:
    """The mark of this very content. A weak one says only that another would do as well."""
    etag = raw.headers.get("ETag", "")
    return etag if etag.startswith('"') else raw.headers.get("Last-Modified", "")


@contextmanager
def get(
    url: str, limits: Limits, access: Access | None = None, *, resume: Resume | None = None, token: str | None = None
) -> Iterator[Response]:
    """Fetch ``url``; the connection lives as long as the context.

    Args:
        resume: asks for the rest only; where the server cannot, or has another file now, the whole comes
            (``Response.start`` tells).
        token: to be sent to the host of ``url`` in place of that of ``access``.

    Raises:
        DownloadError: refused by a guard, not answered with success, or broken off; also while the body is read.
    """
    access = access or Access()
    first = check_url(url, access.allow)
    clock = _Clock(limits.max_seconds)
    connection: _Connection | None = None
    own, hops = True, 0
    try:
        while hops <= MAX_REDIRECTS:
            target = check_url(url, access.allow)
            own = own and (target.scheme, target.name) == (first.scheme, first.name)
            connection = _Connection(target, limits.timeout, clock)
            raw = _ask(connection, clock, _headers(resume, _token(target, access, token) if own else None))
            with closing(raw):
                location = raw.headers.get("Location")
                if raw.status in _REDIRECTS and location:
                    hops += 1
                    url = _joined(url, location)
                elif resume is not None and not _continues(raw, resume):
                    resume = None  # ask again, for the whole
                else:
                    _check_status(raw, target, resume)
                    yield Response(raw, target, limits, clock)
                    return
            connection.close()
        raise DownloadError(f"{first.shown} redirects more than {MAX_REDIRECTS} times; give the final address")
    finally:
        clock.stop()
        if connection is not None:
            connection.close()


def post(url: str, body: bytes, content_type: str, limits: Limits, access: Access | None = None) -> int:
    """Send ``body`` to ``url`` and return the status of the answer, which is not read; a redirect is not followed.

    Raises:
        DownloadError: refused by a guard, not reached, or not answered in time.
    """
    access = access or Access()
    target = check_url(url, access.allow)
    clock = _Clock(limits.max_seconds)
    connection = _Connection(target, limits.timeout, clock)
    try:
        with clock.errors(target.shown):
            headers = {"Content-Type": content_type, "User-Agent": USER_AGENT}
            connection.request("POST", target.path, body, headers)
            with closing(connection.getresponse()) as answer:
                return answer.status
    finally:
        clock.stop()
        connection.close()


def listening(host: str, port: int, backlog: int) -> socket.socket:
    """A socket that listens, whose connections send small pieces as they come, and not after the last one's receipt.

    asyncio does so for sockets that name their protocol, and this names none, as uvicorn wants it: each answer on a
    connection that is kept would take 40 ms.

    Raises:
        OSError: the address is none of ours, or taken.
    """
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # which accepted sockets inherit
        made.bind((host, port))
        made.listen(backlog)
    except OSError:
        made.close()
        raise
    return made


def _joined(url: str, location: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError:
        raise InvalidURLError("a redirect leads to what is not a URL; give the final address") from None


def _token(target: Target, access: Access, token: str | None) -> str | None:
    is_usual = (target.scheme, target.port) == ("https", PORTS["https"])
    return token or access.tokens.get(target.host if is_usual else target.name)


def _headers(resume: Resume | None, token: str | None) -> dict[str, str]:
    headers = {"Accept-Encoding": "identity", "User-Agent": USER_AGENT}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    if resume is not None:
        headers["Range"] = f"bytes={resume.start}-"
        if resume.validator:
            headers["If-Range"] = resume.validator
    return headers


def _continues(raw: http.client.HTTPResponse, resume: Resume) -> bool:
    """Whether an answer is the rest of the same file, or anything that is not about ranges at all."""
    if raw.status == 416:
        return False
    if raw.status != 206:
        return True
    start, size = _extent(raw)
    same = not resume.validator or resume.validator == _validator(raw)
    return start == resume.start and same and (resume.size is None or resume.size == size)


def _check_status(raw: http.client.HTTPResponse, target: Target, resume: Resume | None) -> None:
    """Refuse all but success. The server's own words are left out: they may repeat what it was sent."""
    if raw.status == 200 or (raw.status == 206 and resume is not None):
        return
    known = {status.value: status.phrase for status in HTTPStatus}
    fix = _FIXES.get(raw.status, "try again later, or use another address")
    raise DownloadError(f"{target.shown} answered {raw.status} {known.get(raw.status, '')}".rstrip() + f"; {fix}")


def _ask(connection: _Connection, clock: _Clock, headers: dict[str, str]) -> http.client.HTTPResponse:
    target = connection.target
    with clock.errors(target.shown):
        connection.request("GET", target.path, headers=headers)
        return connection.getresponse()
