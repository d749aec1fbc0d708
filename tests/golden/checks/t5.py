"""T5: ids and multipliers of each chunk, the states before and after emphasis; 5e-5 of the largest."""

from __future__ import annotations

import torch
from goldens import Case

from checks.text_models import text_encoders
from lightweight_engine.flux.chunks import segments_of, t5_chunks


def check(case: Case) -> None:
    encoders = text_encoders()
    chunks = t5_chunks(segments_of(case["prompt"], case["emphasis"], "forge"), encoders.t5_tokenizer)
    assert torch.equal(torch.tensor([chunk.ids for chunk in chunks]), case.tensor("tokens").long())
    torch.testing.assert_close(
        torch.tensor([chunk.multipliers for chunk in chunks]), case.tensor("multipliers").float(), atol=1e-6, rtol=0
    )
    _compare(torch.stack(encoders.encode(case["prompt"], case["emphasis"], "forge").chunks), case.tensor("cond"))
    if case.has("hidden"):
        _compare(torch.stack([encoders.t5_states(chunk, "Ignore") for chunk in chunks]), case.tensor("hidden"))


def _compare(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs.float(), atol=5e-5 * float(theirs.abs().max()), rtol=0)
