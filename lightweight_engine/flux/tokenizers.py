"""Text to token ids, for CLIP and T5, and where the files of a tokenizer may lie.

CLIP's is byte-level BPE over text repaired by ftfy, as OpenAI published it and transformers' slow ``CLIPTokenizer``
has it; T5's is the ``tokenizers`` library on its ``tokenizer.json``. Special ids are looked up by name, so that small
vocabularies work. Both may be used from several threads at once.
"""

from __future__ import annotations

import heapq
import json
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

from ..errors import CorruptCheckpointError, ModelNotFoundError

Kind = Literal["clip", "t5"]


class CLIPTokens(Protocol):
    """What chunking needs of a CLIP tokenizer."""

    start_id: int
    end_id: int
    comma_id: int | None

    def encode(self, text: str) -> list[int]: ...


class T5Tokens(Protocol):
    """What chunking needs of a T5 tokenizer."""

    end_id: int
    pad_id: int

    def encode(self, text: str) -> list[int]: ...


# --- CLIP -------------------------------------------------------------------------------------------------------

_START, _END = "<|startoftext|>", "<|endoftext|>"
_SPECIAL = re.compile(f"({re.escape(_START)}|{re.escape(_END)})")
_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
# ftfy changes nothing in printable ASCII without "&" (which may begin an HTML entity), so that it is not loaded then.
_PLAIN = re.compile(r"[\t\n -%'-~]*")
_PLAIN_WORDS = re.compile(rf"{_SPECIAL.pattern[1:-1]}|{_CONTRACTIONS}|[a-z]+|[0-9]|[^\sa-z0-9]+")


def _byte_letters() -> dict[int, str]:
    """One printable letter per byte: itself where it is printable, else one from 256 on. Source: OpenAI's GPT-2."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


@lru_cache(maxsize=1)
def _unicode_tools() -> tuple[Callable[[str], str], Any, Any]:
    """ftfy and the regular expressions with Unicode classes, loaded at the first text that needs them."""
    import ftfy
    import regex

    words = rf"{_SPECIAL.pattern[1:-1]}|{_CONTRACTIONS}|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+"
    return ftfy.fix_text, regex.compile(words, regex.IGNORECASE), regex.compile(r"\s+")


def _words(text: str) -> list[str]:
    """Repair, lower-case and cut a text into the words that BPE works on."""
    if _PLAIN.fullmatch(text):
        return _PLAIN_WORDS.findall(text.lower())
    fix_text, words, blanks = _unicode_tools()
    return words.findall(blanks.sub(" ", fix_text(text)).strip().lower())


_PAIRS = re.compile(r"(?:\S+ \S+(?:\n|\Z))*")


class CLIPTokenizer:
    """Byte-level BPE with the end of a word marked by ``</w>``.

    Args:
        vocab: token to id; must hold the start and end tokens.
        merges: pairs of tokens with a space between, the most urgent first.
    """

    def __init__(self, vocab: dict[str, int], merges: Iterable[str]) -> None:
        if _START not in vocab or _END not in vocab:
            raise CorruptCheckpointError(f"the CLIP vocabulary lacks {_START} or {_END}; use the published vocab.json")
        self.start_id, self.end_id = vocab[_START], vocab[_END]
        self.comma_id = vocab.get(",</w>")
        self._vocab = vocab
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._letters = _byte_letters()
        self._word_ids = lru_cache(maxsize=8192)(self._encode_word)

    @classmethod
    def load(cls, folder: Path) -> CLIPTokenizer:
        """Read ``vocab.json`` and ``merges.txt``, or ``tokenizer.json``, from a folder."""
        try:
            if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
                vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
                lines = (folder / "merges.txt").read_text(encoding="utf-8").strip().split("\n")
                rows: Any = lines[1:] if lines[0].startswith("#version") else lines
            else:
                model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
                vocab = model["vocab"]
                rows = [row if isinstance(row, str) else " ".join(row) for row in model["merges"]]
            if not _PAIRS.fullmatch("\n".join(rows)):  # at once, as there are 48,894
                rows = [f"{left} {right}" for left, right in map(str.split, rows)]
            return cls(vocab, rows)
        except FileNotFoundError as error:
            raise ModelNotFoundError(f"there is no CLIP tokenizer in {folder}: {error.filename} is missing") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptCheckpointError(
                f"the CLIP tokenizer in {folder} cannot be read ({error}); get it anew"
            ) from error

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without start and end."""
        ids: list[int] = []
        for piece in _SPECIAL.split(text):
            if piece in (_START, _END):
                ids.append(self._vocab[piece])
                continue
            for word in _words(piece):
                ids.extend(self._word_ids(word))
        return ids

    def _encode_word(self, word: str) -> tuple[int, ...]:
        if word in (_START, _END):
            return (self._vocab[word],)
        letters = [self._letters[byte] for byte in word.encode("utf-8", errors="replace")]
        letters[-1] += "</w>"
        return tuple(self._vocab.get(token, self.end_id) for token in _merge(letters, self._ranks))


def _merge(tokens: list[str], ranks: dict[str, int]) -> list[str]:
    """Join neighbours, lowest rank first, all places of one pair from left to right before the next pair.

    A heap of places, so that a word of n letters costs n log n.
    """
    after = list(range(1, len(tokens) + 1))  # the living token to the right; the end is len(tokens)
    before = list(range(-1, len(tokens) - 1))
    alive = [True] * len(tokens)
    heap: list[tuple[int, int]] = []

    def rank(place: int) -> int | None:
        following = after[place]
        return ranks.get(f"{tokens[place]} {tokens[following]}") if following < len(tokens) else None

    def note(place: int) -> None:
        if (found := rank(place)) is not None:
            heapq.heappush(heap, (found, place))

    for place in range(len(tokens)):
        note(place)
    while heap:
        lowest, touched = heap[0][0], []
        while heap and heap[0][0] == lowest:
            _, place = heapq.heappop(heap)
            if not alive[place] or rank(place) != lowest:
                continue
            gone = after[place]
            tokens[place] += tokens[gone]
            alive[gone] = False
            after[place] = after[gone]
            if after[gone] < len(tokens):
                before[after[gone]] = place
            touched.append(place)
        for place in touched:
            note(place)
            if before[place] >= 0:
                note(before[place])
    return [token for token, living in zip(tokens, alive, strict=True) if living]


# --- T5 ---------------------------------------------------------------------------------------------------------


class T5Tokenizer:
    """A ``tokenizer.json`` run by the ``tokenizers`` library."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        end_id, pad_id = tokenizer.token_to_id("</s>"), tokenizer.token_to_id("<pad>")
        if end_id is None or pad_id is None:
            raise CorruptCheckpointError("the T5 tokenizer lacks </s> or <pad>; use the published tokenizer.json")
        self.end_id, self.pad_id = int(end_id), int(pad_id)

    @classmethod
    def load(cls, folder: Path) -> T5Tokenizer:
        """Read ``tokenizer.json`` from a folder."""
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        if not path.exists():
            raise ModelNotFoundError(f"there is no T5 tokenizer in {folder}: {path} is missing")
        try:
            return cls(Tokenizer.from_file(str(path)))
        except CorruptCheckpointError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise CorruptCheckpointError(f"{path} is not a tokenizer ({error}); get it anew") from error

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without the end."""
        text = text.encode("utf-8", errors="replace").decode("utf-8")  # the library refuses lone surrogates
        return self._tokenizer.encode(text, add_special_tokens=False).ids


# --- where the files are ----------------------------------------------------------------------------------------

# Relative to a models folder or the folder around it: our own layout, then diffusers, Forge and ComfyUI.
_PLACES: dict[Kind, tuple[str, ...]] = {
    "clip": (
        "tokenizers/clip_l",
        "text_encoder*/clip_l",
        "text_encoder*",
        "clip",
        ".",
        "tokenizer",
        "diffusers/*/tokenizer",
        "backend/huggingface/black-forest-labs/FLUX.1-*/tokenizer",
        "comfy/sd1_tokenizer",
    ),
    "t5": (
        "tokenizers/t5xxl",
        "text_encoder*/t5xxl",
        "text_encoder*",
        "clip",
        ".",
        "tokenizer_2",
        "diffusers/*/tokenizer_2",
        "backend/huggingface/black-forest-labs/FLUX.1-*/tokenizer_2",
        "comfy/text_encoders/t5_tokenizer",
        "comfy/t5_tokenizer",
    ),
}
_HUB_PLACES: dict[Kind, tuple[str, ...]] = {
    "clip": (
        "models--openai--clip-vit-large-patch14/snapshots/*",
        "models--black-forest-labs--FLUX.1-*/snapshots/*/tokenizer",
        "models--stabilityai--stable-diffusion-xl-base-1.0/snapshots/*/tokenizer",
    ),
    "t5": (
        "models--black-forest-labs--FLUX.1-*/snapshots/*/tokenizer_2",
        "models--*--FLUX.1-*/snapshots/*/tokenizer_2",
        "models--google--t5-v1_1-xxl/snapshots/*",
    ),
}
_LARGEST = 8 << 20  # bytes; larger vocabularies are those of other models (umT5 has 17 MB)


def is_tokenizer(kind: Kind, folder: Path) -> bool:
    """Whether a folder holds the files of such a tokenizer, told by their content."""
    try:
        if kind == "clip" and (folder / "merges.txt").is_file():
            files, marks = [folder / "vocab.json"], (_START.encode(), _END.encode())
        elif kind == "clip":
            files, marks = [folder / "tokenizer.json"], (_START.encode(), _END.encode(), b'"merges"')
        else:
            files, marks = [folder / "tokenizer.json"], (b'"Unigram"', b'"</s>"', b'"<pad>"')
        if any(file.stat().st_size > _LARGEST for file in files):
            return False
        return all(mark in file.read_bytes() for file in files for mark in marks)
    except OSError:
        return False


def check_tokenizer(kind: Kind, folder: Path) -> None:
    """Read one as a model would; nothing is kept.

    Raises:
        EngineError: a file of it is missing, or damaged.
    """
    (CLIPTokenizer if kind == "clip" else T5Tokenizer).load(folder)


def find_tokenizer(kind: Kind, folders: Iterable[Path], hub: Path | None = None) -> Path | None:
    """The first folder with such a tokenizer.

    Args:
        folders: models folders or installs (of ours, Forge, ComfyUI or diffusers), the most wanted first; the folder
            around each is looked into as well, as an install keeps its tokenizers beside its models.
        hub: the cache of the Hugging Face Hub, searched last; see ``hub_cache``.
    """
    for folder in folders:
        for base in (folder, folder.parent):
            for place in _PLACES[kind]:
                if base is not folder and place in (".", "tokenizer", "tokenizer_2", "clip"):
                    continue  # whatever lies beside a models folder under such a name is not ours to guess
                if (found := _first(kind, base, place)) is not None:
                    return found
    if hub is None:
        return None
    return next((found for place in _HUB_PLACES[kind] if (found := _first(kind, hub, place)) is not None), None)


def _first(kind: Kind, base: Path, place: str) -> Path | None:
    try:
        candidates = sorted(base.glob(place)) if "*" in place else [base / place]
    except OSError:
        return None
    return next((candidate for candidate in candidates if is_tokenizer(kind, candidate)), None)


def hub_cache(environ: dict[str, str] | Any) -> Path:
    """Where the Hugging Face Hub keeps its files, by its own environment variables."""
    if named := environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(named)
    if home := environ.get("HF_HOME"):
        return Path(home) / "hub"
    return Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface" / "hub"
