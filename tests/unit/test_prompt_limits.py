"""How long a prompt may be: counted in linear time before anything is parsed, for every way into the engine."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from command_line import command_line

from lightweight_engine import Config, GenerationRequest, LightweightEngine
from lightweight_engine.core.limits import PROMPTS, check_cost
from lightweight_engine.errors import RequestError, TooCostlyError
from lightweight_engine.flux.chunks import segments_of, t5_chunks, t5_length

SMALL = {"width": 64, "height": 64, "steps": 1, "seed": 1}
LONG = {
    "brackets": "(" * 10_000,
    "weights": "(a:1.1)" * 2_000,
    "nested words": "(a" * 5_000,
    "choices": "[a|b]" * 4_000,
    "parts": "BREAK " * 3_000,
    "letters that become several": "\ufdfa" * 2_000,
}


@pytest.mark.parametrize("field", PROMPTS)
@pytest.mark.parametrize("case", LONG)
def test_a_long_prompt_is_refused_at_once(engine: LightweightEngine, field: str, case: str) -> None:
    begin = time.perf_counter()
    with pytest.raises(RequestError, match=rf"{field}: [\d,]+ tokens .*4,096 .*max_prompt_tokens") as raised:
        engine.run(GenerationRequest(**{"prompt": "a woman", **SMALL, field: LONG[case]}))
    assert raised.value.field == field
    assert time.perf_counter() - begin < 2


def test_the_plan_and_the_command_line_refuse_it_too(
    engine: LightweightEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RequestError, match="max_prompt_tokens"):
        engine.plan(GenerationRequest(prompt=LONG["brackets"], **SMALL))
    done = command_line(capsys, tmp_path, monkeypatch)("generate", LONG["brackets"], "--steps", 1, "--device", "cpu")
    assert done.code == 2 and "max_prompt_tokens" in done.err


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [("a AND " * 100 + "b", 101), ("[a|b][a|b|c][a|b|c|d|e][a|b|c|d|e|f|g]", 100)],
    ids=["parts", "a schedule that never repeats"],
)
def test_a_prompt_of_many_texts_is_refused(engine: LightweightEngine, prompt: str, texts: int) -> None:
    with pytest.raises(RequestError, match=rf"prompt: {texts} texts.* 64 .*max_prompt_texts"):
        engine.run(GenerationRequest(**{**SMALL, "prompt": prompt, "steps": 100}))


def test_each_evaluation_counts_as_work(tmp_path: Path) -> None:
    """The limit of one request is on evaluations of the network: parts and a negative prompt have one each."""
    tight = LightweightEngine(Config(models_dir=tmp_path, device="cpu", offline=True, max_megapixel_steps=0.01))
    once = GenerationRequest(**{**SMALL, "prompt": "a", "steps": 2})  # 0.0082
    tight.run(once)
    for more in ({"prompt": "a AND b"}, {"cfg_scale": 2.0}):
        for ask in (tight.run, tight.plan):
            with pytest.raises(TooCostlyError, match="64x64 x 4 evaluations"):
                ask(once.model_copy(update=more))
    tight.close()


@pytest.mark.parametrize(
    ("outputs", "told"),
    [
        (1, "256x256 x 50 evaluations x 1 picture is 3 megapixel-steps.*; ask for fewer steps or a smaller picture$"),
        (2, r"x 50 evaluations x 2 pictures is 7 .*; ask for fewer steps, or fewer or smaller pictures$"),
    ],
)
def test_too_much_work_is_told_with_what_makes_it_less(outputs: int, told: str) -> None:
    request = GenerationRequest(prompt="a", steps=50, num_outputs=outputs)
    with pytest.raises(TooCostlyError, match=told):
        check_cost(request, (256, 256), 50, Config(max_megapixel_steps=1))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a smiling woman",
        "a woman BREAK with red hair BREAK",
        "(a:1.2)[b](c)" * 60,
        "word " * 700,
        "short BREAK " + "word " * 400,
        "½ﷺ" * 120,
        "a\\(b\\) " * 100,
    ],
)
def test_what_is_counted_is_never_less_than_what_is_encoded(engine: LightweightEngine, text: str) -> None:
    tokenizer = engine.networks.tokenizers[1]
    chunks = t5_chunks(segments_of(text), tokenizer)
    encoded = sum(len(chunk.ids) for chunk in chunks)
    assert encoded <= t5_length(text, lambda: tokenizer) <= 8 * encoded
