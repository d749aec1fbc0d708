"""CLIP: ids and multipliers of each chunk, the states after emphasis, and the pooled vector within 1e-5."""

from __future__ import annotations

import torch
from goldens import Case

from checks.text_models import text_encoders
from lightweight_engine.flux.chunks import clip_chunks, segments_of
from lightweight_engine.flux.text_encoders import clip_states


def check(case: Case) -> None:
    encoders = text_encoders()
    segments = segments_of(case["prompt"], case["emphasis"], "forge")
    chunks = clip_chunks(segments, encoders.clip_tokenizer)
    assert torch.equal(
        torch.tensor([chunk.ids for chunk in chunks]), case.tensor("tokens").long().reshape(len(chunks), -1)
    )
    multipliers = torch.tensor([chunk.multipliers for chunk in chunks])
    torch.testing.assert_close(
        multipliers, case.tensor("multipliers").float().reshape(multipliers.shape), atol=1e-6, rtol=0
    )
    states = clip_states(encoders.clip, chunks, case["emphasis"], case["clip_skip"])
    theirs = case.tensor("cond").float()
    torch.testing.assert_close(states, theirs.reshape(states.shape), atol=5e-5 * float(theirs.abs().max()), rtol=0)
    pooled = encoders.encode(case["prompt"], case["emphasis"], "forge").pooled
    torch.testing.assert_close(pooled, case.tensor("pooled").float().reshape(pooled.shape), atol=1e-5, rtol=0)
