"""Patterns, running numbers, and names that any file system takes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from PIL import Image

from lightweight_engine.core.filenames import NameFacts, expand, next_number, picture_name, sanitize

FACTS = NameFacts(seed=5, prompt="a Cat, on a mat")
BATCH = NameFacts(seed=6, seeds=(5, 6), batch_index=1, batch_size=2, iteration=3, iterations=4)


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("[SEED]", "5"),
        ("[nonsense]-[seed]", "[nonsense]-5"),
        ("x[seed", "x[seed"),
        ("[seed<]", "[seed<]"),
        ("before-[batch_number]after", "after"),
        ("a-[none]b", "a-b"),
        ("[width]", "[width]"),
        ("[prompt]", "a_Cat,_on_a_mat"),
        ("[prompt_spaces]", "a Cat, on a mat"),
        ("[prompt_words]", "a Cat on a mat"),
        ("[hasprompt<CAT|dog><zzz|no><yyy>]", "catno"),
        ("[styles]", "None"),
        ("[denoising]", ""),
        ("[prompt_hash<>]", hashlib.sha256(b"a Cat, on a mat").hexdigest()[:8]),
        ("[basename]", "img"),
    ],
)
def test_tokens(pattern: str, name: str) -> None:
    assert expand(pattern, FACTS) == name


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("[seed_first]-[seed]-[seed_last]", "5-6-6"),
        ("[batch_number] of [batch_size]", "2 of 2"),
        ("[generation_number]", "8"),
        ("[prompt]", "[prompt]"),
    ],
)
def test_tokens_of_a_batch(pattern: str, name: str) -> None:
    assert expand(pattern, BATCH) == name


def test_words_and_styles() -> None:
    assert expand("[prompt_words]", NameFacts(prompt="?!, ")) == "empty"
    assert expand("[prompt_words]", NameFacts(prompt=" ".join("abcdefghijk"))) == "a b c d e f g h"
    styled = NameFacts(prompt="a cat, oil painting", styles=("oil",), style_texts={"oil": "{prompt}, oil painting"})
    assert expand("[prompt_no_styles]", styled) == "a cat"


def test_hash_of_the_picture() -> None:
    facts = NameFacts(image=Image.new("RGB", (2, 2), (1, 2, 3)))
    digest = hashlib.sha256(bytes((1, 2, 3)) * 4).hexdigest()
    assert expand("[image_hash]", facts) == digest
    assert expand("[image_hash<5>]", facts) == digest[:5]


@pytest.mark.parametrize("text", ["a/b", "..", "../../x", "a\0b", "\ud800", "con:", "x" * 500, " . ", "日" * 300])
def test_sanitized_text_can_be_a_file(tmp_path: Path, text: str) -> None:
    name = f"{sanitize(text)[:80]}.txt"
    (tmp_path / name).touch()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_numbers(tmp_path: Path) -> None:
    assert next_number(tmp_path / "absent") == next_number(tmp_path) == 0
    for name in ("00007-1.png", "12abc.png", "notes.txt", "grid-0003.png", "00009.json"):
        (tmp_path / name).touch()
    assert next_number(tmp_path) == 10
    assert next_number(tmp_path, "grid") == 4
    (tmp_path / "2026-01-02").mkdir()
    assert next_number(tmp_path) == 2027


def test_names_follow_one_another(tmp_path: Path) -> None:
    for expected in ("00000-5", "00001-5"):
        assert picture_name(tmp_path, 5) == expected
        (tmp_path / f"{expected}.png").touch()
    assert picture_name(tmp_path, 5, suffix="-before-highres-fix") == "00002-5-before-highres-fix"
    assert picture_name(tmp_path, 5, basename="grid") == "grid-0000-5"
