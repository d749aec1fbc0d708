"""Texts over steps: ``[from:to:when]``, ``[to:when]``, ``[from::when]`` and ``[a|b]``, nested at will.

Round and plain square brackets are emphasis and pass through. Brackets and colons that form nothing are text; a ``|``
that forms nothing, or a backslash with nothing to escape, makes the whole prompt one text, as in the reference.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

_TOKEN = re.compile(r"[^\\\[\]():|]+|\\.|.", re.DOTALL)
_NUMBER = re.compile(r"\s*([-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)\s*")
_CLOSES = {")": "(", "]": "["}


@dataclass(frozen=True)
class _Alternate:
    """``[a|b]``: each step the next option."""

    options: tuple[list[_Node], ...]

    def at(self, step: int) -> list[_Node]:
        return self.options[(step - 1) % len(self.options)]


@dataclass(frozen=True)
class _Switch:
    """``[before:after:when]``: ``before`` up to and with step ``when``."""

    before: list[_Node]
    after: list[_Node]
    when: int

    def at(self, step: int) -> list[_Node]:
        return self.before if step <= self.when else self.after


_Node = str | _Alternate | _Switch


@dataclass
class _Bracket:
    """An open bracket: where it stands in the output, and the separators directly inside it."""

    kind: str
    start: int
    separators: list[tuple[int, str]] = field(default_factory=list)
    valid: bool = True


class _Unparseable(Exception):
    """The whole prompt is one text."""


class _Parser:
    """One pass with a stack: a bracket pair that forms nothing stays text, and so do all pairs around it."""

    def __init__(self, steps: int, base_steps: int | None) -> None:
        self.steps = steps
        self.base_steps = base_steps
        self.out: list[_Node] = []
        self.stack: list[_Bracket] = []
        self.boundaries: set[int] = {steps}

    def parse(self, text: str) -> list[_Node]:
        for match in _TOKEN.finditer(text):
            token = match[0]
            if token in ("(", "["):
                self.stack.append(_Bracket(token, len(self.out)))
                self.out.append(token)
            elif token in (")", "]"):
                self.close(token)
            elif token in (":", "|"):
                if self.stack:
                    self.stack[-1].separators.append((len(self.out), token))
                elif token == "|":
                    raise _Unparseable
                self.out.append(token)
            elif token in ("\\", "\\\n"):
                raise _Unparseable
            else:
                self.out.append(token)
        self.abandon()
        return self.out

    def abandon(self) -> None:
        """No open bracket can form anything any more."""
        if any(mark == "|" for bracket in self.stack for _, mark in bracket.separators):
            raise _Unparseable
        self.stack.clear()

    def close(self, token: str) -> None:
        if not self.stack or self.stack[-1].kind != _CLOSES[token]:
            self.abandon()
            self.out.append(token)
            return
        bracket = self.stack.pop()
        node = self.form(bracket) if bracket.valid and token == "]" and bracket.separators else None
        if node is not None:
            self.out[bracket.start :] = [node]
            return
        marks = [mark for _, mark in bracket.separators]
        if "|" in marks:
            raise _Unparseable
        emphasis = bracket.valid and len(marks) <= (1 if token == ")" else 0)
        if not emphasis and self.stack:
            self.stack[-1].valid = False
        self.out.append(token)

    def form(self, bracket: _Bracket) -> _Node | None:
        """What a square bracket with separators means, if anything."""
        places = [bracket.start, *(place for place, _ in bracket.separators), len(self.out)]
        options = [self.out[start + 1 : end] for start, end in pairwise(places)]
        marks = {mark for _, mark in bracket.separators}
        if marks == {"|"}:
            self.boundaries.update(range(1, self.steps + 1))
            return _Alternate(tuple(options))
        if marks == {":"} and len(options) <= 3 and (when := self.when(options[-1])) is not None:
            return _Switch(options[0] if len(options) == 3 else [], options[-2], when)
        return None

    def when(self, nodes: list[_Node]) -> int | None:
        """The step that a number names: a share of the steps if it has a point, counted on from the first pass."""
        number = _NUMBER.fullmatch(nodes[0]) if len(nodes) == 1 and isinstance(nodes[0], str) else None
        if number is None:
            return None
        value = float(number[1])
        if "." in number[1]:
            value = (value - (0.0 if self.base_steps is None else 1.0)) * self.steps
        else:
            value -= self.base_steps or 0
        when = int(max(min(value, self.steps), -1))
        if when >= 1:
            self.boundaries.add(when)
        return when


def _text_at(nodes: list[_Node], step: int) -> str:
    """The text of one step, by a stack of iterators, as nesting may be deeper than Python's own stack."""
    parts: list[str] = []
    stack: list[Iterator[_Node]] = [iter(nodes)]
    while stack:
        node = next(stack[-1], None)
        if node is None:
            stack.pop()
        elif isinstance(node, str):
            parts.append(node)
        else:
            stack.append(iter(node.at(step)))
    return "".join(parts)


def schedule(text: str, steps: int, base_steps: int | None = None) -> list[tuple[int, str]]:
    """The texts of a prompt with the last step (from 1) that uses each, in order; the last step is ``steps``.

    Args:
        base_steps: of the first pass, when this is the hires pass: step numbers count on from it, and shares from 1.
    """
    parser = _Parser(steps, base_steps)
    try:
        nodes = parser.parse(text)
    except _Unparseable:
        return [(steps, text)]
    known: dict[str, str] = {}  # an alternation repeats its texts: keep one copy of each
    texts = ((step, _text_at(nodes, step)) for step in sorted(parser.boundaries))
    return [(step, known.setdefault(text, text)) for step, text in texts]
