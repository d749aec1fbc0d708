"""Where there is no GPU, a tensor is at home already."""

from __future__ import annotations

import torch

from lightweight_engine.backend.staging import SMALL, Staging


def test_on_a_cpu_a_tensor_is_left_where_it_is() -> None:
    given = torch.arange(SMALL, dtype=torch.int32)
    assert Staging(torch.device("cpu"), pinned=True).bring(given) is given
