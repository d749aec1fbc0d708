"""Attention in 8 bits by its twin on a CPU; its programs run in ``tests/gpu``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import DIM, SHAPES, distance, exact, projections
from torch import nn

from lightweight_engine.backend.attention import attention
from lightweight_engine.backend.eight_bit import multiply_as_stored
from lightweight_engine.backend.eight_bit_attention import attend, available, twin
from lightweight_engine.backend.fp8 import quantize_rows
from lightweight_engine.backend.fused import heads
from lightweight_engine.backend.kernels import eight_bit_attention as programs
from lightweight_engine.backend.linear import PackedLinear


@pytest.mark.parametrize(("tokens", "count", "batch"), SHAPES)
def test_it_is_near_to_attention(tokens: tuple[int, ...], count: int, batch: int) -> None:
    """Weights and values each have 3 bits behind the first, 2.6 % of a random number; scores add little to that."""
    streams, rotary = projections(tokens, count, batch)
    assert distance(twin(streams, rotary), exact(streams, rotary)) < 0.046


def test_parts_of_jobs_sum_up_to_them() -> None:
    """A part rounds weights by its own largest scores, which moves the result within what rounding costs anyway."""
    streams, rotary = projections((512, 1000), 2, 1)
    whole, cut = twin(streams, rotary), twin(streams, rotary, 132)
    assert 0.005 < distance(cut, whole) < 0.05
    assert distance(cut, exact(streams, rotary)) < 0.046
    assert torch.equal(twin(streams, rotary, 24), whole), "as many jobs as blocks: nothing is cut"


def test_scores_far_apart_are_no_harder() -> None:
    streams, rotary = projections((300,), 2, 1, spread=8)
    assert distance(twin(streams, rotary), exact(streams, rotary)) < 0.09


def test_values_that_are_alike_come_out_as_they_are() -> None:
    """Weights are divided by their own sum, whatever was lost on the way."""
    streams, rotary = projections((77, 223), 2, 1)
    for qkv, _, _ in streams:
        qkv[..., 2 * 2 * DIM :] = 3.25  # exact in 8 bits
    assert torch.allclose(twin(streams, rotary), torch.tensor(3.25), rtol=1e-5)


def test_values_of_any_size_keep_their_accuracy() -> None:
    streams, rotary = projections((200,), 1, 1)
    expected = twin(streams, rotary)
    for exponent in (-30, -9, 12, 60):
        scale = torch.ones(3 * DIM)
        scale[2 * DIM :] = 2.0**exponent
        larger = [(qkv * scale, first, second) for qkv, first, second in streams]
        assert torch.equal(twin(larger, rotary), expected * 2.0**exponent)


def test_what_is_no_number_stays_none() -> None:
    streams, rotary = projections((140,), 2, 1)
    streams[0][0][0, 5, 3] = torch.nan  # a query of the first head
    found = twin(streams, rotary)
    assert found[0, 5, :DIM].isnan().all()
    assert found.isnan().sum() == DIM


def test_no_score_of_a_row_of_zeros_is_lost() -> None:
    streams, rotary = projections((140,), 1, 1)
    streams[0][0][..., :DIM] = 0  # all queries: every key weighs the same
    assert distance(twin(streams, rotary), exact(streams, rotary)) < 0.03


def test_where_it_cannot_be_attention_is_as_ever() -> None:
    streams, rotary = projections((40,), 2, 1)
    model: Any = nn.Sequential(PackedLinear(quantize_rows(torch.randn(3 * 2 * DIM, 32)), None))
    multiply_as_stored(model)
    with torch.inference_mode():
        assert torch.equal(attend(streams, rotary, model[0]), attention(*heads(streams, rotary)))
    assert not available(torch.device("cpu"))


def test_what_lies_otherwise_than_the_programs_read_is_told() -> None:
    (stream,), _ = projections((40,), 2, 1)
    qkv, first, second = stream
    odd = torch.zeros(1, 40, 3 * 2 * DIM + 4, dtype=torch.bfloat16)[..., : 3 * 2 * DIM]
    shifted = torch.zeros(DIM + 1, dtype=torch.bfloat16)[1:]
    assert programs.take([stream, stream])
    assert not programs.take([(qkv.float(), first, second)])
    assert not programs.take([(odd, first, second)]), "rows that start between 16 bytes"
    assert not programs.take([stream, (qkv, shifted, second)])
    assert not programs.take([(qkv, first[:64], second[:64])]), "heads of another width"
