"""What every request passes first: its host, where it comes from, its key; and what every answer carries."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...config import EngineConfig
from .bodies import Incoming, Intake
from .faults import Fault, ForbiddenError, Refusal, UnauthorizedError, WrongHostError
from .logs import REQUEST_ID
from .metrics import Metrics

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
METRICS_PATH = "/metrics"
OPEN_PATHS = frozenset({"/livez", "/readyz", "/health"})
"""Answered without a key, as what watches over a service has none. They tell no more than the state then."""
ANYONE = "anyone"
"""The caller who sent no key that is known."""
PROBED_PATHS = frozenset({"/livez", "/readyz"})
"""Answered by whatever name, as probes of clusters and balancers ask by an address of their own. A web page that
somebody's DNS points here learns nothing by them."""

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")

REQUEST_ID_FORM = r"[A-Za-z0-9._-]{1,64}"
_REQUEST_ID = re.compile(REQUEST_ID_FORM)
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; sandbox",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rules:
    """Who may call.

    Attributes:
        names: that the service is known by, beside the address that a connection reached it at.
        origins: of web pages that may call it.
        keys: of which a caller has to send one, where there are any.
        metrics_key: opens the metrics and nothing else.
    """

    names: frozenset[str]
    origins: frozenset[str]
    keys: tuple[str, ...]
    metrics_key: str | None = None

    @classmethod
    def of(cls, config: EngineConfig) -> Rules:
        names = LOOPBACK_NAMES | {config.host.lower(), *config.host_names}
        keys = tuple(key.get_secret_value() for key in config.api_keys)
        metrics_key = config.metrics_key.get_secret_value() if config.metrics_key else None
        return cls(names, frozenset(config.allowed_origins), keys, metrics_key)

    def check(self, scope: Scope, headers: Headers) -> str:
        """The caller, as a name for its key.

        Raises:
            Refusal: it may not call.
        """
        if scope["path"] not in PROBED_PATHS:
            self._check_host(scope, headers)
        self._check_origin(scope, headers)
        try:
            return self._caller(headers)
        except UnauthorizedError:
            if scope["path"] in OPEN_PATHS or (scope["path"] == METRICS_PATH and self._may_watch(headers)):
                return ANYONE
            raise

    def _may_watch(self, headers: Headers) -> bool:
        return self.metrics_key is not None and hmac.compare_digest(
            self.metrics_key.encode(), _key_of(headers).encode()
        )

    def _check_host(self, scope: Scope, headers: Headers) -> None:
        """A name that is not ours is one that somebody's DNS made point here, so that a web page may call us."""
        name = _hostname(f"//{headers.get('host', '')}")
        reached = str((scope.get("server") or ("",))[0]).lower()
        if name is None or name not in self.names | {reached}:
            raise WrongHostError(f"the service is not called {name!r:.80}; add the name to the setting host_names")

    def _check_origin(self, scope: Scope, headers: Headers) -> None:
        origin = headers.get("origin")
        site = headers.get("sec-fetch-site", "none").lower()
        if origin is not None:
            own = f"{scope['scheme']}://{headers.get('host', '')}".lower()
            if origin.lower() not in self.origins | {own}:
                raise ForbiddenError("pages of that origin may not call the service; see the setting allowed_origins")
        elif site == "cross-site" and not (scope["method"] == "GET" and scope["path"] == "/"):
            raise ForbiddenError("pages of other sites may not call the service; see the setting allowed_origins")

    def _caller(self, headers: Headers) -> str:
        if not self.keys:
            return ANYONE
        given = _key_of(headers).encode()
        fitting = [key for key in self.keys if hmac.compare_digest(key.encode(), given)]  # each is compared
        if not fitting:
            how = "send Authorization: Bearer KEY, or X-API-Key"
            told = "the key is not known" if given else "a key is needed"
            raise UnauthorizedError(f"{told}; {how}", headers={"WWW-Authenticate": 'Bearer, Basic realm="engine"'})
        return hashlib.sha256(fitting[0].encode()).hexdigest()[:16]


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _key_of(headers: Headers) -> str:
    """The key of a request: a bearer token, the password of Basic, as clients of A1111's API send it, or X-API-Key."""
    scheme, _, value = headers.get("authorization", "").strip().partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return headers.get("x-api-key", "")


class Guard:
    """ASGI middleware around the whole application. Sets ``request_id`` and ``caller`` of ``request.state``.

    A ``fault`` that is set there is logged with the answer.
    """

    def __init__(self, app: ASGIApp, rules: Rules, intake: Intake, metrics: Metrics) -> None:
        self.app, self.rules, self.intake, self.metrics = app, rules, intake, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        REQUEST_ID.set(request_id)
        scope.setdefault("state", {})["request_id"] = request_id
        begin, status = time.perf_counter(), 0
        incoming = Incoming(receive, self.intake)

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _dress(MutableHeaders(scope=message), request_id)
            await send(message)

        try:
            await self._pass(scope, incoming.receive, sending, headers)
        except Exception:  # of any kind: the caller learns that there was one, the log which
            log.exception("a request failed unexpectedly")
            fault = scope["state"]["fault"] = Fault.unexpected()
            if not status:
                await answer(fault, request_id, self.metrics)(scope, receive, sending)
        finally:
            incoming.close()
            self._note(scope, status, time.perf_counter() - begin)

    async def _pass(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        try:
            scope["state"]["caller"] = self.rules.check(scope, headers)
        except Refusal as error:
            fault = scope["state"]["fault"] = Fault.of(error)
            await answer(fault, scope["state"]["request_id"], self.metrics)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self.metrics.requests.observe(seconds, method=_method(scope["method"]), route=route, status=str(status))
        fault: Fault | None = scope["state"].get("fault")
        facts = {"method": scope["method"], "path": scope["path"][:200], "client": address_of(scope) or None}
        told = {**(fault.logged if fault else {}), "status": status, "seconds": round(seconds, 4)}
        usual = scope["path"] in OPEN_PATHS and fault is None
        log.log(logging.DEBUG if usual else logging.INFO, "answered", extra={**facts, **told})


def address_of(scope: Scope) -> str:
    """Where a request came from: the other end of its connection, as headers that say otherwise may be anybody's."""
    return (scope.get("client") or ("",))[0]


def answer(fault: Fault, request_id: str | None, metrics: Metrics) -> JSONResponse:
    """The answer to a request that failed."""
    metrics.errors.add(type=fault.type)
    return JSONResponse(fault.body(request_id), fault.status, headers=dict(fault.headers))


def answer_unread(fault: Fault, metrics: Metrics) -> JSONResponse:
    """The answer to what never became a request; the connection ends with it."""
    request_id = secrets.token_hex(8)
    response = answer(fault, request_id, metrics)
    _dress(response.headers, request_id)
    response.headers["Connection"] = "close"
    return response


def _dress(headers: MutableHeaders, request_id: str) -> None:
    added: Mapping[str, str] = {**_HEADERS, "X-Request-ID": request_id}
    for name, value in added.items():
        headers.setdefault(name, value)


def _method(given: str) -> str:
    return given if given in METHODS else "other"
