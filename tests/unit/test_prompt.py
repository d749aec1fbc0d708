"""The prompt language, rule by rule; rows of docs/differences.md are named where ``fixed`` and ``forge`` part."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest

from lightweight_engine.errors import RequestError
from lightweight_engine.flux.prompt import (
    BREAK,
    PromptPart,
    Segment,
    lora_weights,
    parse_attention,
    parse_networks,
    plan_negative,
    plan_prompt,
    read_lora_tag,
    split_and,
)
from lightweight_engine.flux.prompt_schedule import schedule
from lightweight_engine.flux.prompt_slips import slip_of_part, slips_of
from lightweight_engine.lora_spec import LoraSpec

LIMIT = 20_000  # characters of prompt that the engine takes


class TestNetworks:
    def test_tags_leave_the_text_and_blanks_stay(self) -> None:
        text, tags = parse_networks("a <lora:x:0.5> b<hypernet:h>")
        assert text == "a  b"
        assert [(tag.kind, tag.items) for tag in tags] == [("lora", ("x", "0.5")), ("hypernet", ("h",))]

    @pytest.mark.parametrize("text", ["<lora:>", "<:x>", "< lora:x>", "<lora>", "<lora:x", "a < b > c", "<lo-ra:x>"])
    def test_what_is_no_tag_stays(self, text: str) -> None:
        assert parse_networks(text) == (text, [])

    def test_a_tag_ends_at_the_first_closing_bracket(self) -> None:
        text, tags = parse_networks("<a:b<c:d>e>")
        assert (text, tags[0].items) == ("e>", ("b<c", "d"))

    def test_a_tag_begins_anew_after_an_empty_one(self) -> None:
        assert parse_networks("<a:><b:c>")[0] == "<a:>"

    def test_an_item_with_one_equals_sign_is_named(self) -> None:
        (tag,) = parse_networks("<lora:a:x=1:y==2:0.3>")[1]
        assert tag.positional == ("a", "y==2", "0.3")
        assert tag.named == {"x": "1"}


class TestLoraWeights:
    @pytest.mark.parametrize(
        ("text", "te", "unet", "dyn"),
        [
            ("<lora:a>", 1.0, 1.0, None),
            ("<lora:a:0.5>", 0.5, 0.5, None),
            ("<lora:a:0.5:0.2:8>", 0.5, 0.2, 8),
            ("<lora:a:te=0.3>", 0.3, 0.3, None),
            ("<lora:a:0.5:te=0.3:unet=-1:dyn=4>", 0.3, -1.0, 4),
        ],
    )
    def test_strengths(self, text: str, te: float, unet: float, dyn: int | None) -> None:
        assert lora_weights(text) == {"names": ["a"], "te": [te], "unet": [unet], "dyn": [dyn]}

    @pytest.mark.parametrize("tag", ["<lora:a:x>", "<lora:a:1:>", "<lora:a:nan>", "<lora:te=1>", "<lora:a:1:1:x>"])
    def test_row_8_a_bad_weight_is_an_error_that_names_the_tag(self, tag: str) -> None:
        with pytest.raises(RequestError, match="^prompt: the tag") as caught:
            lora_weights(f"text {tag}")
        assert tag in str(caught.value)
        assert caught.value.field == "prompt"

    def test_a_name_with_a_colon_is_told_where_it_can_stand(self) -> None:
        with pytest.raises(RequestError, match=r"a strength in it is no number.*by loras \(--lora\)"):
            lora_weights("<lora:people:hat:0.8>")
        assert LoraSpec.parse("people:hat:0.8") == LoraSpec(name="people:hat", scale=0.8)

    def test_the_cause_is_the_plain_error(self) -> None:
        with pytest.raises(RequestError) as caught:
            read_lora_tag(parse_networks("<lora:a:x>")[1][0])
        assert str(caught.value.__cause__) == "could not convert string to float: 'x'"

    def test_other_kinds_are_not_loras(self) -> None:
        assert lora_weights("<lyco:a:1><hypernet:b:x>")["names"] == []


class TestAnd:
    def test_weights_and_texts(self) -> None:
        assert split_and("a :1.2 AND  b AND c: -.5 ") == [(1.2, "a"), (1.0, "  b"), (-0.5, " c")]

    def test_and_is_a_whole_word_in_capitals(self) -> None:
        assert len(split_and("sandAND and ANDROID And")) == 1

    def test_row_3_a_weight_needs_an_and(self) -> None:
        assert split_and("clock at 10:30") == [(1.0, "clock at 10:30")]
        assert split_and("clock at 10:30", "forge") == [(30.0, "clock at 10")]

    @pytest.mark.parametrize("end", [":", ":x", ":1.2.3", ": 1 2", ":1e3", ":" + "9" * 400])
    def test_what_is_no_number_stays(self, end: str) -> None:
        assert split_and(f"a{end} AND b")[0] == (1.0, f"a{end}")

    def test_an_empty_part_is_a_part(self) -> None:
        assert split_and("a AND") == [(1.0, "a"), (1.0, "")]


class TestSchedule:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("plain", [(10, "plain")]),
            ("a [b:3]", [(3, "a "), (10, "a b")]),
            ("a [b::3]", [(3, "a b"), (10, "a ")]),
            ("a [b : c : 1] d", [(1, "a b  d"), (10, "a  c  d")]),
            ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
            ("[a:b:0.25]", [(2, "a"), (10, "b")]),
            ("[a:b:1.]", [(10, "a")]),
            ("[a:b:1e1]", [(10, "a")]),
            ("[a:b:+3]", [(3, "a"), (10, "b")]),
            ("[a:b:0]", [(10, "b")]),
            ("[a:b:99]", [(10, "a")]),
            ("[(a:2):3]", [(3, ""), (10, "(a:2)")]),
            ("a [[[b]]:2]", [(2, "a "), (10, "a [[b]]")]),
            ("[\\[x:y:3]", [(3, "\\[x"), (10, "y")]),
        ],
    )
    def test_switches(self, text: str, expected: list[tuple[int, str]]) -> None:
        assert schedule(text, 10) == expected

    @pytest.mark.parametrize(
        "text",
        [
            "a [unbalanced",
            "a] b",
            "((a][:b",
            "[a:b]",
            "[a:b:c:3]",
            "[a:b:x]",
            "[a:b:3 4]",
            "(a:b:c)",
            "a:b",
            "[a(b:c:3]",
        ],
    )
    def test_what_forms_nothing_is_text(self, text: str) -> None:
        assert schedule(text, 10) == [(10, text)]

    @pytest.mark.parametrize("text", ["a|b [c:d:3]", "(a|b) [c:d:3]", "[c:d:3] [a|b:0.5]", "[c:d:3]\\", "[c|d [e:f:3]"])
    def test_what_cannot_be_read_makes_all_text(self, text: str) -> None:
        assert schedule(text, 10) == [(10, text)]

    def test_a_group_inside_brackets_that_form_nothing_counts(self) -> None:
        assert schedule("((a][:b:c [d:3]", 10) == [(3, "((a][:b:c "), (10, "((a][:b:c d")]
        assert schedule("[x:[a:b:3]:y:z]", 10) == [(3, "[x:a:y:z]"), (10, "[x:b:y:z]")]

    def test_alternation(self) -> None:
        assert [text for _, text in schedule("[fe|]male", 4)] == ["female", "male", "female", "male"]
        assert [text for _, text in schedule("[a|b|c]", 4)] == ["a", "b", "c", "a"]
        assert [text for _, text in schedule("[[a|b]:c:2]", 4)] == ["a", "b", "c", "c"]

    def test_the_hires_pass_counts_on(self) -> None:
        assert schedule("[a:b:25]", 10, base_steps=20) == [(5, "a"), (10, "b")]
        assert schedule("[a:b:1.5]", 10, base_steps=20) == [(5, "a"), (10, "b")]
        assert schedule("[a:b:0.9]", 10, base_steps=20) == [(10, "b")]
        assert schedule("[a|b]", 3, base_steps=20) == [(1, "a"), (2, "b"), (3, "a")]


class TestPlan:
    def test_parts_and_schedules(self) -> None:
        plan = plan_prompt("[a:b:2] AND c:0.5", 4)
        assert plan == (PromptPart(1.0, ((2, "a"), (4, "b"))), PromptPart(0.5, ((4, " c"),)))

    def test_a_negative_prompt_has_no_parts(self) -> None:
        assert plan_negative("a AND b:0.5", 4) == (PromptPart(1.0, ((4, "a AND b:0.5"),)),)


def flat(text: str, compat: str = "fixed") -> list[tuple[str, float]]:
    return [(piece, round(weight, 6)) for piece, weight in parse_attention(text, compat=compat)]


class TestAttention:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("", [("", 1)]),
            ("a (b) [c]", [("a ", 1), ("b", 1.1), (" ", 1), ("c", 0.909091)]),
            ("((a:1.5) b)", [("a", 1.65), (" b", 1.1)]),
            ("(a: -0.5 )", [("a", -0.5)]),
            ("(a:.5)(b:1.)", [("a", 0.5), ("b", 1)]),
            ("a:1.2) b]", [("a:1.2) b]", 1)]),
            (r"\(a\) \[b\] c\\d e\f", [(r"(a) [b] c\d ef", 1)]),
            ("((a [b", [("a ", 1.21), ("b", 1.1)]),
            ("(a:x)", [("a:x", 1.1)]),
            ("([a])b", [("ab", 1)]),
        ],
    )
    def test_weights(self, text: str, expected: list[tuple[str, float]]) -> None:
        assert flat(text) == expected
        assert flat(text, "forge") == expected

    def test_breaks(self) -> None:
        assert parse_attention("a \nBREAK  b") == [("a", 1), BREAK, ("b", 1)]
        assert parse_attention("BREAK") == [("", 1), BREAK, ("", 1)]
        assert parse_attention("aBREAK break BREAKs") == [("aBREAK break BREAKs", 1)]
        assert parse_attention("a BREAK BREAK b") == [("a", 1), BREAK, ("", 1), BREAK, ("b", 1)]

    def test_row_5_a_weighted_break_is_a_break(self) -> None:
        assert parse_attention("(a BREAK b:1.3)") == [("a", 1.3), BREAK, ("b", 1.3)]
        assert parse_attention("(a BREAK b:1.3)", compat="forge") == [("a", 1.3), ("BREAK", -1.3), ("b", 1.3)]

    def test_row_5_a_break_never_merges_with_text(self) -> None:
        assert parse_attention("(a BREAK b:-1)") == [("a", -1), BREAK, ("b", -1)]
        assert parse_attention("(a BREAK b:0)", compat="forge") == [("aBREAKb", 0)]

    @pytest.mark.parametrize("number", ["1.2.3", ".", "..", "+", "9" * 400])
    def test_row_9_a_malformed_weight_is_text_with_a_warning(self, number: str) -> None:
        warnings: list[str] = []
        segments = parse_attention(f"(cat:{number})", warnings=warnings)
        assert segments == [Segment(f"cat:{number}", 1.1)]
        if number == "+":  # has no digit or point, and so is no weight at all
            assert not warnings
            return
        assert len(warnings) == 1
        assert number[:50] in warnings[0]
        with pytest.raises(RequestError, match="not a number"):
            parse_attention(f"(cat:{number})", compat="forge")

    @pytest.mark.parametrize(
        ("text", "written"),
        [
            ("a (red:nan)", ":nan)"),
            ("(red:1e9) (b:1.2)", ":1e9)"),
            ("((a) (red): 1,3 )", ": 1,3 )"),
            ("(red:-1,5) or (blue:-1,5)", ":-1,5)"),
            ("[a:b:1.2.3]", ":1.2.3]"),
            ("[a:b:0,5]", ":0,5]"),
        ],
    )
    def test_row_9_what_looks_like_a_weight_is_told(self, text: str, written: str) -> None:
        (told,) = slips_of(text)
        assert told.startswith(f"{written!r} looks like a weight") and "read as text" in told
        assert told.endswith("[from:to:0.5]" if written.endswith("]") else "(word:1.3)")

    @pytest.mark.parametrize(
        ("text", "written"),
        [
            ("(red:1.3", ":1.3"),
            ("(((red:1.5) blue", ":1.5"),
            ("(red:1.3, blue", ":1.3"),
            ("((a)(b):.5", ":.5"),
            ("[a:b:0.5", ":0.5"),
        ],
    )
    def test_row_9_a_weight_in_a_bracket_that_is_never_closed_is_told(self, text: str, written: str) -> None:
        (told,) = slips_of(text)
        assert told.startswith(f"a bracket before {written!r} is never closed") and f"\\{text[0]}" in told

    @pytest.mark.parametrize(
        "text",
        [
            *("(see: this)", "12:30", "(portrait:)", "(at 12:30)", "(John 3:1,2)", "(grandma: nan)", "[wait:...]"),
            *(
                "sad :( at 12:30",
                "sad :( but :3",
                "(:3",
                "a (b",
                "(a ratio 16:9",
                r"\(red:1.3",
                "(red:1.3)",
                "(red:1,3 m)",
            ),
            *("(red:1.2.3)", "(a:1.2) b:1,3", "[[a:b:1.5]:c]"),
        ],
    )
    def test_ordinary_text_is_not(self, text: str) -> None:
        assert slips_of(text) == []

    @pytest.mark.parametrize(
        ("text", "told"),
        [("b:1.2.3", True), ("b: 1,3 ", True), ("b:1e3", True), ("b:nan", True)]
        + [("b", False), ("at 10:30", False), ("wait:...", False), ("see: this", False), ("3:1,2", False)],
    )
    def test_row_9_so_is_the_share_of_a_part(self, text: str, told: bool) -> None:
        assert [each.endswith("as in word:1.3") for each in slip_of_part(text)] == [True] * told

    def test_weights_beyond_all_numbers_are_refused(self) -> None:
        with pytest.raises(RequestError, match="fewer nested brackets"):
            parse_attention("(" * 9000 + "a" + ")" * 9000)


def _garbage(seed: int, length: int) -> str:
    pick = random.Random(seed)
    return "".join(pick.choice(list("[]():|\\ ab.<>,10") + ["BREAK", " AND ", "lora:", "0.5]"]) for _ in range(length))


HOSTILE = {
    "square brackets": "[" * 10_000 + "]" * 10_000,
    "round brackets": "(" * 7_000 + ")" * 7_000,
    "open brackets": "(a" * 7_000,
    "open alternations": "[a|" * 6_000,
    "nested alternations": "[a|" * 4_000 + "]" * 4_000,
    "nested switches": "[a:" * 4_000 + "b" + ":1]" * 4_000,
    "many alternations": "[a|b]" * 4_000,
    "tags without end": "<lora:" * 3_300,
    "empty tags": "<a:>" * 5_000,
    "blanks": " " * LIMIT,
    "blanks before a break": (" " * 9_990 + "BREAK") + " " * 5_000,
    "blanks after colons": (":" + " " * 99) * 200,
    "colons": ":" * LIMIT,
    "digits": "(a:" + "1" * 19_000 + "x)",
    "points": "(a:" + "." * 19_000 + ")",
    "backslashes": "\\" * LIMIT,
    "breaks": "(BREAK " * 2_800,
    "ands": "a AND " * 3_333,
    "garbage": _garbage(0, 10_000),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("compat", ["fixed", "forge"])
def test_hostile_prompts_take_little_time(name: str, compat: str) -> None:
    def run(call: Callable[[], object]) -> None:
        try:
            call()
        except RequestError:
            pass

    text = HOSTILE[name][:LIMIT]
    began = time.process_time()
    run(lambda: parse_networks(text))
    run(lambda: lora_weights(text))
    run(lambda: plan_prompt(text, 100, compat=compat))
    run(lambda: parse_attention(text, compat=compat))
    run(lambda: slips_of(text) + slip_of_part(text))
    assert time.process_time() - began < 4.0


@pytest.mark.parametrize("seed", range(200))
def test_garbage_never_raises_anything_else(seed: int) -> None:
    text = _garbage(seed, 60)
    stripped, _ = parse_networks(text)
    for compat in ("fixed", "forge"):
        for part in plan_prompt(stripped, 7, compat=compat):
            ends = [end for end, _ in part.schedule]
            assert ends == sorted(set(ends))
            assert ends[-1] == 7
            for _, scheduled in part.schedule:
                try:
                    segments = parse_attention(scheduled, compat=compat)
                except RequestError:
                    assert compat == "forge"
                    continue
                assert segments
