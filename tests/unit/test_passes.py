"""The passes of a request: what is planned of them is what is done."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from lightweight_engine import GenerationRequest, LightweightEngine
from lightweight_engine.core.describe import pixels_sha256
from lightweight_engine.core.passes import Pass, first_pass, hires_pass
from lightweight_engine.errors import RequestError
from lightweight_engine.flux.conditioner import Conditioner
from lightweight_engine.flux.prompt import PromptPart, PromptPlan

START = Image.new("RGB", (64, 64), "red")
SMALL = {"prompt": "a woman", "width": 64, "height": 64, "steps": 4, "seed": 7, "hr_steps": 2, "hr_upscaler": "Latent"}
SWITCH = "[a cat:a very much longer text:3]"


def passes(engine: LightweightEngine, request: GenerationRequest) -> Iterator[Pass]:
    tools = engine._tools(engine.networks, engine.loras)
    first = first_pass(request, tools, [], lambda *_: None)
    second, _ = hires_pass(first, tools, [], lambda *_: None)
    return filter(None, (first, second))


def encoded(engine: LightweightEngine, request: GenerationRequest, patch: pytest.MonkeyPatch) -> list[list[PromptPlan]]:
    """What each pass of a request has encoded."""
    seen: list[list[PromptPlan]] = []
    encode = Conditioner.__call__

    def watched(self: Conditioner, plans: list[PromptPlan], *rest: Any) -> Any:
        seen.append(plans)
        return encode(self, plans, *rest)

    patch.setattr(Conditioner, "__call__", watched)
    engine.run(request)
    return seen


@pytest.mark.parametrize("compat", ["fixed", "forge"])
@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": SWITCH, "image": START, "denoising_strength": 0.3},
        {"prompt": SWITCH, "sampler": "Heun"},
        {"prompt": f"{SWITCH} AND a dog", "sampler": "Euler a"},
        {"cfg_scale": 2.0, "negative_prompt": "<lora:left in forge:1> [bad:worse:0.5]"},
        {"prompt": SWITCH, "hr_scale": 1.5, "hr_sampler": "Heun"},
        {"hr_prompt": SWITCH, "hr_scale": 1.5, "hr_cfg": 2.0, "hr_negative_prompt": SWITCH},
    ],
    ids=("a start picture", "two evaluations a step", "parts", "tags", "a second pass", "a second pass of its own"),
)
def test_what_is_planned_is_what_is_encoded(
    engine: LightweightEngine, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], compat: str
) -> None:
    request = GenerationRequest(**{**SMALL, "compat": compat, **fields})
    planned = [each.texts for each in passes(engine, request)]
    assert encoded(engine, request, monkeypatch) == planned


@pytest.mark.parametrize("field", ["negative_prompt", "hr_negative_prompt"])
def test_tags_count_where_they_are_encoded(engine: LightweightEngine, field: str) -> None:
    """In ``forge`` they are text of the negative prompt, and as long as any other."""
    tag = f"<lora:{'word ' * 5000}:1>"
    request = GenerationRequest(**{**SMALL, "compat": "forge", field: tag, "cfg_scale": 2.0, "hr_scale": 1.5})
    with pytest.raises(RequestError, match=rf"^{field}: [\d,]+ tokens are over the limit"):
        engine.plan(request)
    assert engine.plan(request.model_copy(update={"compat": "fixed"})).peak


@pytest.mark.parametrize("compat", ["fixed", "forge"])
@pytest.mark.parametrize(
    ("fields", "first", "second"),
    [
        ({"prompt": "[cat:dog:0.5]"}, ((2, "cat"), (4, "dog")), ((2, "dog"),)),
        ({"prompt": "[cat:dog:1.5]"}, ((4, "cat"),), ((1, "cat"), (2, "dog"))),
        ({"prompt": "[cat:dog:5]"}, ((4, "cat"),), ((1, "cat"), (2, "dog"))),
        ({"prompt": "[cat:dog:9]", "sampler": "Heun", "hr_sampler": "Euler"}, ((8, "cat"),), ((1, "cat"), (2, "dog"))),
        ({"prompt": "a", "hr_prompt": "[cat:dog:0.5]"}, ((4, "a"),), ((2, "dog"),)),
        ({"prompt": "[cat|dog]"}, tuple(zip(range(1, 5), ("cat", "dog") * 2, strict=True)), ((1, "cat"), (2, "dog"))),
    ],
    ids=("a share", "a share of the second", "a step of the second", "steps count twice", "its own prompt", "in turns"),
)
def test_schedules_go_on_in_the_second_pass(
    engine: LightweightEngine,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    first: tuple[tuple[int, str], ...],
    second: tuple[tuple[int, str], ...],
    compat: str,
) -> None:
    """As in the reference: steps are counted on from the first pass, and shares above 1 are of the second."""
    request = GenerationRequest(**{**SMALL, "hr_scale": 1.5, "compat": compat, **fields})
    expected = [[(PromptPart(1.0, schedule),)] for schedule in (first, second)]
    assert [each.texts for each in passes(engine, request)] == expected
    assert encoded(engine, request, monkeypatch) == expected


def test_negative_schedules_go_on_too(engine: LightweightEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"negative_prompt": "[bad:worse:0.5]", "cfg_scale": 2.0, "hr_cfg": 2.0, "hr_scale": 1.5}
    (_, second) = encoded(engine, GenerationRequest(**{**SMALL, **fields}), monkeypatch)
    assert second[-1] == (PromptPart(1.0, ((2, "worse"),)),)


def test_a_text_of_the_first_half_is_not_drawn_again(engine: LightweightEngine) -> None:
    def drawn(**fields: Any) -> str:
        (picture,) = engine.run(GenerationRequest(**{**SMALL, "hr_scale": 1.5, **fields})).images
        return pixels_sha256(picture)

    before = "[a man with a hat:a smiling woman:0.5]"
    assert drawn(prompt=before) == drawn(prompt=before, hr_prompt="a smiling woman")
