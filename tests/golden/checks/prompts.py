"""Prompts: tags, AND, schedules, segments, and both tokenizers' chunks; ids exact, multipliers within 1e-6."""

from __future__ import annotations

from typing import Any

from goldens import Case
from recorded_tokenizers import golden_tokenizers

from lightweight_engine.errors import RequestError
from lightweight_engine.flux.chunks import clip_chunks, segments_of, t5_chunks
from lightweight_engine.flux.prompt import parse_attention, parse_networks, split_and
from lightweight_engine.flux.prompt_schedule import schedule

CLIP_LENGTH, CLIP_END, T5_PAD = 77, 49407, 0


def check(case: Case) -> None:
    text, tags = parse_networks(case["prompt"])
    assert text == case["text"]
    networks: dict[str, list[dict[str, Any]]] = {}
    for tag in tags:
        row = {"items": list(tag.items), "positional": list(tag.positional), "named": tag.named}
        networks.setdefault(tag.kind, []).append(row)
    assert networks == case["extra_networks"]

    parts = split_and(text, "forge")
    texts = list(dict.fromkeys(part for _, part in parts))
    assert texts == case["and_split"]["texts"]
    assert [[texts.index(part), weight] for weight, part in parts] == case["and_split"]["indexes"]

    for key, steps, base_steps in (("schedules_20", 20, None), ("schedules_7", 7, None), ("schedules_hr", 10, 20)):
        if key in case.data:
            assert [[list(row) for row in schedule(part, steps, base_steps)] for part in texts] == case[key], key

    for part, expected in case["parsed"].items():
        assert _or_error(lambda part=part: [list(row) for row in parse_attention(part, compat="forge")]) == expected
    for key in (key for key in case.data if key.startswith("tokens")):
        emphasis = key.removeprefix("tokens").removeprefix("_emphasis_") or "Original"
        for part, expected in case[key].items():
            _check_tokens(part, emphasis, expected)


def _or_error(call: Any) -> Any:
    """The value, or the reference's words for the error behind a RequestError."""
    try:
        return call()
    except RequestError as error:
        return f"error {type(error.__cause__).__name__}: {error.__cause__}"


def _check_tokens(text: str, emphasis: str, expected: Any) -> None:
    segments = _or_error(lambda: segments_of(text, emphasis, "forge"))
    if isinstance(expected, str):
        assert segments == expected
        return
    tokenizers = golden_tokenizers()
    clip = clip_chunks(segments, tokenizers.clip)
    assert len(clip) == len(expected["clip"])
    for ids, multipliers, row in zip(*zip(*clip, strict=True), expected["clip"], strict=True):
        assert len(ids) == CLIP_LENGTH
        kept = len(row["tokens"])
        assert ids == row["tokens"] + [CLIP_END] * (CLIP_LENGTH - kept)
        _close(multipliers, row["multipliers"] + [1.0] * (CLIP_LENGTH - kept))
    t5 = t5_chunks(segments, tokenizers.t5)
    assert len(t5) == len(expected["t5"])
    for ids, multipliers, row in zip(*zip(*t5, strict=True), expected["t5"], strict=True):
        padding = row["len"] - len(row["tokens"])
        assert ids == row["tokens"] + [T5_PAD] * padding
        _close(multipliers, row["multipliers"] + [1.0] * padding)


def _close(ours: list[float], theirs: list[float]) -> None:
    assert len(ours) == len(theirs)
    assert all(abs(a - b) <= 1e-6 for a, b in zip(ours, theirs, strict=True))
