"""Messages as their readers may have them: without folders and secrets, with the names that the readers know, and
with a word on advice that is for others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from ..config import EngineConfig
from ..request import GenerationRequest

# An absolute path in a message; its last part is what tells a caller which file is meant.
_PATH = re.compile(r"(?<![\w.:/…-])/(?:[^\s/'\",;:()]+/)+([^\s/'\",;:()]*)")

# Settings by whole words; those that a request has as well are a caller's.
_SETTINGS = [name for name in EngineConfig.model_fields if "_" in name and name not in GenerationRequest.model_fields]
_ADVICE = (
    rf"(?:add|set|raise|choose|see)\b[^;,]*?(?:the setting \w+|output folder|`tokens`|\b(?:{'|'.join(_SETTINGS)})\b)",
    r"(?:change|check|mend)\b[^;,]*? permissions",
    r"check the file with",
    r"pip install",
    r"put (?:it|the file|\S+ of FLUX)",
    r"free (?:some )?space",
    r"switch it off",
)
_OPERATORS = re.compile(rf"\b(?:{'|'.join(_ADVICE)})[^;,]*?(?=,? or |[;,]|$)")
"""Advice on settings, packages, files and disks, to where it ends."""

# The field that a message begins with, and its place where the field is a list.
_FIELD = re.compile(r"(?P<name>\w+)(?P<place>\[\d+\])?")
_FIRST_FIELDS = re.compile(r"^\w+(?:\[\d+\])?(?:(?=[:.])|(?:, \w+)*(?= had no effect ))")

# The query of an address may hold a token, and what stands before its @ a password.
_ADDRESS = re.compile(r"(https?://)(?:[^\s/@'\"]*@)?([^\s?#'\"]*)(?:[?#][^\s'\"]*)?", re.IGNORECASE)
_BEARER = re.compile(r"\b(bearer|basic)\s+[!-~]+", re.IGNORECASE)


class Redactor:
    """Takes secrets out of a text: those that are known, and what looks like one."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        known = sorted(filter(None, secrets), key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, known))) if known else None

    def __call__(self, text: str) -> str:
        text = self._known.sub("***", text) if self._known else text
        return _BEARER.sub(r"\1 ***", _ADDRESS.sub(r"\1\2", text))


def without_paths(text: str) -> str:
    """A message with the folders of absolute paths left out."""
    return _PATH.sub(r"…/\1", text)


def for_callers(text: str) -> str:
    """A message whose advice is for the operator of the service alone, with a word on that where it is first given.

    Callers have no command line: what it would say is left out beside another way to learn it.
    """
    text = text.replace("`generate --help` or ", "").replace(" by `lora add FILE`", "")
    return _OPERATORS.sub(r"\g<0> (as the operator of this service can)", text, count=1)


def their_name(field: str, names: Mapping[str, str]) -> str:
    """What a caller knows a field as.

    Args:
        names: theirs by ours, with ``[]`` where the place in a list belongs; without a place, all of the list is meant.
            A field with its place may have a name of its own. What follows a dot stays.
    """
    found = _FIELD.match(field)
    rest = field[found.end() :] if found else ""
    if found is None or (rest and not rest.startswith(".")):
        return field
    if found["place"] and found[0] in names:
        return names[found[0]] + rest
    if found["name"] not in names:
        return field
    name, _, within = names[found["name"]].partition("[]")
    placed = found["place"] and "[]" in names[found["name"]]
    return (f"{name}{found['place']}{within}" if placed else name) + rest


def with_their_names(message: str, names: Mapping[str, str]) -> str:
    """A message that begins with a field, or with those that had no effect, with the names that its reader knows."""
    return _FIRST_FIELDS.sub(lambda found: ", ".join(their_name(each, names) for each in found[0].split(", ")), message)
