"""Bodies of requests: JSON, read up to a limit, and without what parsers are known to disagree about."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any

from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive

from ...config import EngineConfig
from ...errors import RequestError
from ...lora_spec import LoraSpec
from ...request import MODEL_FIELDS
from .faults import BodyTimeoutError, BodyTooLargeError, MalformedBodyError, MediaTypeError, UnavailableError

MOST_SEPARATORS = 2**16
"""Commas and brackets of a body, in its texts too: no request needs a tenth. A picture has none, however large it is,
while each value costs the front some hundred times its bytes."""
LONGEST_INTEGER = 1000  # digits; no field takes twenty, and the time to read one grows with their square
LONGEST_AT_ONCE = 2**16  # bytes of a body that are read within milliseconds; a thread reads a longer one
LONGEST_IDLE = 2**20  # bytes of a body where none is taken, that are looked at
PASSES = ("adetailer_args", "adetailer_args_hands", "adetailer_passes")
"""Fields that hold arguments of the detailer."""
DEEPEST = 8  # levels of a body in which the place of a fault is looked for; no field lies deeper


class Intake:
    """What the bodies under way may take of the front, all together, and how long each may take to come."""

    def __init__(self, max_bytes: int, seconds: float) -> None:
        self.max_bytes, self.seconds = max_bytes, seconds
        self.held = 0

    @classmethod
    def of(cls, config: EngineConfig) -> Intake:
        """As many bodies of full length as jobs may wait or run, and one more that is being sent."""
        return cls(int((config.queue_max + 2) * config.max_body_mib * 2**20), config.body_seconds)


class Incoming:
    """A body on its way, whoever reads it. Its room is taken until the request is over: a job that waits holds it."""

    def __init__(self, receive: Receive, intake: Intake) -> None:
        self._receive, self._intake = receive, intake
        self._deadline = asyncio.get_running_loop().time() + intake.seconds
        self._size = 0
        self._whole = False

    async def receive(self) -> Message:
        """The next message of the request.

        Raises:
            BodyTimeoutError: it did not come in time.
            UnavailableError: there is no room for more bodies now.
        """
        if self._whole:  # what comes now is that the caller has hung up
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            told = f"the body took longer than {self._intake.seconds:g} s (setting body_seconds); send it faster"
            raise BodyTimeoutError(told, headers={"Connection": "close"}) from None
        self._whole = not message.get("more_body", False)
        self._take(len(message.get("body", b"")))
        return message

    def close(self) -> None:
        """The request is over."""
        self._intake.held -= self._size
        self._size = 0

    def _take(self, size: int) -> None:
        self._size += size
        self._intake.held += size
        if size and self._intake.held > self._intake.max_bytes:
            told = "other requests take all the room that there is for bodies; try again"
            raise UnavailableError(told, headers={"Retry-After": "5", "Connection": "close"})


async def read_json(request: Request, max_bytes: int) -> dict[str, Any]:
    """The JSON object that a request brings. Others are answered while a long one is read.

    Raises:
        MediaTypeError: it is said to be something else.
        BodyTooLargeError: it is longer than ``max_bytes``, and no more than that was read; or it has too many values.
        BodyTimeoutError, UnavailableError: as of ``Incoming``.
        MalformedBodyError: it is no JSON object, or has a key twice.
        RequestError: it holds a number that is not finite, or a text that no encoding knows.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        told = f"the body is {kind!r:.80}" if kind else "the body has no type"
        raise MediaTypeError(f"{told}; send JSON, with Content-Type: application/json")
    body = await _read(request, max_bytes)
    return await asyncio.to_thread(_parsed, body) if len(body) > LONGEST_AT_ONCE else _parsed(body)


def _parsed(body: bytes) -> dict[str, Any]:
    if not body.strip():
        raise MalformedBodyError("the body is empty; send an object of fields")
    if (count := sum(map(body.count, (b",", b"[", b"{")))) > MOST_SEPARATORS:
        told = f"the body has {count:,} commas and brackets, over the limit of {MOST_SEPARATORS:,}; send fewer values"
        raise BodyTooLargeError(told)
    odd: list[str] = []
    number = partial(_number, odd=odd)
    numbers = {"parse_int": _integer, "parse_float": number, "parse_constant": number}
    try:
        parsed = json.loads(body.decode("utf-8"), object_pairs_hook=_object, **numbers)
    except RecursionError:
        raise MalformedBodyError("the body is nested too deeply; send a flat object of fields") from None
    except ValueError as error:  # also of UTF-8, and of integers that are too long
        raise MalformedBodyError(f"the body is not valid JSON ({str(error)[:100]}); correct it") from None
    if b"\\u" in body and not _is_text(parsed):
        place = next(_places(parsed, _is_broken), "")
        told = f"{place}: the text" if place else "a text"
        raise RequestError(f"{told} holds half a character (a lone surrogate); send whole ones", field=place or None)
    if odd:
        place = next(_places(parsed, _is_infinite), "")
        told = f"{place}: {odd[0]:.40} is not finite" if place else f"the number {odd[0]:.40} is not finite"
        raise RequestError(f"{told}; send a number that is", field=place or None)
    if not isinstance(parsed, dict):
        raise MalformedBodyError(f"the body is {_kind(parsed)}, and not an object of fields; send one")
    return parsed


def without_nulls(kind: type[BaseModel], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a body that say something: null is as if what may be left out were left out, as clients that know
    all fields send it. So it is in the objects that fields hold; other nulls stay, to be refused."""
    said = _without(_optional(kind), fields)
    return {name: _within(name, value) for name, value in said.items()}


def _without(optional: Collection[str], fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None or name not in optional}


def _optional(kind: type[BaseModel]) -> set[str]:
    return {name for name, field in kind.model_fields.items() if not field.is_required()}


def _within(name: str, value: Any) -> Any:
    """What a field holds: an object or a list of them, without nulls."""
    if name == "loras":
        optional = _optional(LoraSpec)
    elif name in PASSES and isinstance(value, dict | list):
        from ...extensions.detailer_args import DISABLE, ADetailerArgs  # which no other request needs

        optional = _optional(ADetailerArgs) | {DISABLE}
    else:
        return value
    if isinstance(value, list):
        return [_without(optional, each) if isinstance(each, dict) else each for each in value]
    return _without(optional, value) if isinstance(value, dict) else value


async def refuse_fields(request: Request) -> None:
    """What a route of our own API depends on that takes no body: what is sent there would be without effect.

    Raises:
        RequestError: there is a body that says something; with its first field, where it has fields.
        BodyTooLargeError, BodyTimeoutError, UnavailableError: as of ``read_json``.
    """
    if request.method not in ("POST", "DELETE"):
        return
    try:
        body = (await _read(request, LONGEST_IDLE)).strip()
        said = json.loads(body) if body else None
    except BodyTooLargeError as error:
        raise BodyTooLargeError("this address takes no body; leave it out", headers=error.headers) from None
    except (ValueError, RecursionError):
        said = "no JSON"
    if isinstance(said, dict) and said:
        name = next(iter(said))
        hint = "the model is named in the request that draws" if name in MODEL_FIELDS else "leave it out"
        raise RequestError(f"{name:.80}: this address takes no fields; {hint}", field=name[:80])
    if said not in (None, {}):
        raise RequestError("this address takes no body; leave it out")


def _kind(parsed: Any) -> str:
    """What a value is called in JSON."""
    names = {list: "a list", str: "a text", type(None): "null", bool: "a switch"}
    return names.get(type(parsed), "a number")


def _is_text(parsed: Any) -> bool:
    """Whether all texts can be written as UTF-8."""
    try:
        json.dumps(parsed, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


async def _read(request: Request, max_bytes: int) -> bytes:
    told = request.headers.get("content-length", "")
    if told.isdecimal() and int(told) > max_bytes:
        raise _too_large(max_bytes)
    pieces, size = [], 0
    try:
        async for piece in request.stream():
            size += len(piece)
            if size > max_bytes:
                raise _too_large(max_bytes)
            pieces.append(piece)
    except ClientDisconnect:
        raise MalformedBodyError("the body broke off; send it whole") from None
    return b"".join(pieces)


def _too_large(max_bytes: int) -> BodyTooLargeError:
    message = f"the body is longer than {max_bytes >> 20} MiB (setting max_body_mib); send smaller or fewer pictures"
    return BodyTooLargeError(message, headers={"Connection": "close"})  # what is still to come is not read


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name in counts if counts[name] > 1)
        raise MalformedBodyError(f"the key {twice!r:.80} is there twice; send it once", param=twice[:80])
    return made


def _integer(text: str) -> int:
    if len(text) > LONGEST_INTEGER:
        raise ValueError(f"a number of {len(text):,} digits")
    return int(text)


def _number(text: str, odd: list[str]) -> float:
    """A number; the texts of those that are not finite come into ``odd``."""
    number = float(text)
    if not math.isfinite(number):
        odd.append(text)
    return number


def _places(parsed: Any, is_odd: Callable[[Any], bool], place: str = "", depth: int = 0) -> Iterator[str]:
    """Where odd values stand, in the order of the text: ``seed``, ``loras[0].scale``. A name that is odd itself, and so
    cannot be told, is at the place of its object."""
    if depth > DEEPEST:
        return
    if isinstance(parsed, dict):
        for name, value in parsed.items():
            if is_odd(name):
                yield place
            else:
                yield from _places(value, is_odd, f"{place}.{name:.80}".removeprefix("."), depth + 1)
    elif isinstance(parsed, list):
        for number, value in enumerate(parsed):
            yield from _places(value, is_odd, f"{place}[{number}]", depth + 1)
    elif is_odd(parsed):
        yield place


def _is_infinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _is_broken(value: Any) -> bool:
    return isinstance(value, str) and not _is_text(value)
