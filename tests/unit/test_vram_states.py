"""VRAM states on the CPU: they decide what stays in memory and what passes through, and change no number."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import save_drawable

from lightweight_engine import Config, GenerationRequest, LightweightEngine
from lightweight_engine.backend.host_memory import GIB
from lightweight_engine.backend.memory_manager import PRESETS
from lightweight_engine.backend.pages import PageStream
from lightweight_engine.core import networks
from lightweight_engine.core.describe import pixels_sha256
from lightweight_engine.core.models import ROLES, TINY
from lightweight_engine.errors import EngineError, MemoryBudgetError

pytestmark = pytest.mark.usefixtures("small_jobs")

BLOCKS = 2 + 3


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_drawable(tmp_path_factory.mktemp("models"), depth=2, depth_single_blocks=3)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose transformer takes the most."""
    sizes = {"hidden_size": 256, "mlp_hidden": 1024, "num_heads": 2, "axes_dim": (16, 56, 56)}
    return save_drawable(tmp_path_factory.mktemp("wide"), depth=2, depth_single_blocks=3, **sizes)


@pytest.fixture
def engines(models: Path) -> Iterator[Any]:
    """Makes engines, which are closed in the end."""
    made: list[LightweightEngine] = []

    def make(**settings: Any) -> LightweightEngine:
        places = {"models_dir": models, "cache_dir": models / "cache", "tokenizer_dirs": (TINY,)}
        made.append(LightweightEngine(Config(**{**places, "device": "cpu", "offline": True, **settings})))
        made[-1].setup()
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def request(**fields: Any) -> GenerationRequest:
    return GenerationRequest(**{"prompt": "a woman", "width": 64, "height": 64, "steps": 2, "seed": 7, **fields})


def picture(engine: LightweightEngine, **fields: Any) -> str:
    engine._embeddings.clear()
    return pixels_sha256(engine.run(request(**fields)).images[0])


def loaded(engine: LightweightEngine) -> set[str]:
    return set(engine.networks._loaded)


@pytest.mark.parametrize("state", PRESETS)
def test_what_is_loaded_after_a_job(engines: Any, state: str) -> None:
    engine = engines(vram_state=state)
    kept = set(ROLES) if PRESETS[state].keep else set()
    assert loaded(engine) == kept, "what is kept through all stages is loaded at the start"
    picture(engine)
    assert loaded(engine) == kept
    assert engine.networks.held == sum(engine.networks.known[role].inventory.nbytes for role in kept)


@pytest.mark.parametrize("state", ["LOW_VRAM", "NO_VRAM"])
def test_low_states_have_one_stage_loaded_at_a_time(engines: Any, state: str) -> None:
    engine, seen = engines(vram_state=state), {}

    def note(progress: Any) -> None:
        seen.setdefault(progress.stage, set()).update(loaded(engine))

    engine.run(request(steps=3), on_progress=note)
    assert seen["sample"] <= {"clip", "t5", "transformer"} and "autoencoder" not in seen["sample"]
    assert seen["decode"] <= {"transformer", "autoencoder"}


@pytest.mark.parametrize("storage", [{}, {"storage_dtype": "nf4"}, {"storage_dtype": "fp8_e4m3"},
                                     {"storage_dtype": "gguf:Q8_0"}, {"compute_dtype": "bf16"},
                                     {"compute_dtype": "bf16", "storage_dtype": "nf4"}],
                         ids=lambda settings: " ".join(settings.values()) or "float32")  # fmt: skip
def test_all_states_draw_the_same_picture(engines: Any, storage: dict[str, str]) -> None:
    pictures = {state: picture(engines(vram_state=state, **storage), cfg_scale=2.0) for state in PRESETS}
    assert len(set(pictures.values())) == 1, pictures


def test_blocks_are_used_from_the_file_in_no_vram(engines: Any) -> None:
    """A bf16 file computed with in bf16 needs no conversion: its blocks are pages of the file, given back after use."""
    engine = engines(vram_state="NO_VRAM", compute_dtype="bf16")
    placed = engine.plan(request()).placed("transformer")
    assert (len(placed.streamed), placed.resident, placed.dropped) == (BLOCKS, 0, True)
    engine.networks.follow(engine.plan(request()))
    engine.networks.load("transformer")
    streams = engine.networks._loaded["transformer"].streams
    assert all(isinstance(stream, PageStream) for stream in streams)
    assert [len(stream.units) for stream in streams] == [
        BLOCKS,
        len(engine.networks.known["transformer"].inventory.conditioning),
    ]
    converted = engines(vram_state="NO_VRAM").plan(request()).placed("transformer")
    assert converted.streamed == (), "what was converted has no file to come from again"


@pytest.mark.parametrize(("share", "streams"), [(1.0, False), (0.6, True), (0.3, True)])
def test_below_a_cap_what_does_not_fit_comes_from_the_file(
    engines: Any, wide: Path, share: float, streams: bool
) -> None:
    """Caps at shares of the transformer's bytes above what a step works in: one picture."""
    free = engines(models_dir=wide, compute_dtype="bf16")
    stage = free.plan(request()).stage("sample")
    limit = (stage.room + stage.base + share * stage.weights) / GIB + 1e-9
    capped = engines(models_dir=wide, compute_dtype="bf16", vram_limit=limit, inference_reserve=0.0)
    plan = capped.plan(request())
    placed = plan.placed("transformer")
    assert plan.fits and (placed.streamed != ()) == streams and (placed.resident > 0) == (share > 0.3)
    seen = []
    result = capped.run(request(), on_progress=lambda p: seen.append(p.step and capped.networks._loaded["transformer"]))
    assert pixels_sha256(result.images[0]) == picture(free)
    assert {each.placed for each in seen if each} == {placed}, "it was placed as planned while it was at work"


def test_what_cannot_fit_is_refused_before_anything_is_loaded(engines: Any) -> None:
    engine = engines(vram_state="LOW_VRAM", vram_limit=0.001)
    with pytest.raises(MemoryBudgetError, match="0.00 GiB may be taken"):
        engine.run(request())
    assert loaded(engine) == set()


def whole_passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Passes over all of Python's objects from now on."""
    passes: list[str] = []
    collect = gc.collect
    monkeypatch.setattr(gc, "collect", lambda *which: (passes.append("pass"), collect(*which))[1])
    return passes


@pytest.mark.parametrize("storage", ["auto", "nf4"])
@pytest.mark.parametrize("state", ["LOW_VRAM", "NO_VRAM"])
def test_letting_go_of_networks_walks_through_no_objects(
    engines: Any, monkeypatch: pytest.MonkeyPatch, state: str, storage: str
) -> None:
    """A pass takes 0.15 s, and a job would make three: nothing holds a network in a circle."""
    engine = engines(vram_state=state, storage_dtype=storage)
    passes = whole_passes(monkeypatch)
    picture(engine)
    assert not engine.networks._loaded and not passes


def test_a_network_in_a_circle_is_let_go_too(engines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engines()
    networks = engine.networks
    circle: list[Any] = [networks.load("t5")]
    circle.append(circle)
    gone = weakref.ref(circle[0])
    del circle
    passes = whole_passes(monkeypatch)
    networks.release("t5")
    assert passes and gone() is None


@pytest.mark.parametrize("keep", [(), ("t5",), ("transformer", "clip"), ROLES], ids=str)
def test_unload_models_but_those_to_keep(engines: Any, keep: tuple[str, ...]) -> None:
    engine = engines()
    expected = picture(engine)
    modules = {role: engine.networks.load(role) for role in keep}
    engine.unload_models(keep)
    assert loaded(engine) == set(keep)
    assert all(engine.networks.load(role) is module for role, module in modules.items()), "what is kept is not reread"
    assert picture(engine) == expected
    assert loaded(engine) == set(ROLES)


def test_unloading_twice_and_before_anything_is_loaded(engines: Any, models: Path) -> None:
    LightweightEngine(Config(models_dir=models, device="cpu", offline=True)).unload_models()
    engine = engines()
    for _ in range(2):
        engine.unload_models()
        assert loaded(engine) == set() and engine.networks.held == 0


@pytest.mark.parametrize("keep", [("unet",), "t5"], ids=str)
def test_a_role_that_does_not_exist_is_refused(engines: Any, keep: Any) -> None:
    """A bare string too, of which every letter would be a role."""
    with pytest.raises(EngineError, match="transformer, t5, clip, autoencoder"):
        engines().unload_models(keep)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("could not create a primitive"),  # oneDNN, which does not say why
    ],
    ids=str,
)
def test_memory_that_runs_out_while_loading_at_the_start(
    engines: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(networks, "load_part", load)
    with pytest.raises(MemoryBudgetError):
        engines()


def test_beside_a_gpu_the_host_is_tidied_after_what_changed_networks(
    engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, times = engines(vram_state="HIGH_VRAM"), list[None]()
    monkeypatch.setattr(networks, "trim_heap", lambda: times.append(None))

    def rested() -> int:
        """How often that was done after a job."""
        times.clear()
        engine.networks.rest()
        return len(times)

    assert [rested(), rested()] == [1, 1], "a CPU's job leaves what it computed with"
    monkeypatch.setattr(engine.networks, "device", torch.device("cuda"))
    engine.networks.load("autoencoder")
    assert [rested(), rested()] == [0, 0], "all was there before"
    engine.networks._loaded["autoencoder"].version += 1  # as by LoRAs, or at another place
    assert [rested(), rested()] == [1, 0]
    del engine.networks._loaded["autoencoder"]
    assert [rested(), rested()] == [1, 0]
    monkeypatch.setattr(type(engine.networks), "keeps", False)
    assert [rested(), rested()] == [1, 1]
