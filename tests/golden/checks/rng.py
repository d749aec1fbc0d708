"""The noise of a batch as the pipeline draws it, and what it leaves in the global generator."""

from __future__ import annotations

import torch
from goldens import Case
from torch import Tensor

from lightweight_engine.flux.noise import ImageNoise


def check(case: Case) -> None:
    state = torch.get_rng_state()
    resize = (case["from_h"] // 8, case["from_w"] // 8)
    noise = ImageNoise(
        tuple(case["shape"]),
        case["seeds"],
        source=case["source"],
        subseeds=case["subseeds"],
        subseed_strength=case["subseed_strength"],
        resize_from=resize if all(resize) else None,
        compat="forge",
    )
    first, second = noise.first(), noise.next()
    after = torch.randn(6)
    torch.set_rng_state(state)
    exact = 0 if not case["subseed_strength"] else 1e-6
    torch.testing.assert_close(first, _array(case, "first"), rtol=0, atol=exact)
    assert torch.equal(second, _array(case, "second"))
    assert torch.equal(after, _array(case, "global_after"))


def _array(case: Case, name: str) -> Tensor:
    return torch.from_numpy(case.array(f"{name}_{case.id}"))
