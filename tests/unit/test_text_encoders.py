"""Chunks, emphasis, encoding and conditioning, on small random networks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from lightweight_engine.errors import ModelError, RequestError
from lightweight_engine.flux.chunks import clip_chunks, segments_of, t5_chunks
from lightweight_engine.flux.clip import CLIPText
from lightweight_engine.flux.conditioner import Conditioner, EmbeddingCache, resolve_guidance
from lightweight_engine.flux.params import CLIPParams, T5Params
from lightweight_engine.flux.prompt import BREAK, Segment, plan_negative, plan_prompt
from lightweight_engine.flux.t5 import T5Encoder
from lightweight_engine.flux.text_encoders import EncodedText, TextEncoders, clip_states, emphasise

COMMA = 5


class Words:
    """A tokenizer with one id per word; a comma is a word of its own."""

    start_id, end_id, pad_id, comma_id = 1, 2, 0, COMMA

    def encode(self, text: str) -> list[int]:
        words = text.replace(",", " , ").split()
        return [COMMA if word == "," else 10 + sum(word.encode()) % 80 for word in words]


def bodies(segments: Sequence[Segment], **options: Any) -> list[list[int]]:
    """The ids of CLIP chunks without start and ends."""
    return [[i for i in chunk.ids if i not in (1, 2)] for chunk in clip_chunks(segments, Words(), **options)]


def plain(text: str) -> list[Segment]:
    return [Segment(text, 1.0)]


class TestCLIPChunks:
    def test_frame(self) -> None:
        (chunk,) = clip_chunks([Segment("a", 1.0), Segment("b", 1.5)], Words())
        assert len(chunk.ids) == len(chunk.multipliers) == 77
        assert chunk.ids[0] == 1
        assert chunk.ids[3:] == [2] * 74
        assert chunk.multipliers[:4] == [1.0, 1.0, 1.5, 1.0]

    @pytest.mark.parametrize(("words", "sizes"), [(0, [0]), (75, [75]), (76, [75, 1]), (150, [75, 75])])
    def test_full_chunks(self, words: int, sizes: list[int]) -> None:
        assert [len(body) for body in bodies(plain("w " * words))] == sizes

    @pytest.mark.parametrize(("before", "kept"), [(54, 75), (55, 56), (70, 71), (74, 75)])
    def test_a_full_chunk_is_cut_after_a_late_comma(self, before: int, kept: int) -> None:
        text = "w " * before + ", " + "v " * 40
        assert [len(body) for body in bodies(plain(text))] == [kept, before + 41 - kept]

    def test_a_comma_that_would_begin_a_chunk(self) -> None:
        assert [len(body) for body in bodies(plain("w " * 60 + "," + "w " * 14 + ", v"))] == [75, 2]

    def test_without_a_comma_token(self) -> None:
        class NoComma(Words):
            comma_id = None

        chunks = clip_chunks(plain("w " * 60 + "," + "w " * 30), NoComma())
        assert sum(i not in (1, 2) for i in chunks[0].ids) == 75

    def test_breaks(self) -> None:
        assert [len(body) for body in bodies([BREAK])] == [0]
        assert [len(body) for body in bodies([*plain("a"), BREAK, *plain("b b")])] == [1, 2]
        assert [len(body) for body in bodies([*plain("a"), BREAK, BREAK, *plain("b")])] == [1, 0, 1]
        assert [len(body) for body in bodies([*plain("a"), BREAK, *plain("")])] == [1]

    def test_another_length(self) -> None:
        assert [len(body) for body in bodies(plain("w " * 20), length=12)] == [10, 10]


class TestT5Chunks:
    def test_padding_and_end(self) -> None:
        (chunk,) = t5_chunks([Segment("a", 1.0), Segment("b", 0.5)], Words())
        assert len(chunk.ids) == len(chunk.multipliers) == 256
        assert chunk.ids[2:] == [2] + [0] * 253
        assert chunk.multipliers[:4] == [1.0, 0.5, 1.0, 1.0]

    def test_long_texts_are_not_cut(self) -> None:
        (chunk,) = t5_chunks(plain("w " * 300), Words())
        assert len(chunk.ids) == 301

    def test_chunks_are_as_long_as_the_longest(self) -> None:
        chunks = t5_chunks([*plain("a"), BREAK, *plain("w " * 300)], Words())
        assert [len(chunk.ids) for chunk in chunks] == [301, 301]

    def test_breaks(self) -> None:
        assert len(t5_chunks([BREAK], Words())) == 1
        assert len(t5_chunks([*plain("a"), BREAK, *plain("")], Words())) == 1
        assert len(t5_chunks([*plain("a"), BREAK, BREAK, *plain("b")], Words())) == 3


def test_mode_none_reads_nothing() -> None:
    assert segments_of("(a BREAK b:1.2.3)", "None") == [Segment("(a BREAK b:1.2.3)", 1.0)]


class TestEmphasis:
    states = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)) + 1

    def test_original_keeps_the_mean(self) -> None:
        scaled = emphasise(self.states, [1.0, 2.0, 0.5, 1.0], "Original")
        torch.testing.assert_close(scaled.mean(), self.states.mean())
        assert not torch.equal(scaled, self.states)

    def test_no_norm_is_the_product(self) -> None:
        scaled = emphasise(self.states, [1.0, 2.0, 0.5, 1.0], "No norm")
        torch.testing.assert_close(scaled, self.states * torch.tensor([[1.0], [2.0], [0.5], [1.0]]))

    @pytest.mark.parametrize("mode", ["Ignore", "None"])
    def test_others_leave_it(self, mode: Any) -> None:
        assert emphasise(self.states, [1.0, 2.0, 0.5, 1.0], mode) is self.states


def small_encoders() -> TextEncoders:
    torch.manual_seed(0)
    clip = CLIPText(CLIPParams(vocab_size=100, hidden_size=16, num_layers=2, num_heads=2, mlp_hidden=32))
    t5 = T5Encoder(T5Params(vocab_size=100, hidden_size=16, num_layers=2, num_heads=2, head_dim=8, mlp_hidden=32))
    return TextEncoders(clip.eval(), Words(), t5.eval(), Words(), t5_length=16)


@pytest.fixture(scope="module")
def encoders() -> TextEncoders:
    return small_encoders()


class TestEncode:
    def test_shapes(self, encoders: TextEncoders) -> None:
        encoded = encoders.encode("a cat")
        assert [tuple(chunk.shape) for chunk in encoded.chunks] == [(16, 16)]
        assert encoded.pooled.shape == (16,)
        assert encoded.nbytes == 4 * (16 * 16 + 16)
        assert not encoded.pooled.requires_grad

    def test_emphasis_leaves_the_pooled_vector(self, encoders: TextEncoders) -> None:
        strong, weak = encoders.encode("a (cat:1.5)"), encoders.encode("a cat")
        assert torch.equal(strong.pooled, weak.pooled)
        assert not torch.equal(strong.chunks[0], weak.chunks[0])
        assert torch.equal(encoders.encode("a (cat:1.5)", "Ignore").chunks[0], weak.chunks[0])

    def test_a_break_warns_and_the_pooled_vector_is_of_the_first_chunk(self, encoders: TextEncoders) -> None:
        for compat, word in (("fixed", "longer"), ("forge", "no effect")):
            encoded = encoders.encode("a BREAK b", compat=compat)
            assert torch.equal(encoded.pooled, encoders.encode("a").pooled)
            assert len(encoded.warnings) == 1
            assert word in encoded.warnings[0]
        assert encoders.encode("a BREAK").warnings == ()

    def test_clip_states(self, encoders: TextEncoders) -> None:
        chunks = clip_chunks(segments_of("w " * 80), Words())
        states = clip_states(encoders.clip, chunks, "Original")
        assert states.shape == (154, 16)
        assert not torch.equal(states, clip_states(encoders.clip, chunks, "Original", skip=2))


class Residency:
    """A provider of encoders that counts how often they had to be there."""

    def __init__(self, encoders: TextEncoders) -> None:
        self.encoders, self.times = encoders, 0

    @contextmanager
    def __call__(self) -> Iterator[TextEncoders]:
        self.times += 1
        yield self.encoders


@pytest.fixture
def residency(encoders: TextEncoders) -> Residency:
    return Residency(encoders)


def conditioner(residency: Residency, **options: Any) -> Conditioner:
    return Conditioner(residency, "model", EmbeddingCache(1 << 20), **options)


class TestConditioner:
    def test_parts_weights_and_schedules(self, residency: Residency) -> None:
        (composition,) = conditioner(residency)([plan_prompt("[a:b:2] AND c:0.5", 4)], 3.5)
        (weight_1, first), (weight_2, second) = composition.parts
        assert (weight_1, weight_2) == (1.0, 0.5)
        assert [end for end, _ in first.entries] == [2, 4]
        assert first.at(2) is not first.at(3)
        assert second.at(0).guidance == 3.5

    def test_an_alternation_makes_one_object_per_text(self, residency: Residency) -> None:
        (composition,) = conditioner(residency)([plan_prompt("[a|b]", 6)], None)
        entries = [conditioning for _, conditioning in composition.parts[0][1].entries]
        assert len(entries) == 6
        assert len({id(entry) for entry in entries}) == 2
        assert entries[0] is entries[2]

    def test_equal_prompts_share_their_conditioning(self, residency: Residency) -> None:
        first, second = conditioner(residency)([plan_prompt("a", 4), plan_prompt("a", 4)], None)
        assert first.parts[0][1] is second.parts[0][1]

    def test_no_prompt_depends_on_its_company(self, residency: Residency) -> None:
        alone = conditioner(residency)([plan_prompt("a", 4)], None)[0]
        together = conditioner(residency)([plan_prompt("w " * 40, 4), plan_prompt("a", 4)], None)[1]
        assert torch.equal(alone.parts[0][1].at(0).context, together.parts[0][1].at(0).context)

    def test_a_known_prompt_needs_no_encoders(self, residency: Residency) -> None:
        builder = conditioner(residency)
        plans = [plan_prompt("(a:1.2.3) AND [b:c:2]", 4), plan_negative("d", 4)]
        first, second = list[str](), list[str]()
        before = builder(plans, 3.5, first)
        assert residency.times == 1
        after = builder(plans, 2.0, second)
        assert residency.times == 1
        assert first == second
        assert len(first) == 1
        assert torch.equal(before[0].parts[0][1].at(0).context, after[0].parts[0][1].at(0).context)
        assert after[0].parts[0][1].at(0).guidance == 2.0

    def test_numbers_are_looked_at_once_and_not_again_from_the_cache(self, residency: Residency) -> None:
        seen: list[tuple[str, int]] = []
        builder = conditioner(residency, check=lambda role, results: seen.append((role, len(results))))
        for _ in range(2):
            builder([plan_prompt("a BREAK b", 4), plan_prompt("c", 4)], None)
        assert seen == [("t5", 2), ("clip", 1), ("t5", 1), ("clip", 1)]

    @pytest.mark.parametrize("refused", ["t5", "clip"])
    def test_what_is_refused_is_not_remembered(self, residency: Residency, refused: str) -> None:
        def check(role: str, results: Sequence[Tensor]) -> None:
            if role == refused:
                raise ModelError(role)

        builder = conditioner(residency, check=check)
        for _ in range(2):
            with pytest.raises(ModelError, match=refused):
                builder([plan_prompt("a", 4)], None)
        assert len(builder.cache) == 0

    def test_a_text_of_one_chunk_is_not_copied(self, residency: Residency) -> None:
        builder = conditioner(residency)
        (composition,) = builder([plan_prompt("a", 4)], None)
        assert composition.parts[0][1].at(0).context is builder.encode(["a"])["a"].chunks[0]

    @pytest.mark.parametrize("change", [{"model_key": "other"}, {"emphasis": "No norm"}, {"compat": "forge"}])
    def test_what_changes_the_result_is_in_the_key(self, residency: Residency, change: dict[str, Any]) -> None:
        from dataclasses import replace

        builder = conditioner(residency)
        builder([plan_prompt("a", 4)], None)
        replace(builder, **change)([plan_prompt("a", 4)], None)
        assert residency.times == 2

    def test_row_4_all_chunks_are_read(self, residency: Residency) -> None:
        warnings: list[str] = []
        (fixed,) = conditioner(residency)([plan_prompt("a BREAK b", 4)], None, warnings)
        context = fixed.parts[0][1].at(0).context
        encoded = residency.encoders.encode("a BREAK b")
        assert context.shape == (32, 16)
        assert torch.equal(context, torch.cat(encoded.chunks))
        assert len(warnings) == 1

    @pytest.mark.parametrize("prompt", ["a AND b:1.2.3", "a AND [b:b:2]:1.2.3", "a (b:1,3)", "[a:b:1.2.3]", "(a:1.5"])
    def test_row_9_what_is_no_weight_is_told_once(self, residency: Residency, prompt: str) -> None:
        warnings: list[str] = []
        for _ in range(2):  # the second time from the cache
            conditioner(residency)([plan_prompt(prompt, 4)], None, warnings)
            assert len(warnings) == 1
        literal: list[str] = []
        conditioner(residency)([plan_prompt("a b:1.2.3", 4)], None, literal)
        conditioner(residency, emphasis="None")([plan_prompt("a (b:1,3)", 4)], None, literal)
        assert literal == []

    def test_row_4_forge_takes_chunks_for_rows(self, residency: Residency) -> None:
        (forge,) = conditioner(residency, compat="forge")([plan_prompt("[a BREAK b:c:2]", 4, compat="forge")], None)
        scheduled = forge.parts[0][1]
        first = residency.encoders.encode("a BREAK b", compat="forge")
        assert torch.equal(scheduled.at(0).context, first.chunks[0])
        assert torch.equal(scheduled.at(3).context, first.chunks[1])
        assert torch.equal(scheduled.at(3).pooled, residency.encoders.encode("c").pooled)

    def test_row_6_guidance(self) -> None:
        assert resolve_guidance(None, True) == 3.5
        assert resolve_guidance(0.0, True) == 0.0
        assert resolve_guidance(0.0, True, "forge") == 3.5
        assert resolve_guidance(2.5, True, "forge") == 2.5
        assert resolve_guidance(2.5, False) is None

    def test_row_9_texts_of_different_length(self, residency: Residency) -> None:
        text = f"[a:{'w ' * 40}:2]"
        (fixed,) = conditioner(residency)([plan_prompt(text, 4)], None)
        short = fixed.parts[0][1].at(0).context
        assert short.shape == fixed.parts[0][1].at(3).context.shape == (41, 16)
        assert torch.equal(short[16:], short[15:16].expand(25, -1))
        with pytest.raises(RequestError, match="differ in length"):
            conditioner(residency, compat="forge")([plan_prompt(text, 4, compat="forge")], None)


class TestCache:
    def encoded(self, rows: int = 1) -> EncodedText:
        return EncodedText((torch.zeros(rows, 1),), torch.zeros(1))  # 4 * rows + 4 bytes

    def test_the_least_used_goes_first(self) -> None:
        cache = EmbeddingCache(24)
        for key in "abc":
            cache.put(key, self.encoded())
        assert cache.get("a") is not None
        cache.put("d", self.encoded())
        assert cache.get("b") is None
        assert cache.get("a") is not None
        assert (len(cache), cache.nbytes) == (3, 24)

    def test_what_is_too_large_is_not_kept(self) -> None:
        cache = EmbeddingCache(24)
        cache.put("a", self.encoded())
        cache.put("b", self.encoded(rows=100))
        assert cache.get("b") is None
        assert cache.get("a") is not None
        cache.clear()
        assert (len(cache), cache.nbytes) == (0, 0)

    def test_no_room_at_all(self) -> None:
        cache = EmbeddingCache(0)
        cache.put("a", self.encoded())
        assert len(cache) == 0
