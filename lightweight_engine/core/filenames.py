"""Names of saved pictures: running numbers, patterns such as ``[seed]-[prompt_words]``, and what a file system allows.

The engine saves as ``00012-SEED``. A pattern, as the reference has them, is plain text with ``[token]`` or
``[token<argument>…]``, in any case. A token that is unknown, or whose value is not known, stays as written; one with
nothing to say (``[seed_last]`` of a single picture) also takes the text before it away.
"""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_PART = 128
MAX_WORDS = 8
_HASH_DIGITS = 8

_FORBIDDEN = dict.fromkeys(map(ord, '#<>:"/\\|?*\n\r\t\0'), "_")
_TOKEN = re.compile(r"\[([^\[\]]+)\]")
_ARGUMENTS = re.compile(r"<([^>]*)>")
_TOKEN_PARTS = re.compile(r"([^<]*)((?:<[^>]*>)*)")
_NO_LETTERS = re.compile(rf"[\s{re.escape(string.punctuation)}]+")


class _Nothing:
    """The value of a token that takes the text before it away."""


_NOTHING = _Nothing()
_Text = str | int | float | None | _Nothing
_Arguments = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class NameFacts:
    """What the tokens tell of one picture. None: not known, the token stays as written.

    ``job_prompt`` is the prompt that the job was asked for, where it differs from this picture's own.
    ``style_texts`` are the texts of the styles, to take them out of the prompt.
    """

    seed: int | None = None
    prompt: str | None = None
    negative_prompt: str = ""
    job_prompt: str | None = None
    styles: tuple[str, ...] = ()
    style_texts: Mapping[str, str] = field(default_factory=dict)
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    cfg_scale: float | None = None
    sampler: str | None = None
    denoising_strength: float | None = None
    basename: str = ""
    seeds: tuple[int, ...] = ()
    batch_index: int = 0
    batch_size: int = 1
    iteration: int = 0
    iterations: int = 1
    image: Any = None


def sanitize(text: str, *, replace_spaces: bool = True) -> str:
    """``text`` as a part of a file name: no character that a file system forbids, at most 128 long."""
    text = text.encode("utf-8", "replace").decode()
    if replace_spaces:
        text = text.replace(" ", "_")
    return text.translate(_FORBIDDEN).lstrip(" ")[:MAX_PART].rstrip(" .")


def expand(pattern: str, facts: NameFacts) -> str:
    """``pattern`` with its tokens replaced."""
    parts, end = [], 0
    for match in _TOKEN.finditer(pattern):
        before, end = pattern[end : match.start()], match.end()
        value = _token(match[1], facts)
        if not isinstance(value, _Nothing):
            parts.append(before + (match[0] if value is None else str(value)))
    return "".join(parts) + pattern[end:]


def _token(text: str, facts: NameFacts) -> _Text:
    parts = _TOKEN_PARTS.fullmatch(text)
    tell = TOKENS.get(parts[1].lower()) if parts else None
    return tell(facts, tuple(_ARGUMENTS.findall(parts[2]))) if parts and tell else None


# --- what the tokens tell -----------------------------------------------------------------------------------------


def _spaced(text: str | None) -> str | None:
    return None if text is None else sanitize(text, replace_spaces=False)


def _joined(text: str | None) -> str | None:
    return None if text is None else sanitize(text)


def _digest(data: bytes | None, arguments: _Arguments, digits: int | None = _HASH_DIGITS) -> str | None:
    if arguments and arguments[0].isdecimal():
        digits = int(arguments[0])
    return None if data is None else hashlib.sha256(data).hexdigest()[:digits]


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else text.encode("utf-8", "replace")


def _full_prompt(facts: NameFacts) -> str | None:
    prompt = facts.job_prompt if facts.job_prompt is not None else facts.prompt
    return None if prompt is None else f"{prompt} {facts.negative_prompt}"


def _without_styles(facts: NameFacts) -> str | None:
    if facts.prompt is None:
        return None
    text = facts.prompt
    for style in facts.styles:
        for part in facts.style_texts.get(style, "").split("{prompt}"):
            text = text.replace(part, "") if part else text
        text = text.replace(", ,", ",").strip().strip(",").strip()
    return _spaced(text)


def _words(facts: NameFacts) -> str | None:
    if facts.prompt is None:
        return None
    words = [word for word in _NO_LETTERS.split(facts.prompt) if word]
    return _spaced(" ".join(words[:MAX_WORDS] or ["empty"]))


def _has_prompt(facts: NameFacts, arguments: _Arguments) -> str | None:
    """``[hasprompt<word|default>…]``: each word that the prompt has, else its default."""
    if facts.prompt is None:
        return None
    found = []
    for argument in arguments:
        word, _, default = argument.partition("|")
        found.append(word.lower() if word.lower() in facts.prompt.lower() else default.partition("|")[0])
    return sanitize("".join(found))


def _seed_at(facts: NameFacts, position: int) -> int | None:
    return facts.seeds[position] if facts.seeds else facts.seed


def _generation(facts: NameFacts) -> _Text:
    if facts.batch_size == 1 and facts.iterations == 1:
        return _NOTHING
    return facts.iteration * facts.batch_size + facts.batch_index + 1


TOKENS: dict[str, Callable[[NameFacts, _Arguments], _Text]] = {
    "basename": lambda f, a: f.basename or "img",
    "seed": lambda f, a: f.seed,
    "seed_first": lambda f, a: f.seed if f.batch_size == 1 else _seed_at(f, 0),
    "seed_last": lambda f, a: _NOTHING if f.batch_size == 1 else _seed_at(f, -1),
    "steps": lambda f, a: f.steps,
    "cfg": lambda f, a: f.cfg_scale,
    "width": lambda f, a: f.width,
    "height": lambda f, a: f.height,
    "styles": lambda f, a: _spaced(", ".join(f.styles) or "None"),
    "sampler": lambda f, a: _spaced(f.sampler),
    "prompt": lambda f, a: _joined(f.prompt),
    "prompt_spaces": lambda f, a: _spaced(f.prompt),
    "prompt_no_styles": lambda f, a: _without_styles(f),
    "prompt_words": lambda f, a: _words(f),
    "prompt_hash": lambda f, a: _digest(_bytes(f.prompt), a),
    "negative_prompt_hash": lambda f, a: _digest(_bytes(f.negative_prompt), a),
    "full_prompt_hash": lambda f, a: _digest(_bytes(_full_prompt(f)), a),
    "image_hash": lambda f, a: _digest(None if f.image is None else f.image.tobytes(), a, None),
    "hasprompt": _has_prompt,
    "batch_number": lambda f, a: _NOTHING if f.batch_size == 1 else f.batch_index + 1,
    "batch_size": lambda f, a: f.batch_size,
    "generation_number": lambda f, a: _generation(f),
    "denoising": lambda f, a: f.denoising_strength or _NOTHING,
    "none": lambda f, a: "",
}


# --- whole names --------------------------------------------------------------------------------------------------


def next_number(folder: Path, basename: str = "") -> int:
    """One more than the highest leading number of the names in ``folder`` (folders count too); 0 where there is none.

    With a ``basename`` only names ``BASENAME-NUMBER…`` count.
    """
    prefix = f"{basename}-" if basename else ""
    highest = -1
    if folder.is_dir():
        for entry in folder.iterdir():
            if entry.name.startswith(prefix):
                lead = re.split(r"[-.]", entry.name.removeprefix(prefix), maxsplit=1)[0]
                highest = max(highest, int(lead)) if lead.isdecimal() else highest
    return highest + 1


def picture_name(folder: Path, seed: int, *, basename: str = "", suffix: str = "") -> str:
    """A free file name in ``folder``, without its extension: ``00012-SEED``, or ``BASENAME-0012-SEED``.

    ``suffix`` is put behind the seed ("-before-highres-fix").
    """
    number = next_number(folder, basename)
    return f"{f'{basename}-{number:04}' if basename else f'{number:05}'}-{seed}{suffix}"


def free_name(folder: Path, source: str, label: str) -> str:
    """A free file name in ``folder``, without its extension, for what was made of a picture at a path or an address:
    ``NAME-LABEL``, with a number after it where that is taken."""
    stem = Path(source.partition("?")[0]).stem[:100] or "picture"
    taken = {path.stem for path in folder.glob("*")} if folder.is_dir() else set()
    names = (f"{stem}-{label}{ending}" for ending in ("", *(f"-{number}" for number in range(2, 100_000))))
    return next(name for name in names if name not in taken)
