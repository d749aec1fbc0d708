"""Guidance: the mix, compositions, what is left out, shared calls, and inpainting."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lightweight_engine.errors import RequestError
from lightweight_engine.flux.conditioning import Composition, Conditioning, Scheduled
from lightweight_engine.flux.guidance import Guided, Inpainting, SkipRules, shared_length
from lightweight_engine.flux.noise import ImageNoise

SHAPE = (16, 4, 4)


def text(value: float, tokens: int = 8) -> Conditioning:
    return Conditioning(torch.arange(tokens * 2.0).view(tokens, 2), torch.full((3,), value), 3.5)


def always(value: float, tokens: int = 8) -> Scheduled:
    return Scheduled(((1000, text(value, tokens)),))


def prompt(*parts: tuple[float, float], tokens: int = 8) -> Composition:
    return Composition(tuple((weight, always(value, tokens)) for weight, value in parts))


class Network:
    """The velocity is the pooled value; keeps the rows, contexts and sigmas of its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[float], list[int]]] = []
        self.conditionings: list[Conditioning] = []

    def __call__(self, x: Tensor, sigma: float, conditionings: Sequence[Conditioning]) -> Tensor:
        values = [float(cond.pooled[0]) for cond in conditionings]
        self.calls.append((values, [len(cond.context) for cond in conditionings]))
        self.conditionings = list(conditionings)
        return torch.tensor(values).view(-1, 1, 1, 1).expand_as(x)


X = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))


def guide(network: Network, positives: list[Composition], cfg: float = 1.0, **options) -> Guided:
    negatives = options.pop("negatives", [always(-1.0)] * len(positives))
    return Guided(network, positives, negatives, cfg, **options)


def test_scale_1_leaves_the_negative_out() -> None:
    network = Network()
    denoise = guide(network, [prompt((1.0, 0.5))] * 2)
    torch.testing.assert_close(denoise(X, 0.8), X - 0.4)
    assert network.calls == [([0.5, 0.5], [8, 8])]
    assert denoise.unconditional is None


def test_the_mix_of_positive_and_negative_takes_one_call() -> None:
    network = Network()
    denoise = guide(network, [prompt((1.0, 0.5))] * 2, 3.0)
    positive, negative = X - 0.5 * 0.8, X + 1.0 * 0.8
    torch.testing.assert_close(denoise(X, 0.8), negative + 3 * (positive - negative))
    assert network.calls == [([0.5, 0.5, -1.0, -1.0], [8] * 4)]
    torch.testing.assert_close(denoise.unconditional, negative)


def test_without_negatives_the_scale_has_no_effect() -> None:
    denoise = guide(Network(), [prompt((1.0, 0.5))] * 2, 3.0, negatives=None)
    torch.testing.assert_close(denoise(X, 0.8), X - 0.4)


def test_parts_are_a_weighted_mean_and_scale_the_guidance() -> None:
    parts = prompt((0.6, 1.0), (0.9, -0.5))
    mean = X - 0.5 * (0.6 * 1.0 + 0.9 * -0.5) / 1.5
    negative = X + 0.5
    denoise = guide(Network(), [parts] * 2, 2.0)
    torch.testing.assert_close(denoise(X, 0.5), negative + (mean - negative) * 2.0 * 1.5)


def test_weights_at_scale_1_are_normalised_except_in_forge_mode() -> None:
    parts = prompt((0.6, 1.0), (0.9, -0.5))
    mean = X - 0.5 * (0.6 * 1.0 + 0.9 * -0.5) / 1.5
    torch.testing.assert_close(guide(Network(), [parts] * 2)(X, 0.5), mean)
    torch.testing.assert_close(guide(Network(), [parts] * 2, compat="forge")(X, 0.5), mean * 1.5)
    thirty = prompt((30.0, 1.0))
    torch.testing.assert_close(guide(Network(), [thirty] * 2)(X, 0.5), X - 0.5)
    torch.testing.assert_close(guide(Network(), [thirty] * 2, compat="forge")(X, 0.5), (X - 0.5) * 30)


def test_weights_that_add_up_to_0_are_refused() -> None:
    with pytest.raises(RequestError, match="add up to 0"):
        guide(Network(), [prompt((1.0, 1.0), (-1.0, 0.5))])


def test_pictures_of_a_batch_may_have_different_parts() -> None:
    network = Network()
    denoised = guide(network, [prompt((1.0, 1.0), (3.0, 2.0)), prompt((1.0, 0.5))], 2.0)(X, 0.5)
    assert network.calls[0][0] == [1.0, 2.0, 0.5, -1.0, -1.0]
    negative = X + 0.5
    first, second = X[0] - 0.5 * 1.75, X[1] - 0.25
    torch.testing.assert_close(denoised[0], negative[0] + (first - negative[0]) * 2.0 * 4)
    torch.testing.assert_close(denoised[1], negative[1] + (second - negative[1]) * 2.0)


def test_a_schedule_goes_by_the_count_of_calls() -> None:
    network = Network()
    changing = Scheduled(((1, text(0.1)), (3, text(0.2))))
    denoise = guide(network, [Composition(((1.0, changing),))])
    for _ in range(6):
        denoise(X[:1], 0.5)
    assert [values[0] for values, _ in network.calls] == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.1, 0.1])
    assert denoise.calls == 6


@pytest.mark.parametrize(
    ("rules", "rows"),
    [
        (SkipRules(), [2, 2, 2, 2, 2, 2]),
        (SkipRules(s_min_uncond=0.6), [2, 2, 2, 1, 2, 1]),
        (SkipRules(s_min_uncond=0.6, s_min_uncond_all=True), [2, 2, 2, 1, 1, 1]),
        (SkipRules(skip_early_cond=0.3, total_calls=6), [1, 1, 2, 2, 2, 2]),
        (SkipRules(skip_early_cond=1 / 3, total_calls=6), [1, 1, 1, 2, 2, 2]),
    ],
)
def test_rules_leave_the_negative_out_of_some_calls(rules: SkipRules, rows: list[int]) -> None:
    network = Network()
    denoise = guide(network, [prompt((1.0, 0.5))], 3.0, rules=rules)
    for sigma in (1.0, 0.8, 0.6, 0.5, 0.4, 0.3):
        denoise(X[:1], sigma)
    assert [len(values) for values, _ in network.calls] == rows


@pytest.mark.parametrize(
    ("first", "second", "length"), [(8, 8, 8), (8, 4, 8), (4, 16, 16), (4, 20, None), (6, 4, 12), (301, 256, None)]
)
def test_lengths_share_a_call_up_to_four_repeats(first: int, second: int, length: int | None) -> None:
    assert shared_length(first, second) == length


def test_shorter_contexts_are_repeated_as_a_whole() -> None:
    network = Network()
    guide(network, [prompt((1.0, 0.5), tokens=8)], 3.0, negatives=[always(-1.0, tokens=4)])(X[:1], 0.5)
    assert network.calls[0][1] == [8, 8]
    short = text(-1.0, 4).context
    assert torch.equal(network.conditionings[1].context, torch.cat((short, short)))


def test_lengths_that_do_not_fit_take_two_calls_with_the_same_result() -> None:
    network = Network()
    denoise = guide(network, [prompt((1.0, 0.5), tokens=5)], 3.0, negatives=[always(-1.0, tokens=4)])
    one_call = guide(Network(), [prompt((1.0, 0.5))], 3.0)
    torch.testing.assert_close(denoise(X[:1], 0.5), one_call(X[:1], 0.5))
    assert [lengths for _, lengths in network.calls] == [[5], [4]]


def test_parts_of_different_length_repeat_their_last_row() -> None:
    network = Network()
    mixed = Composition(((1.0, always(0.5, 8)), (1.0, always(0.2, 6))))
    guide(network, [mixed])(X[:1], 0.5)
    assert network.calls[0][1] == [8, 8]
    context = text(0.2, 6).context
    assert torch.equal(network.conditionings[1].context, torch.cat((context, context[-1:], context[-1:])))


def test_a_fitted_conditioning_is_the_same_object_at_every_call() -> None:
    network = Network()
    denoise = guide(network, [prompt((1.0, 0.5), tokens=8)], 3.0, negatives=[always(-1.0, tokens=4)])
    denoise(X[:1], 0.5)
    first = network.conditionings
    denoise(X[:1], 0.4)
    assert all(a is b for a, b in zip(first, network.conditionings, strict=True))


def test_the_network_may_answer_in_half_precision() -> None:
    class Half(Network):
        def __call__(self, x: Tensor, sigma: float, conditionings: Sequence[Conditioning]) -> Tensor:
            return super().__call__(x, sigma, conditionings).bfloat16()

    assert guide(Half(), [prompt((1.0, 0.5))] * 2, 3.0)(X, 0.8).dtype == torch.float32


def test_inpainting_keeps_what_the_mask_covers() -> None:
    init, mask = torch.ones(1, *SHAPE), torch.zeros(1, *SHAPE)
    mask[..., :2] = 1
    seen: list[Tensor] = []

    def denoise(x: Tensor, sigma: float) -> Tensor:
        seen.append(x)
        return x * 0

    painting = Inpainting(denoise, init, mask, lambda like: torch.full_like(like, 5.0))
    x = torch.full((1, *SHAPE), 7.0)
    denoised = painting(x, 0.25)
    assert torch.equal(seen[0][..., 2:], x[..., 2:])
    assert (seen[0][..., :2] == 0.25 * 5 + 0.75).all()
    assert torch.equal(denoised, mask)
    assert torch.equal(painting.blend(x)[..., :2], init[..., :2])
    assert torch.equal(painting.blend(x)[..., 2:], x[..., 2:])


def test_masks_repeat_with_their_seed_whatever_the_global_generator_holds() -> None:
    init, mask = torch.ones(1, *SHAPE), torch.ones(1, *SHAPE)

    def twice(seed: int) -> list[Tensor]:
        seen: list[Tensor] = []
        side = ImageNoise(SHAPE, [seed], source="CPU").side()
        painting = Inpainting(lambda x, sigma: seen.append(x) or x, init, mask, side)
        painting(init, 0.5)
        painting(init, 0.5)
        return seen

    torch.manual_seed(1)
    first = twice(3)
    torch.manual_seed(2)
    assert all(map(torch.equal, first, twice(3)))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], twice(4)[0])


def test_inpainting_hands_on_the_unconditional_latent() -> None:
    guided = guide(Network(), [prompt((1.0, 0.5))], 3.0)
    painting = Inpainting(guided, X[:1], torch.zeros(1, *SHAPE), torch.randn_like)
    assert painting.unconditional is None
    painting(X[:1], 0.5)
    assert painting.unconditional is guided.unconditional is not None
