"""Noise sources: first and following draws, variations, ENSD, resizing, the Brownian tree."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from goldens import Case
from torch import Tensor

from lightweight_engine.flux.noise import BrownianNoise, ImageNoise, open_stream


def check(case: Case) -> None:
    {"brownian": _brownian, "randn_local": _local, None: _image}[case.get("kind")](case)


def assert_noise(ours: Tensor, golden: Tensor, source: str) -> None:
    """The CPU's draws exactly, imitated ones within 1e-6."""
    torch.testing.assert_close(ours, golden, rtol=0, atol=0 if source == "CPU" else 1e-6)


def _image(case: Case) -> None:
    source = case["source"]
    resize = (case.get("seed_resize_from_h", 0) // 8, case.get("seed_resize_from_w", 0) // 8)
    state = torch.get_rng_state()
    noise = ImageNoise(
        tuple(case["shape"]),
        case["seeds"],
        source=source,
        subseeds=case.get("subseeds", ()),
        subseed_strength=case.get("subseed_strength", 0.0),
        resize_from=resize if all(resize) else None,
        seed_delta=case.get("ensd", 0),
        compat="forge",
    )
    first = noise.first()
    if case.has("global_after"):
        assert torch.equal(torch.randn(8), case.tensor("global_after"))
    torch.set_rng_state(state)
    if case.has("first"):
        # a variation is computed, not drawn: the last bit of a sine differs between machines
        exact = not case.get("subseed_strength")
        assert_noise(first, case.tensor("first"), source if exact else "computed")
        for name in ("next1", "next2"):
            assert_noise(noise.next(), case.tensor(name), source)
    else:
        golden = case.tensor("first256")
        assert_noise(first.flatten()[: golden.numel()].view_as(golden), golden, source)
        _assert_digest(case, first, source)


def _assert_digest(case: Case, first: Tensor, source: str) -> None:
    assert abs(float(first.double().sum()) - case["sum"]) < 1e-5 * first.numel() ** 0.5
    if source == "CPU":
        assert hashlib.sha256(np.ascontiguousarray(first.numpy()).tobytes()).hexdigest() == case["sha256"][0]


def _local(case: Case) -> None:
    ours = open_stream(case["source"], case["seed"]).randn(tuple(case["shape"]))
    assert_noise(ours, case.tensor("x"), case["source"])


def _brownian(case: Case) -> None:
    sigmas = case.tensor("sigmas").tolist()
    positive = [sigma for sigma in sigmas if sigma > 0]
    noise = BrownianNoise(tuple(case["shape"][1:]), case["seeds"], min(positive), max(sigmas), source=case["source"])
    draws = [(sigmas[i], sigmas[i + 1], f"n{i}") for i in range(4)]
    draws += [(sigmas[0], 0.95, "mid"), (sigmas[0], sigmas[1], "again0")]
    for start, end, name in draws:
        torch.testing.assert_close(noise(start, end), case.tensor(name), rtol=1e-6, atol=1e-6)
