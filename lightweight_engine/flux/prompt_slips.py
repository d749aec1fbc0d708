"""What looks like a weight in a prompt, and is read as words: told, as nothing else shows it."""

from __future__ import annotations

import re

from .prompt import TOKEN

# Numbers as people write them and the language does not have them: 1,3, 1e9, nan, and 1.2.3.
_NUMBER = r"[-+]*(?:\d+,\d+|\.?\d[\d.]*[eE][-+]?\d+)"
_WORD = r"[-+]?(?:nan|inf)"
_POINTS = r"[-+]?(?=\.*\d)\d*\.\d*\.[\d.]*"

# After a digit it is a time, a ratio or a verse. Points in round brackets are told as they are read.
_IN_BRACKETS = re.compile(rf"(?<!\d):(?:\s*{_NUMBER}\s*[)\]]|{_WORD}[)\]]|\s*{_POINTS}\s*\])", re.IGNORECASE)
_OF_PART = re.compile(rf"\s*(?:{_NUMBER}|{_POINTS})|{_WORD}", re.IGNORECASE)
_WEIGHT = re.compile(r"[^\s\d:(\[](:[-+]?(?:\d+(?:\.\d*)?|\.\d+))(?![\w.])")
_EXAMPLES = {")": "(word:1.3)", "]": "[from:to:0.5]"}
_LONGEST = 50  # characters of it that are told


def slips_of(text: str) -> list[str]:
    """A sentence for each number in brackets that is no weight, and for a weight in a bracket that is never closed.

    Args:
        text: one that a prompt's schedule gives, in which no bracket with a plain number of steps is left.
    """
    told = [_sentence(found[0], _EXAMPLES[found[0][-1]]) for found in _IN_BRACKETS.finditer(text)]
    start = _first_open(text)
    if start is not None and (found := _WEIGHT.search(text, start)):
        what = f"a bracket before {found[1][:_LONGEST]!r} is never closed, and reaches to the end of the prompt"
        told.append(f"{what}; close it, or write \\{text[start]} for one that is text")
    return list(dict.fromkeys(told))


def slip_of_part(text: str) -> list[str]:
    """The same of the end of a part of AND, where its share would stand."""
    head, colon, tail = text.rstrip().rpartition(":")
    odd = colon and not head[-1:].isdigit() and _OF_PART.fullmatch(tail)
    return [_sentence(f":{tail}", "word:1.3")] if odd else []


def _sentence(written: str, example: str) -> str:
    told = f"{written[:_LONGEST]!r} looks like a weight and is none, so that it was read as text"
    return f"{told}; write a plain number, as in {example}"


def _first_open(text: str) -> int | None:
    """Where the first bracket stands that is never closed, as ``parse_attention`` pairs them."""
    opened: dict[str, list[int]] = {"(": [], "[": []}
    for token in TOKEN.finditer(text):
        piece = token[0]
        if piece in opened:
            opened[piece].append(token.start())
        elif (token[1] is not None or piece == ")") and opened["("]:
            opened["("].pop()
        elif piece == "]" and opened["["]:
            opened["["].pop()
    return min((place for places in opened.values() for place in places), default=None)
