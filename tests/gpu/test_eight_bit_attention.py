"""Attention in 8 bits on a GPU that has it: its programs against their twin, alone and in a network."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from attention_cases import DIM, SHAPES, distance, exact, projections
from torch import Tensor, nn

from lightweight_engine.backend import eight_bit_attention
from lightweight_engine.backend.eight_bit import multiply_as_stored
from lightweight_engine.backend.eight_bit_attention import attend, twin
from lightweight_engine.backend.fp8 import quantize_rows
from lightweight_engine.backend.fused import Stream
from lightweight_engine.backend.kernels import eight_bit_attention as programs
from lightweight_engine.backend.kernels.hopper import multiprocessors
from lightweight_engine.backend.linear import PackedLinear

GPU = torch.device("cuda", 0)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and eight_bit_attention.available(GPU)),
        reason="the GPU has no attention in 8 bits",
    ),
]


def on_gpu(streams: list[Stream]) -> list[Stream]:
    """The same, in rows that lie apart as they did."""
    made: list[Stream] = []
    for qkv, first, second in streams:
        wide = torch.randn(*qkv.shape[:-1], qkv.shape[-1] + 64).bfloat16().to(GPU)
        wide[..., : qkv.shape[-1]] = qkv.to(GPU)
        made.append((wide[..., : qkv.shape[-1]], first.to(GPU), second.to(GPU)))
    return made


def run(streams: list[Stream], rotary: Tensor) -> Tensor:
    with torch.inference_mode():
        return programs.attend(on_gpu(streams), rotary.to(GPU)).cpu()


def projection() -> Any:
    model: Any = nn.Sequential(PackedLinear(quantize_rows(torch.randn(3 * DIM, 32)), None))
    multiply_as_stored(model)
    return model[0]


@pytest.mark.parametrize(
    ("tokens", "heads", "batch"), [*SHAPES, ((512, 4032), 2, 1), ((129, 2048), 24, 2), ((40,), 24, 9)]
)
def test_the_programs_say_what_their_twin_says(tokens: tuple[int, ...], heads: int, batch: int) -> None:
    """Within what tensor cores keep of a sum, and roundings of scores that fall the other way for it."""
    streams, rotary = projections(tokens, heads, batch)
    found = run(streams, rotary)
    assert distance(found, twin(streams, rotary, multiprocessors(GPU))) < 0.012
    assert distance(found, exact(streams, rotary)) < 0.046


def test_scores_far_apart_are_no_harder() -> None:
    streams, rotary = projections((300,), 2, 1, spread=8)
    assert distance(run(streams, rotary), exact(streams, rotary)) < 0.09


def test_sums_of_many_tokens_lose_nothing() -> None:
    """Values of one sign: what tensor cores drop of each would show as a smaller sum."""
    streams, rotary = projections((512, 16128), 1, 1)
    for qkv, _, _ in streams:
        qkv[..., 2 * DIM :] = qkv[..., 2 * DIM :].abs() + 1
    assert distance(run(streams, rotary), exact(streams, rotary)) < 0.012


def test_what_is_no_number_stays_none() -> None:
    for kind in range(3):
        streams, rotary = projections((600,), 2, 1)
        streams[0][0][0, 5, kind * 2 * DIM + 3] = torch.nan  # of the first head
        found = run(streams, rotary)
        assert found[0, 5, :DIM].isnan().any()
        assert not found[..., DIM:].isnan().any(), "the other head knows nothing of it"


def test_the_same_comes_out_each_time() -> None:
    streams, rotary = projections((77, 1223), 4, 1)
    first = run(streams, rotary)
    assert all(torch.equal(first, run(streams, rotary)) for _ in range(5))


def test_it_can_be_recorded_and_started_from_any_thread() -> None:
    streams, rotary = projections((300,), 2, 1)
    given, table, found = on_gpu(streams), rotary.to(GPU), []
    expected = run(streams, rotary)

    def work() -> None:
        with torch.inference_mode():
            found.append(programs.attend(given, table).cpu())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        recorded = programs.attend(given, table)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found[0], expected) and torch.equal(recorded.cpu(), expected)


def test_a_projection_in_8_bits_has_it_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    streams, rotary = projections((200,), 1, 1)
    given, table = on_gpu(streams), rotary.to(GPU)
    with torch.inference_mode():
        eight = attend([(given[0][0].clone(), *given[0][1:])], table, projection()).cpu()
        sixteen = attend([(given[0][0].clone(), *given[0][1:])], table, nn.Linear(1, 1)).cpu()
    assert torch.equal(eight, run(streams, rotary))
    assert distance(sixteen, exact(streams, rotary)) < 0.01 < 0.03 < distance(eight, exact(streams, rotary))
