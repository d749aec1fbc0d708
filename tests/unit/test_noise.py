"""Noise streams: repeatable, per picture, without global state; the Brownian tree."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightweight_engine.flux.noise import (
    BrownianNoise,
    BrownianTree,
    ImageNoise,
    PhiloxStream,
    open_stream,
    paste_centred,
    side_seed,
    slerp,
)

SHAPE = (16, 8, 12)
SOURCES = ("CPU", "GPU", "NV")


@pytest.mark.parametrize("source", SOURCES)
def test_a_picture_gets_the_same_noise_in_any_batch(source: str) -> None:
    together = ImageNoise(SHAPE, [5, 6, 7], source=source, subseeds=[1, 2, 3], subseed_strength=0.2, seed_delta=9)
    alone = ImageNoise(SHAPE, [6], source=source, subseeds=[2], subseed_strength=0.2, seed_delta=9)
    assert torch.equal(together.first()[1:2], alone.first())
    for _ in range(3):
        assert torch.equal(together.next()[1:2], alone.next())
    blank = torch.zeros(3, *SHAPE)
    assert torch.equal(together.side()(blank)[1:2], alone.side()(blank[:1]))
    sigmas = (0.9, 0.4)
    assert torch.equal(together.brownian(0.01, 1.0)(*sigmas)[1:2], alone.brownian(0.01, 1.0)(*sigmas))


@pytest.mark.parametrize("source", SOURCES)
def test_no_global_state_is_read_or_written(source: str) -> None:
    def draw() -> list[Tensor]:
        noise = ImageNoise(SHAPE, [3], source=source, subseeds=[4], subseed_strength=0.5)
        return [noise.first(), noise.next(), noise.side()(torch.zeros(1, *SHAPE)), noise.brownian(0.1, 1.0)(1.0, 0.5)]

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = draw()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert all(map(torch.equal, first, draw()))


def test_forge_reseeds_the_global_generator() -> None:
    noise = ImageNoise(SHAPE, [70_000, 70_001], source="CPU", compat="forge")
    noise.first()
    after = torch.randn(4)
    assert torch.equal(after, torch.randn(4, generator=torch.Generator().manual_seed((70_001 + 100_000) % 65_536)))
    assert noise.side() is torch.randn_like


def test_noise_beside_the_picture_is_seeded_by_the_reference_rule() -> None:
    noise = ImageNoise(SHAPE, [70_000], source="CPU")
    assert side_seed(70_000) == 170_000 % 65_536
    expected = torch.randn(SHAPE, generator=torch.Generator().manual_seed(side_seed(70_000)))
    assert torch.equal(noise.side()(torch.zeros(1, *SHAPE))[0], expected)


def test_seed_delta_changes_what_follows_the_first_draw() -> None:
    plain, moved = ImageNoise(SHAPE, [5], source="CPU"), ImageNoise(SHAPE, [5], source="CPU", seed_delta=31_337)
    assert torch.equal(plain.first(), moved.first())
    assert torch.equal(moved.next()[0], open_stream("CPU", 5 + 31_337).randn(SHAPE))
    assert not torch.equal(plain.next(), moved.next())


def test_resizing_leaves_the_following_draws_alone() -> None:
    plain = ImageNoise(SHAPE, [5], source="CPU")
    resized = ImageNoise(SHAPE, [5], source="CPU", resize_from=(4, 6))
    own, pasted = plain.first()[0], resized.first()[0]
    assert torch.equal(pasted[:, 2:6, 3:9], open_stream("CPU", 5).randn((16, 4, 6)))
    assert torch.equal(pasted[:, :2], own[:, :2])
    assert torch.equal(plain.next(), resized.next())


def test_a_larger_patch_is_cut_alike_on_both_sides() -> None:
    patch = torch.arange(36.0).view(1, 6, 6)
    assert torch.equal(paste_centred(torch.zeros(1, 4, 8), patch)[:, :, 1:7], patch[:, 1:5])


def test_a_variation_ends_at_its_own_noise() -> None:
    low, high = open_stream("CPU", 1).randn(SHAPE), open_stream("CPU", 2).randn(SHAPE)
    torch.testing.assert_close(slerp(0.0, low, high), low, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(slerp(1.0, low, high), high, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(slerp(0.25, low, low), low)


def test_philox_is_normal_and_moves_on() -> None:
    stream = PhiloxStream(2**40 + 7)
    first, second = stream.randn((64, 1024)), stream.randn((64, 1024))
    assert not torch.equal(first, second)
    assert not torch.equal(first, PhiloxStream(7).randn((64, 1024)))
    assert float(first.mean()) == pytest.approx(0, abs=0.02)
    assert float(first.std()) == pytest.approx(1, abs=0.02)


def tree(seed: int = 3) -> BrownianTree:
    return BrownianTree(0.001, 1.0, seed, lambda node: open_stream("CPU", node).randn((4, 1000)))


def test_increments_add_up_in_any_order() -> None:
    path = tree()
    parts = path.increment(0.5, 0.9) + path.increment(0.2, 0.5)
    torch.testing.assert_close(parts, path.increment(0.2, 0.9), rtol=0, atol=1e-5)
    torch.testing.assert_close(tree().increment(0.2, 0.9), path.increment(0.2, 0.9), rtol=0, atol=1e-6)
    assert not path.increment(0.3, 0.3).any()
    assert torch.equal(path.increment(0.0, 2.0), path.increment(0.001, 1.0))


def test_forgotten_nodes_come_back_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tree().increment(0.123456, 0.654321)
    monkeypatch.setattr(BrownianTree, "_KEPT_NODES", 1)
    path = tree()
    path.increment(0.4, 0.8)
    assert torch.equal(path.increment(0.123456, 0.654321), expected)


def test_brownian_noise_has_unit_variance_and_a_sign() -> None:
    noise = BrownianNoise((4, 5000), [1, 2], 0.01, 1.0, source="CPU")
    drawn = noise(0.8, 0.3)
    assert drawn.shape == (2, 4, 5000)
    assert float(drawn.std()) == pytest.approx(1, abs=0.03)
    assert torch.equal(noise(0.3, 0.8), -drawn)


def test_the_tree_is_that_of_torchsde(monkeypatch: pytest.MonkeyPatch) -> None:
    torchsde = pytest.importorskip("torchsde")
    start, end = 0.000315751153, 1.0
    sigmas = [1.0, 0.940471, 0.7595109, 0.512844086, 0.1, 0.0141184488, start]
    for seed in (42, 2**33):
        theirs = torchsde.BrownianTree(start, torch.zeros(4, 6), t1=end, entropy=seed)
        ours = BrownianTree(start, end, seed, lambda node: open_stream("CPU", node).randn((4, 6)))
        for high, low in zip(sigmas, sigmas[1:], strict=False):
            low = max(low, 0.000316)  # torchsde warns about times outside its rounded ends
            torch.testing.assert_close(ours.increment(low, high), theirs(low, high), rtol=0, atol=1e-6)
    assert math.isfinite(float(ours.increment(0.0, 1.0).sum()))
