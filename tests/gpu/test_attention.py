"""Attention in bfloat16 by our own programs on a GPU that has it, beside the reference."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from lightweight_engine.backend import attention as backends
from lightweight_engine.backend.attention import attention
from lightweight_engine.backend.kernels import attention as programs

GPU = torch.device("cuda", 0)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and backends.available(GPU)),
        reason="the GPU has no attention of ours in 16 bits",
    ),
]

Heads = tuple[Tensor, Tensor, Tensor]

# (tokens, heads, batch): one, less than a job's queries, less than a tile of keys, whole ones, one more; jobs that are
# cut, as many parts as a job has tiles, too; more jobs than the card has multiprocessors; pictures with their text.
SHAPES = [
    *((1, 1, 1), (77, 2, 3), (128, 1, 1), (176, 3, 1), (177, 2, 2), (352, 1, 1), (2000, 1, 1)),
    *((1000, 24, 3), (1536, 24, 1), (4544, 24, 1)),
]


def projected(tokens: int, heads: int, batch: int, *, spread: float = 1.0) -> Heads:
    """Queries, keys and values as a fused projection writes them, in rows that lie apart.

    Args:
        spread: of scores; theirs is about 1 by itself.
    """
    random = torch.Generator(GPU).manual_seed(tokens + heads)
    wide = torch.randn(batch, tokens, 3 * heads * 128 + 64, generator=random, device=GPU)
    wide[..., : 2 * heads * 128] *= spread**0.5
    q, k, v = wide.bfloat16()[..., : 3 * heads * 128].unflatten(-1, (3, heads, 128)).permute(2, 0, 3, 1, 4)
    return q, k, v


def run(heads: Heads, scale: float | None = None) -> Tensor:
    with torch.inference_mode():
        assert programs.take(*heads, scale)
        return attention(*heads, scale=scale)


def exact(heads: Heads, scale: float | None = None) -> Tensor:
    q, k, v = (each.float() for each in heads)
    return attention(q, k, v, scale=scale, backend="reference")


def distance(actual: Tensor, expected: Tensor) -> float:
    """Relative to what is expected."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(("tokens", "heads", "batch"), SHAPES)
def test_it_is_as_near_as_torchs(tokens: int, heads: int, batch: int) -> None:
    given = projected(tokens, heads, batch)
    expected, found = exact(given), run(given)
    assert found.shape == (batch, tokens, heads * 128) and found.is_contiguous()
    assert distance(found, expected) <= 1.1 * distance(attention(*given, backend="flash"), expected) < 0.004


@pytest.mark.parametrize("scale", [0.02, 0.5])
def test_scores_far_apart_are_no_harder(scale: float) -> None:
    given = projected(700, 2, 1, spread=6)
    expected = exact(given, scale)
    assert distance(run(given, scale), expected) < 0.006


def test_scores_that_grow_from_key_to_key_are_scaled_anew() -> None:
    """Each tile has scores larger than all before by more than sums are kept for."""
    q, k, v = projected(1500, 2, 1)
    along = torch.ones(128, device=GPU, dtype=torch.bfloat16)
    grown = k + along * torch.linspace(-60, 60, 1500, device=GPU, dtype=torch.bfloat16)[:, None] / 10
    given = q.abs(), grown, v
    assert distance(run(given), exact(given)) < 0.006


def test_sums_of_many_tokens_lose_nothing() -> None:
    """Values of one sign: what is dropped of each would show as a smaller sum."""
    q, k, v = projected(16640, 1, 1)
    given = q, k, v.abs() + 1
    assert abs(float((run(given).double() / exact(given).double()).mean()) - 1) < 2e-4


def test_what_is_no_number_stays_none() -> None:
    for kind in range(3):
        given = projected(600, 2, 1)
        given[kind][0, 0, 5, 3] = torch.nan  # of the first head
        found = run(given)
        assert found[0, 5, :128].isnan().any()
        assert not found[..., 128:].isnan().any(), "the other head knows nothing of it"


def test_nothing_behind_the_last_token_is_read_or_written() -> None:
    q, k, v = projected(1100, 2, 1)
    given = q[:, :, :1000], k[:, :, :1000], v[:, :, :1000]
    expected = run(given)
    for each in (q, k, v):
        each[:, :, 1000:] = torch.nan
    assert torch.equal(run(given), expected)


def test_the_same_comes_out_each_time() -> None:
    given = projected(1300, 4, 1)
    first = run(given)
    assert all(torch.equal(first, run(given)) for _ in range(5))


def test_it_can_be_recorded_and_started_from_any_thread() -> None:
    given, found = projected(300, 2, 1), []
    expected = run(given)
    programs._work.cache_clear()  # a thread that has done nothing yet asks the driver for everything
    thread = threading.Thread(target=lambda: found.append(run(given)))
    thread.start()
    thread.join()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run(given)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found[0], expected) and torch.equal(recorded, expected)


def test_what_it_does_not_compute_is_torchs() -> None:
    q, k, v = projected(200, 2, 1)
    bias = torch.randn(200, 200, device=GPU, dtype=torch.bfloat16)
    with torch.inference_mode():
        biased = attention(q, k, v, bias=bias)
        halves = attention(q.half(), k.half(), v.half())
        fewer = attention(q, k[:, :, :50], v[:, :, :50])
    assert distance(biased, attention(q.float(), k.float(), v.float(), bias=bias.float(), backend="reference")) < 0.01
    assert distance(halves, exact((q, k, v))) < 0.001
    assert distance(fewer, exact((q, k[:, :, :50], v[:, :, :50]))) < 0.004
