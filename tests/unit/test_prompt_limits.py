"""How long a prompt may be: counted in linear time before anything is parsed, for every way into the engine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from command_line import command_line

from lightweight_engine import Config, GenerationRequest, LightweightEngine
from lightweight_engine.core.limits import STEPWISE_SAMPLERS, STEPWISE_SCHEDULERS, check_cost, check_fields
from lightweight_engine.core.processing import plan_schedule, sampler_options
from lightweight_engine.errors import RequestError, TooCostlyError
from lightweight_engine.flux.chunks import segments_of, t5_chunks, t5_length
from lightweight_engine.flux.params import TIME_SHIFTS
from lightweight_engine.flux.sampling import forecast
from lightweight_engine.labels import resolve_sampler
from lightweight_engine.request import MAX_STEPS, PROMPTS

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


@pytest.mark.parametrize("steps", [1, 50])
def test_a_sampler_that_chooses_its_steps_counts_with_as_many_as_it_takes(tmp_path: Path, steps: int) -> None:
    tight = LightweightEngine(Config(models_dir=tmp_path, device="cpu", offline=True, max_megapixel_steps=0.5))
    own = {**SMALL, "prompt": "a", "steps": steps, "sampler": "DPM adaptive"}
    told = r"64x64 x {} evaluations \(as many as it may take\) x .*; choose another sampler or a smaller picture$"
    second = {"enable_hr": True, "hr_scale": 1.0, "hr_steps": 2, "hr_cfg": 2.0}
    tight.plan(GenerationRequest(**own))  # 0.37
    for more, field, count in (
        ({"eta": 2.0}, "sampler", 360),
        ({"cfg_scale": 2.0}, "sampler", 180),
        (second, "sampler", 180),
        ({**second, "sampler": "Euler", "steps": 1, "hr_sampler": "DPM adaptive"}, "hr_sampler", 180),
    ):
        with pytest.raises(TooCostlyError, match=f"^{field}: {told.format(count)}") as raised:
            tight.plan(GenerationRequest(**{**own, "hr_upscaler": "Latent", **more}))
        assert raised.value.field == field
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


def test_a_cost_just_over_the_limit_is_told_with_digits_that_show_it() -> None:
    with pytest.raises(TooCostlyError, match=r"is 1\.05 megapixel-steps, over the limit of 1\.00 \("):
        check_cost(GenerationRequest(steps=1), (1024, 1024), 1, Config(max_megapixel_steps=1))


@pytest.mark.parametrize("compat", ["fixed", "forge"])
@pytest.mark.parametrize("scheduler", sorted(STEPWISE_SCHEDULERS))
@pytest.mark.parametrize("sampler", sorted(STEPWISE_SAMPLERS))
def test_these_pairs_evaluate_the_network_once_a_step(sampler: str, scheduler: str, compat: str) -> None:
    for steps in (1, 2, 7, 50):
        request = GenerationRequest(sampler=sampler, scheduler=scheduler, steps=steps, compat=compat)
        for changed in ({}, {"use_old_karras": True}, {"discard_next_to_last": True}):
            asked = request.model_copy(update=changed)
            assert all(evaluations(asked, mu) == steps for mu in TIME_SHIFTS.values())


def test_they_do_so_with_as_many_steps_as_may_be() -> None:
    for scheduler in STEPWISE_SCHEDULERS:
        for steps in (300, MAX_STEPS - 1, MAX_STEPS):
            assert evaluations(GenerationRequest(sampler="Euler", scheduler=scheduler, steps=steps), 1.15) == steps


def evaluations(request: GenerationRequest, mu: float) -> int:
    pair = resolve_sampler(request.sampler, request.scheduler, request.compat)
    foreseen = forecast(plan_schedule(request, *pair, mu, entered=False), sampler_options(request))
    assert foreseen is not None
    return len(foreseen.sigmas)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({}, "72x64 x 4 evaluations"),
        ({"cfg_scale": 2.0}, "72x64 x 8 evaluations"),
        ({"sampler": "Heun"}, None),
        ({"scheduler": "DDIM"}, None),
        ({"sigma_min": 0.5}, None),
        ({"prompt": "a AND b"}, None),
        ({"width": None}, None),
        ({"image": "start.png"}, None),
    ],
)
def test_what_the_fields_tell_of_the_work_is_told_before_a_model_is_there(
    more: dict[str, Any], told: str | None
) -> None:
    """What they do not tell is refused, with the same error, when the passes are planned."""
    request = GenerationRequest(**{"width": 79, "height": 65, "steps": 4, **more})
    if told is None:
        check_fields(request, Config(max_megapixel_steps=0.01))
        return
    with pytest.raises(TooCostlyError, match=f"^steps: {told}") as raised:
        check_fields(request, Config(max_megapixel_steps=0.01))
    assert raised.value.field == "steps"


def test_the_hires_pass_that_takes_too_much_is_told_by_its_own_steps(tmp_path: Path) -> None:
    tight = LightweightEngine(Config(models_dir=tmp_path, device="cpu", offline=True, max_megapixel_steps=0.02))
    request = GenerationRequest(**{**SMALL, "hr_scale": 2.0, "hr_steps": 2, "hr_upscaler": "Latent"})
    with pytest.raises(TooCostlyError, match="^hr_steps: 128x128 x 2 evaluations") as raised:
        tight.plan(request)
    assert raised.value.field == "hr_steps"
    tight.close()


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
