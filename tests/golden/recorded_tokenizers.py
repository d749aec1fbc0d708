"""Tokenizers for the golden tests: the real ones where their files are, else their recorded answers.

The slim golden data has no tokenizer files, so the ids of the segments that its cases need are recorded in
``tests/golden/data/tokens.json``. A case that needs another segment is skipped with the reason. To record anew, with
the real tokenizers at hand, for the cases that the manifests of a ``core`` folder list::

    python tests/golden/recorded_tokenizers.py tests/golden/data/core
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from goldens import PROJECT, tokenizer_dir

from lightweight_engine.errors import RequestError
from lightweight_engine.flux.chunks import segments_of
from lightweight_engine.flux.prompt import parse_networks, plan_negative, plan_prompt
from lightweight_engine.flux.tokenizers import CLIPTokenizer, CLIPTokens, T5Tokenizer, T5Tokens

RECORD = PROJECT / "tests" / "golden" / "data" / "tokens.json"


class Tokenizers(NamedTuple):
    clip: CLIPTokens
    t5: T5Tokens


class RecordedTokenizer:
    """Answers from a record of segment to ids; has the special ids of a CLIP or a T5 tokenizer."""

    start_id: int
    end_id: int
    comma_id: int | None
    pad_id: int

    def __init__(self, record: dict[str, Any]) -> None:
        vars(self).update(record["special"])
        self._ids: dict[str, list[int]] = record["ids"]

    def encode(self, text: str) -> list[int]:
        if text not in self._ids:
            pytest.skip(f"no tokenizer files (set LWE_TOKENIZER_DIR) and no recorded ids for the segment {text[:60]!r}")
        return list(self._ids[text])


@cache
def golden_tokenizers() -> Tokenizers:
    """The tokenizers that the golden cases were made with."""
    folder = tokenizer_dir()
    if folder is not None:
        return Tokenizers(CLIPTokenizer.load(folder / "clip_l"), T5Tokenizer.load(folder / "t5xxl"))
    if not RECORD.is_file():
        pytest.skip(f"no tokenizer files (set LWE_TOKENIZER_DIR) and no record at {RECORD}")
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    return Tokenizers(RecordedTokenizer(record["clip"]), RecordedTokenizer(record["t5"]))


def _texts(family: str, case: dict[str, Any], steps: int) -> Iterator[tuple[str, str]]:
    """Every (text, emphasis) that a case has encoded."""
    if family == "prompts":
        for key in (key for key in case if key.startswith("tokens")):
            emphasis = key.removeprefix("tokens").removeprefix("_emphasis_") or "Original"
            yield from ((text, emphasis) for text in case[key])
        return
    prompts = case["prompts"] if "prompts" in case else case.get("prompt", "")
    emphasis = case.get("emphasis", "Original")
    for prompt in [prompts] if isinstance(prompts, str) else prompts:
        yield prompt, emphasis
        for total in (steps, 2 * steps):  # samplers that call the model twice a step count double
            for part in plan_prompt(parse_networks(prompt)[0], total, compat="forge"):
                yield from ((text, emphasis) for _, text in part.schedule)
    negative = case.get("negative_prompt", "")
    for total in (steps, 2 * steps):
        for text in [negative] if isinstance(negative, str) else negative:
            yield from ((text, emphasis) for _, text in plan_negative(text, total)[0].schedule)


def record(core: Path) -> dict[str, Any]:
    """The answers of the real tokenizers for the cases that the manifests in ``core`` list."""
    wanted = {""}
    for family in ("prompts", "t5", "clip", "cond", "e2e"):
        path = core / f"{family}.json"
        manifest = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"cases": []}
        for case in manifest["cases"]:
            steps = case.get("steps", manifest.get("about", {}).get("steps", 20))
            for text, emphasis in _texts(family, case, steps):
                wanted.update(_segments(text, emphasis))
    clip, t5 = golden_tokenizers()
    return {"clip": _answers(clip, wanted), "t5": _answers(t5, wanted)}


def _segments(text: str, emphasis: Any) -> list[str]:
    try:
        return [segment.text for segment in segments_of(text, emphasis, "forge")]
    except RequestError:  # a case that the reference refuses needs no ids
        return []


def _answers(tokenizer: Any, segments: Iterable[str]) -> dict[str, Any]:
    names = ("start_id", "end_id", "comma_id", "pad_id")
    special = {name: getattr(tokenizer, name) for name in names if hasattr(tokenizer, name)}
    return {"special": special, "ids": {text: tokenizer.encode(text) for text in sorted(segments)}}


def main() -> None:
    parser = argparse.ArgumentParser(description="Record the token ids that the golden cases in a core folder need.")
    parser.add_argument("core", type=Path, help="folder with prompts.json, t5.json, clip.json, cond.json, e2e.json")
    parser.add_argument("--out", type=Path, default=RECORD)
    arguments = parser.parse_args()
    if tokenizer_dir() is None:
        parser.error("the real tokenizers are needed: set LWE_TOKENIZER_DIR")
    text = json.dumps(record(arguments.core), ensure_ascii=True, separators=(",", ":"))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
