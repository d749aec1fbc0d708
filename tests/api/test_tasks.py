"""What the front reckons of tasks before they are done."""

from __future__ import annotations

import base64

from lightweight_engine.apps.server.tasks import cost_of, digest_of
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
