"""Another model for one request, on a GPU: never two at once in its memory, and nothing of the former left there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.fullsize import Sizes, scratch_folder, write_model
from lightweight_engine import Config, GenerationRequest, LightweightEngine
from lightweight_engine.core.describe import pixels_sha256
from lightweight_engine.core.models import TINY
from lightweight_engine.flux.params import AutoencoderParams, CLIPParams, FluxParams, T5Params
from lightweight_engine.flux.recorded import Recorded

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
MIB = 1 << 20
# A transformer of about a gigabyte, which tells in measurements.
SIZES = Sizes(
    FluxParams(hidden_size=1536, mlp_hidden=6144, num_heads=12, depth=4, depth_single_blocks=8, context_in_dim=1280),
    T5Params(vocab_size=8192, hidden_size=1280, num_layers=4, num_heads=20, mlp_hidden=3328),
    CLIPParams(vocab_size=8192, num_layers=4),
    AutoencoderParams(),
)
SMALL = {"prompt": "a cat", "width": 256, "height": 256, "steps": 2, "seed": 3}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LightweightEngine]:
    """With two checkpoints of about a gigabyte, which are alike.

    Steps are not recorded, which takes memory, and depends on how fast the host happens to be.
    """
    with scratch_folder() as folder, pytest.MonkeyPatch.context() as patched:
        patched.setattr(Recorded, "_pays", lambda *_: False)
        first = write_model(Path(folder), SIZES, CUDA)["transformer"]
        shutil.copyfile(first, first.with_stem("other"))
        torch.cuda.empty_cache()
        made = LightweightEngine(
            Config(
                models_dir=Path(folder),
                checkpoint=first.stem,
                storage_dtype="bf16",
                cache_dir=tmp_path_factory.mktemp("cache"),
                tokenizer_dirs=(TINY / "tokenizers",),
                device="cuda",
                offline=True,
            )
        )
        made.setup()
        yield made
        made.close()


def drawn(engine: LightweightEngine, **fields: object) -> str:
    return pixels_sha256(engine.run(GenerationRequest(**{**SMALL, **fields})).images[0])


def test_one_model_is_on_the_device_at_a_time(engine: LightweightEngine) -> None:
    first = drawn(engine)
    torch.cuda.empty_cache()
    before, held = torch.cuda.memory_allocated(), engine.networks.held
    torch.cuda.reset_peak_memory_stats()
    drawn(engine)
    usual = torch.cuda.max_memory_allocated()
    peaks = []
    load_all = type(engine.networks).load_all

    def watched(networks, plan) -> None:
        peaks.append(torch.cuda.memory_allocated())
        load_all(networks, plan)
        peaks.append(torch.cuda.max_memory_allocated())

    torch.cuda.reset_peak_memory_stats()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(engine.networks), "load_all", watched)
        assert drawn(engine, checkpoint="other") == first, "the files are alike"
    assert engine.models.name == "other" and engine.networks.held == held
    assert peaks[0] < before - held + 64 * MIB, "the former model was released before"
    assert peaks[1] < usual + 64 * MIB
    assert abs(torch.cuda.memory_allocated() - before) < 16 * MIB


def test_other_storage_for_one_request(engine: LightweightEngine) -> None:
    first = drawn(engine)
    before = torch.cuda.memory_allocated()
    changed = drawn(engine, storage_dtype="nf4")
    assert changed != first and torch.cuda.memory_allocated() < before - 256 * MIB
    assert drawn(engine) == first and abs(torch.cuda.memory_allocated() - before) < 16 * MIB


def test_plans_are_made_as_if_the_model_in_use_were_gone(engine: LightweightEngine) -> None:
    drawn(engine)
    request = GenerationRequest(**SMALL, checkpoint="other")
    beside = engine.plan(request).budget.total
    drawn(engine, checkpoint="other")
    assert abs(engine.plan(request).budget.total - beside) < 256 * MIB


def test_memory_is_told(engine: LightweightEngine) -> None:
    from lightweight_engine.backend.devices import memory_figures

    drawn(engine)
    figures = memory_figures(CUDA)
    assert figures["cuda"]["allocated"]["current"] == torch.cuda.memory_allocated()
    assert figures["cuda"]["allocated"]["peak"] >= figures["cuda"]["allocated"]["current"] > 0
    assert figures["cuda"]["system"]["total"] == torch.cuda.get_device_properties(CUDA).total_memory
