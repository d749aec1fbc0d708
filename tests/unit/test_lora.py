"""What each algorithm does to a matrix, against its formula in float64; branches against merges; what does not fit."""

from __future__ import annotations

import pytest
import torch
from lora_models import numbers
from torch import Tensor

from lightweight_engine.backend.lora import Change, Delta, joined, merged, side_branch, widened
from lightweight_engine.backend.lora_algorithms import (
    MAX_RANK,
    Dora,
    Full,
    Generalised,
    Hadamard,
    Kronecker,
    LowRank,
    Orthogonal,
    Replacement,
    Swapped,
)
from lightweight_engine.backend.lora_modules import ModuleTensors, Options, bias_delta, weight_deltas

OUT, IN = 12, 8
W = numbers(OUT, IN, seed=7)


def low_rank(scale: float = 0.5, rows: int = OUT, seed: int = 0) -> LowRank:
    return LowRank(numbers(3, IN, seed=seed), numbers(rows, 3, seed=seed + 1), scale)


def module(
    options: Options | None = None, shape: tuple[int, ...] = (OUT, IN), /, **tensors: Tensor | float
) -> ModuleTensors:
    given = {kind: torch.as_tensor(value) for kind, value in tensors.items()}
    return ModuleTensors(given, shape, options=options or Options())


def only(found: ModuleTensors) -> Delta:
    (delta,) = weight_deltas(found)
    return delta


def assert_change(delta: Delta, wanted: Tensor, strength: float = 0.7) -> None:
    torch.testing.assert_close(delta.change(W, strength), (wanted * strength).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(delta.merge(W, strength), (W + wanted * strength).float(), rtol=1e-5, atol=1e-5)


def turned(block: Tensor) -> Tensor:
    """The Cayley transform of a block, by its definition."""
    skew = (block - block.T).double()
    identity = torch.eye(len(block), dtype=torch.float64)
    return (identity + skew) @ torch.linalg.inv(identity - skew)


# Algorithms


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (6.0, 2.0), (0.0, 0.0)])
def test_plain(alpha: float | None, scale: float) -> None:
    down, up = numbers(3, IN), numbers(OUT, 3)
    given = {} if alpha is None else {"alpha": alpha}
    assert_change(only(module(down=down, up=up, **given)), scale * up.double() @ down.double())


def test_half_precision_is_multiplied_in_float32() -> None:
    down, up = (numbers(3, IN) * 300).half(), (numbers(OUT, 3) * 300).half()
    delta = only(module(down=down, up=up))
    assert delta.change(W, 1.0).dtype == torch.float32
    torch.testing.assert_close(delta.change(W, 1.0), up.float() @ down.float())


def test_a_convolution_of_one_pixel_is_a_matrix() -> None:
    down, up = numbers(3, IN), numbers(OUT, 3)
    assert_change(only(module(down=down[:, :, None, None], up=up[:, :, None, None])), up.double() @ down.double())


def test_loha() -> None:
    factors = {
        f"hada_w{n}_{x}": numbers(*shape, seed=n) for n in (1, 2) for x, shape in (("a", (OUT, 3)), ("b", (3, IN)))
    }
    first, second = (factors[f"hada_w{n}_a"].double() @ factors[f"hada_w{n}_b"].double() for n in (1, 2))
    assert_change(only(module(**factors, alpha=1.5)), first * second * 0.5)


def test_lokr_whole_ignores_alpha() -> None:
    first, second = numbers(3, 2), numbers(4, 4)
    delta = only(module(lokr_w1=first, lokr_w2=second, alpha=10000.0))
    assert_change(delta, torch.kron(first.double(), second.double()))


def test_lokr_takes_the_rank_of_the_second_matrix_first() -> None:
    a, b, c, d = numbers(3, 5), numbers(5, 2), numbers(4, 2), numbers(2, 4)
    both = only(module(lokr_w1_a=a, lokr_w1_b=b, lokr_w2_a=c, lokr_w2_b=d, alpha=4.0))
    assert_change(both, torch.kron((a @ b).double(), (c @ d).double()) * 2)
    first = only(module(lokr_w1_a=a, lokr_w1_b=b, lokr_w2=c @ d, alpha=4.0))
    assert_change(first, torch.kron((a @ b).double(), (c @ d).double()) * 0.8)


def test_glora_in_both_orientations() -> None:
    a1, a2, b1, b2 = numbers(IN, 3), numbers(3, IN, seed=1), numbers(OUT, 3), numbers(3, IN, seed=2)
    wanted = (W.double() @ a1.double() @ a2.double() + b1.double() @ b2.double()) * (6 / 3)
    assert_change(only(module(a1=a1, a2=a2, b1=b1, b2=b2, alpha=6.0)), wanted)
    assert_change(only(module(a1=a2, a2=a1, b1=b2, b2=b1, alpha=6.0)), wanted)


def test_oft_turns_blocks_of_rows() -> None:
    blocks = numbers(3, 4, 4) * 0.2
    wanted = torch.block_diag(*(turned(block).T for block in blocks)) @ W.double() - W.double()
    delta = only(module(oft_blocks=blocks))
    assert_change(delta, wanted)
    torch.testing.assert_close(delta.merge(W, 1.0).norm(dim=0), W.norm(dim=0))  # lengths of columns stay


@pytest.mark.parametrize("blocks", [numbers(3, 4, 4) * 0.2, numbers(1, 3, 4, 4) * 0.2], ids=["OFT", "BOFT"])
def test_turns_by_strength(blocks: Tensor) -> None:
    full = only(module(oft_blocks=blocks)).change(W, 1.0)
    forge = module(Options(squared_turns=True), oft_blocks=blocks)
    torch.testing.assert_close(only(module(oft_blocks=blocks)).change(W, 0.5), full * 0.5, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(only(forge).change(W, 0.5), full * 0.25, rtol=1e-4, atol=1e-5)


def test_alpha_limits_how_far_oft_turns() -> None:
    blocks = numbers(3, 4, 4)
    norm = (blocks - blocks.mT).norm()
    limited = only(module(oft_blocks=blocks, alpha=float(norm / 2)))
    torch.testing.assert_close(limited.change(W, 1.0), only(module(oft_blocks=blocks / 2)).change(W, 1.0))
    assert torch.equal(
        only(module(oft_blocks=blocks, alpha=0.0)).change(W, 1.0), only(module(oft_blocks=blocks)).change(W, 1.0)
    )


def test_boft_shuffles_like_a_butterfly() -> None:
    """Two stages over 8 rows in blocks of 4, row by row: in stage i, rows 2^i·2 apart meet in a block."""
    weight, blocks = numbers(8, 5), numbers(2, 2, 4, 4) * 0.2
    wanted = weight.double()
    for stage, stride in enumerate((2, 4)):
        order = [
            base + half * stride + step
            for base in range(0, 8, 2 * stride)
            for step in range(stride)
            for half in range(2)
        ]
        mixed = torch.block_diag(*(turned(block) for block in blocks[stage])) @ wanted[order]
        wanted = torch.empty_like(mixed).index_copy_(0, torch.tensor(order), mixed)
    delta = Orthogonal(blocks, 5)
    torch.testing.assert_close(delta.merge(weight, 1.0), wanted.float(), rtol=1e-5, atol=1e-5)


def test_rescale_stretches_rows() -> None:
    factor = numbers(OUT, 1)
    delta = only(module(oft_blocks=torch.zeros(3, 4, 4), rescale=factor))
    assert_change(delta, W.double() * (factor.double() - 1))


def test_difference_replacement_and_bias() -> None:
    values = numbers(OUT, IN, seed=3)
    assert_change(only(module(diff=values)), values.double())
    replaced = only(module(set_weight=values.half()))
    assert torch.equal(replaced.merge(W, 0.1), values.half().float())
    torch.testing.assert_close(W + replaced.change(W, 0.1), values.half().float())
    bias = bias_delta(module(diff_b=values[:, 0]))
    assert bias is not None and torch.equal(bias.change(W[:, 0], 2.0), values[:, 0] * 2)
    assert bias_delta(module(diff=values)) is None


# DoRA


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("magnitude", [numbers(OUT, 1).abs(), numbers(OUT).abs()], ids=["kohya", "peft"])
def test_dora_by_rows(magnitude: Tensor, exact: bool) -> None:
    inner = low_rank()
    delta = only(module(Options(exact_dora=exact), down=inner.down, up=inner.up, alpha=1.5, magnitude=magnitude))
    changed = W.double() + inner.change(W, 1.0).double()
    length = (changed if exact else W.double()).norm(dim=1, keepdim=True)
    assert_change(delta, changed * magnitude.view(-1, 1).double() / length - W.double())


def test_exact_dora_gives_the_rows_their_lengths() -> None:
    magnitude = numbers(OUT, 1).abs()
    merged_rows = Dora(low_rank(), magnitude, exact=True).merge(W, 1.0)
    torch.testing.assert_close(merged_rows.norm(dim=1, keepdim=True), magnitude)


def test_dora_by_columns() -> None:
    magnitude = numbers(1, IN).abs()
    delta = Dora(low_rank(), magnitude)
    changed = W.double() + low_rank().change(W, 1.0).double()
    assert_change(delta, changed * magnitude.double() / changed.norm(dim=0, keepdim=True) - W.double())
    assert delta.branch(W, 1.0) is None


# Branches and merges


def deltas() -> dict[str, Delta]:
    a1, a2, b1, b2 = numbers(IN, 3), numbers(3, IN, seed=1), numbers(OUT, 3), numbers(3, IN, seed=2)
    glora = Generalised((a1, a2), (b1, b2), 0.5)
    magnitude = numbers(OUT, 1).abs()
    return {
        "plain": low_rank(),
        "glora": glora,
        "dora": Dora(low_rank(), magnitude),
        "exact": Dora(low_rank(), magnitude, exact=True),
        "dora of glora": Dora(glora, magnitude),
        "swapped": Swapped(low_rank()),
        "swapped dora": Swapped(Dora(low_rank(), magnitude)),
    }


@pytest.mark.parametrize("name", deltas())
def test_a_branch_does_what_a_merge_does(name: str) -> None:
    delta, x = deltas()[name], numbers(5, IN)
    branch = delta.branch(W, 0.7)
    assert branch is not None
    torch.testing.assert_close(branch(x, x @ W.T), x @ delta.merge(W, 0.7).T, rtol=1e-4, atol=1e-5)
    assert delta.needs_weight == (name not in ("plain", "swapped"))


@pytest.mark.parametrize(
    "delta",
    [
        Hadamard(((numbers(OUT, 3), numbers(3, IN)), (numbers(OUT, 2), numbers(2, IN)))),
        Kronecker((numbers(3, 2),), (numbers(4, 4),)),
        Orthogonal(numbers(3, 4, 4), IN),
        Full(W),
        Replacement(W),
        Swapped(Full(W)),
    ],
    ids=lambda delta: type(delta).__name__,
)
def test_what_has_full_rank_has_no_branch(delta: Delta) -> None:
    assert delta.branch(W, 1.0) is None
    assert tuple(delta.shape) == (OUT, IN)


def test_swapped_halves() -> None:
    values = numbers(OUT, IN, seed=5)
    half = OUT // 2
    assert torch.equal(Swapped(Full(values)).change(W, 1.0), torch.cat([values[half:], values[:half]]))
    assert torch.equal(Swapped(Replacement(values)).merge(W, 0.3), torch.cat([values[half:], values[:half]]))
    seen = Swapped(Orthogonal(numbers(3, 4, 4), IN)).change(W, 1.0)  # W itself is seen in the file's order
    theirs = torch.cat([W[half:], W[:half]])
    wanted = Orthogonal(numbers(3, 4, 4), IN).change(theirs, 1.0)
    torch.testing.assert_close(seen, torch.cat([wanted[half:], wanted[:half]]))


def test_branches_are_joined_along_the_rank() -> None:
    """Plain and DoRA branches of three files, on all rows and on some, each acting on those before it."""
    part = (4, 8)
    changes = [
        (Change(low_rank(seed=1)), 0.5),
        (Change(Dora(low_rank(rows=4, seed=2), numbers(4, 1).abs()), part), 0.8),
        (Change(low_rank(rows=4, seed=3), part), -1.0),
        (Change(LowRank(numbers(2, IN - 2), numbers(OUT, 2))), 1.0),
    ]
    whole, x = side_branch(changes, (OUT, IN), lambda: W), numbers(5, IN)
    assert whole is not None and whole.rank == 3 + 3 + 3 + 2
    torch.testing.assert_close(whole(x, x @ W.T), x @ merged(W, changes).T, rtol=1e-4, atol=1e-5)


def test_the_weight_is_made_numbers_only_where_a_change_depends_on_it() -> None:
    def never() -> Tensor:
        raise AssertionError("the weight was asked for")

    assert side_branch([(Change(low_rank()), 1.0), (Change(low_rank(seed=4)), 0.5)], (OUT, IN), never) is not None
    with pytest.raises(AssertionError, match="asked for"):
        side_branch([(Change(deltas()["glora"]), 1.0)], (OUT, IN), never)


def test_no_branch_for_several_of_which_one_has_full_rank() -> None:
    assert side_branch([(Change(low_rank()), 1.0), (Change(Full(W)), 1.0)], (OUT, IN), lambda: W) is None
    assert side_branch([], (OUT, IN), lambda: W) is None


def test_joined_without_dora_keeps_the_output() -> None:
    assert joined([(None, low_rank().branch(None, 1.0))], (OUT, IN)).gain is None


def test_a_delta_moves_with_all_its_tensors() -> None:
    moved = Dora(low_rank(), numbers(OUT, 1)).to(torch.device("meta"))
    assert {moved.magnitude.device.type, moved.inner.down.device.type, moved.inner.up.device.type} == {"meta"}
    assert moved.nbytes == low_rank().nbytes + 4 * OUT


def test_merging_leaves_other_rows_and_the_weight_itself() -> None:
    before = W.clone()
    result = merged(W, [(Change(low_rank(rows=4), (4, 8)), 1.0)])
    assert torch.equal(W, before)
    assert torch.equal(result[:4], W[:4]) and torch.equal(result[8:], W[8:])
    assert not torch.equal(result[4:8], W[4:8])


def test_narrow_and_wide_deltas() -> None:
    narrow = Change(LowRank(numbers(2, 5), numbers(OUT, 2)))
    result = merged(W, [(narrow, 1.0)])
    assert torch.equal(result[:, 5:], W[:, 5:]) and not torch.equal(result[:, :5], W[:, :5])
    wide = Change(LowRank(numbers(2, IN + 3), numbers(OUT, 2)))
    result = merged(W, [(wide, 1.0), (narrow, 1.0)])
    assert result.shape == (OUT, IN + 3) == widened(W, [wide, narrow]).shape
    torch.testing.assert_close(result[:, IN:], wide.delta.change(result, 1.0)[:, IN:])


def test_low_precision_weights_are_merged_in_float32() -> None:
    result = merged(W.bfloat16(), [(Change(low_rank()), 1e-4)])
    assert result.dtype == torch.float32
    assert not torch.equal(result, W.bfloat16().float())


# What does not fit

MISFITS = {
    "lora_up (lora_B) is missing": {"down": numbers(3, IN)},
    "lora_down (lora_A) is missing": {"up": numbers(OUT, 3)},
    "no rank in common": {"down": numbers(3, IN), "up": numbers(OUT, 4)},
    "is no matrix": {"down": torch.zeros(()), "up": numbers(OUT, 3)},
    "the rank 0": {"down": torch.zeros(0, IN), "up": torch.zeros(OUT, 0)},
    f"the rank {MAX_RANK + 1:,}": {"down": torch.zeros(MAX_RANK + 1, IN), "up": torch.zeros(OUT, MAX_RANK + 1)},
    "alpha [2] is not one number": {"down": numbers(3, IN), "up": numbers(OUT, 3), "alpha": torch.ones(2)},
    "hada_w2_a is missing": {"hada_w1_a": numbers(OUT, 3), "hada_w1_b": numbers(3, IN)},
    "its two products": {
        "hada_w1_a": numbers(OUT, 3),
        "hada_w1_b": numbers(3, IN),
        "hada_w2_a": numbers(OUT + 1, 3),
        "hada_w2_b": numbers(3, IN),
    },
    "lokr_w2 is missing": {"lokr_w1": numbers(3, 2)},
    "given whole and as factors": {"lokr_w1": numbers(3, 2), "lokr_w2": numbers(4, 4), "lokr_w2_a": numbers(4, 2)},
    "a1 is missing": {"a2": numbers(3, IN), "b1": numbers(OUT, 3), "b2": numbers(3, IN)},
    "oft_blocks is missing": {"rescale": numbers(OUT, 1)},
    "no square blocks": {"oft_blocks": numbers(3, 4, 3)},
    "cannot be shuffled": {"oft_blocks": numbers(3, 3, 4, 4)},
    "one factor for each of 12 rows": {"oft_blocks": numbers(3, 4, 4), "rescale": numbers(3)},
    "fits neither 12 rows nor 8 columns": {
        "down": numbers(3, IN),
        "up": numbers(OUT, 3),
        "magnitude": numbers(5, 1),
    },
    "dora_scale belongs to one set": {"magnitude": numbers(OUT, 1)},
}


@pytest.mark.parametrize("fault", MISFITS)
def test_tensors_that_do_not_fit(fault: str) -> None:
    with pytest.raises(ValueError) as error:
        weight_deltas(module(**MISFITS[fault]))
    assert fault in str(error.value)


def test_factors_for_a_vector() -> None:
    with pytest.raises(ValueError, match="stand for a matrix"):
        weight_deltas(module(None, (OUT,), down=numbers(3, IN), up=numbers(OUT, 3)))


def test_a_branch_that_needs_the_weight_says_so() -> None:
    with pytest.raises(TypeError, match="needs the weight"):
        deltas()["glora"].branch(None, 1.0)
