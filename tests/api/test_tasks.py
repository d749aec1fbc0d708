"""What the front reckons of tasks before they are done."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from lightweight_engine import Config
from lightweight_engine.apps.server.tasks import check, cost_of, digest_of
from lightweight_engine.errors import RequestError
from lightweight_engine.request import GenerationRequest, UpscaleRequest

PICTURE = base64.b64encode(bytes(100)).decode()


def test_more_work_costs_more() -> None:
    plain = cost_of(GenerationRequest(width=1000, height=1000, steps=20))
    assert plain == 20
    assert cost_of(GenerationRequest(width=1000, height=1000, steps=20, num_outputs=3)) == 3 * plain
    assert cost_of(GenerationRequest(width=1000, height=1000, steps=20, hr_scale=2.0, hr_steps=5)) == 2 * plain
    one = cost_of(UpscaleRequest(images=(PICTURE,)))
    two = UpscaleRequest(images=(PICTURE,) * 2, upscaler_2="Lanczos", upscaler_2_visibility=0.5)
    assert 0 < one < plain and cost_of(two) == 4 * one


def test_equal_tasks_have_one_digest() -> None:
    first, again = (GenerationRequest(prompt="a", seed=1), GenerationRequest(seed=1, prompt="a"))
    assert digest_of(first) == digest_of(again) != digest_of(GenerationRequest(prompt="a", seed=2))
    larger = UpscaleRequest(images=(PICTURE,))
    assert digest_of(larger) == digest_of(UpscaleRequest(**{"images": PICTURE}))
    assert digest_of(larger) != digest_of(UpscaleRequest(images=(PICTURE,), by=3))


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("steps", {"width": 4096, "height": 4096, "steps": 300}),
        ("hr_sampler", {"hr_sampler": "Foo"}),
        ("hr_scheduler", {"hr_scheduler": "Foo"}),
        ("hr_scheduler", {"sampler": "DPM++ 2M", "hr_scheduler": "Turbo"}),
        ("scheduler", {"scheduler": "Foo", "hr_scheduler": "Foo"}),
        ("mask", {"mask": PICTURE}),
    ],
)
def test_the_field_at_fault_is_named_before_a_job_waits(field: str, given: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=f"^{field}: ") as caught:
        check(GenerationRequest.model_validate(given), Config())
    assert caught.value.field == field
