"""LoRAs through the engine: they act, on every storage format, and leave no trace."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from factories import save_drawable
from loopback import serving
from lora_models import lora_file, random_lora
from safetensors.torch import save

from lightweight_engine import Config, GenerationRequest, GenerationResult, LightweightEngine
from lightweight_engine.core import networks
from lightweight_engine.core.adapters import Adapter
from lightweight_engine.core.describe import pixels_sha256, sidecar
from lightweight_engine.core.models import TINY, ModelLibrary
from lightweight_engine.core.plan import ADDS_NOTHING
from lightweight_engine.core.replay import replay, save_result
from lightweight_engine.errors import AdapterError, ModelNotFoundError

pytestmark = pytest.mark.usefixtures("small_jobs")

STORAGES = ["bf16", "fp32", "nf4", "fp8_e4m3", "gguf:Q8_0", "gguf:Q4_0"]
SMALL = {"prompt": "a cat", "width": 64, "height": 64, "steps": 2, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = save_drawable(tmp_path_factory.mktemp("loras") / "models", depth=2, depth_single_blocks=3)
    shapes = {role: part.shapes for role, part in ModelLibrary([root]).choose().parts.items()}
    (root / "Lora").mkdir()
    for seed, name in enumerate("ABC"):
        lora_file(root / "Lora", random_lora(shapes, seed=seed, text=name == "C"), name=f"{name}.safetensors")
    return root


def engine_in(folder: Path, **settings: object) -> LightweightEngine:
    places = {"models_dir": folder, "cache_dir": folder.parent / "cache", "tokenizer_dirs": (TINY,)}
    return LightweightEngine(Config(**{**places, "device": "cpu", "offline": True, **settings}))


@pytest.fixture(scope="module", params=STORAGES)
def engine(request: pytest.FixtureRequest, folder: Path, small_jobs: None) -> Iterator[LightweightEngine]:
    made = engine_in(folder, storage_dtype=request.param)
    yield made
    made.close()


@pytest.fixture(scope="module")
def plain(folder: Path, small_jobs: None) -> Iterator[LightweightEngine]:
    made = engine_in(folder)
    yield made
    made.close()


def run(engine: LightweightEngine, *loras: str, **fields: object) -> GenerationResult:
    return engine.run(GenerationRequest(**{**SMALL, "loras": loras, **fields}))


def picture(engine: LightweightEngine, *loras: str, **fields: object) -> str:
    return pixels_sha256(run(engine, *loras, **fields).images[0])


def test_they_act_and_leave_no_trace(engine: LightweightEngine) -> None:
    bare = picture(engine)
    seen = [picture(engine, *loras) for loras in (["A"], ["B"], ["A", "B"], ["A:0.5"])]
    assert len({bare, *seen}) == 5
    assert picture(engine) == bare


def test_any_sequence_gives_the_pictures_of_a_fresh_engine(engine: LightweightEngine, folder: Path) -> None:
    choices = [(), ("A",), ("B:0.7",), ("A", "B"), ("C",), ("C:-0.5", "A:2")]
    draws = random.Random(engine.config.storage_dtype)
    known: dict[tuple[str, ...], str] = {}
    for loras in draws.choices(choices, k=12):
        assert known.setdefault(loras, picture(engine, *loras)) == picture(engine, *loras)
    fresh = engine_in(folder, storage_dtype=engine.config.storage_dtype)
    loras = draws.choice(list(known))
    assert picture(fresh, *loras) == known[loras]
    fresh.close()


def test_unchanged_is_no_work(plain: LightweightEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = picture(plain)
    first = picture(plain, "A")
    with monkeypatch.context() as patch:
        patch.setattr(Adapter, "follow", lambda *_: pytest.fail("the same LoRAs were attached again"))
        assert picture(plain, "A") == first
    assert picture(plain) == bare


def test_text_encoders_are_changed_too_and_their_texts_kept_apart(plain: LightweightEngine) -> None:
    bare = picture(plain)
    only_text = picture(plain, prompt="a cat<lora:C:1:0>")
    assert only_text != bare
    assert picture(plain, prompt="a cat<lora:C:0:0>") == bare
    assert picture(plain, prompt="a cat<lora:C:1:0>") == only_text


def test_tags_are_taken_out_of_both_prompts(plain: LightweightEngine) -> None:
    assert picture(plain, prompt="a cat<lora:A:0.5>") == picture(plain, "A:0.5")
    guided = {"cfg_scale": 2.0, "negative_prompt": "a hat"}
    told = run(plain, **{**guided, "negative_prompt": "a hat<lora:A:1>"})
    assert pixels_sha256(told.images[0]) == picture(plain, **guided)
    assert any("negative prompt" in warning for warning in told.warnings)


def test_each_prompt_of_a_batch_has_its_own(plain: LightweightEngine) -> None:
    request = GenerationRequest(**{**SMALL, "num_outputs": 3, "batch_size": 3})
    prompts = ["a cat<lora:A:1>", "a cat<lora:A:1>", "a dog"]
    drawn = plain.draw(request, prompts).latent
    for index, prompt in enumerate(prompts):
        alone = plain.draw(GenerationRequest(**{**SMALL, "seed": 3 + index}), [prompt]).latent
        torch.testing.assert_close(drawn[index : index + 1], alone, rtol=0, atol=1e-4 * float(alone.abs().max()))


def test_forge_takes_those_of_the_first_prompt_for_all(plain: LightweightEngine) -> None:
    request = GenerationRequest(**{**SMALL, "num_outputs": 2, "compat": "forge"})
    drawn = plain.draw(request, ["a cat<lora:A:1>", "a dog<lora:no such file:1>"]).latent
    alone = plain.draw(request, ["a cat<lora:A:1>", "a dog"]).latent
    assert torch.equal(drawn, alone)


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
def test_merged_they_do_the_same_and_come_out_again(folder: Path, plain: LightweightEngine, storage: str) -> None:
    merging = engine_in(folder, storage_dtype=storage, lora_merge=True)
    beside = engine_in(folder, storage_dtype=storage)
    bare = picture(merging)
    for loras in (("A",), ("B:0.5", "C"), ()):
        request = GenerationRequest(**{**SMALL, "loras": loras})
        ours, theirs = merging.draw(request).latent, beside.draw(request).latent
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3 * float(theirs.abs().max()))
    assert picture(merging) == bare == picture(beside)


@pytest.mark.parametrize("storage", ["auto", "bf16", "nf4", "gguf:Q8_0"])
def test_at_hand_they_do_the_same_and_come_out_again(folder: Path, storage: str) -> None:
    fast = engine_in(folder, storage_dtype=storage, residency="fast")
    beside = engine_in(folder, storage_dtype=storage)
    bare = picture(fast)
    for loras in (("A",), ("B:0.5", "C"), ()):
        request = GenerationRequest(**{**SMALL, "loras": loras})
        kept = fast.plan(request).placed("transformer").at_hand
        assert kept > 0 or (storage == "auto" and not loras)
        ours, theirs = fast.draw(request).latent, beside.draw(request).latent
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3 * float(theirs.abs().max()))
    assert picture(fast) == bare == picture(beside)
    keeps = [fast.plan(GenerationRequest(**{**SMALL, "loras": loras})).residency for loras in ((), ("A",))]
    assert keeps == [ADDS_NOTHING if storage == "auto" else "fast", "fast"]
    told = [each for each in fast.run(GenerationRequest(**SMALL)).warnings if "residency" in each]
    why = "residency = fast (argument) has no effect on a CPU but with LoRAs"
    assert [each.partition(":")[0] for each in told] == [why] * (storage == "auto")


def test_weights_at_hand_go_where_a_job_needs_their_room(folder: Path) -> None:
    engine = engine_in(folder, storage_dtype="nf4", residency="fast")
    request = GenerationRequest(**SMALL)
    plan, bare = engine.plan(request), picture(engine)
    manager = engine.networks.manager
    engine.networks.manager = replace(manager, limit=plan.peak - plan.placed("transformer").at_hand)
    assert engine.plan(request).placed("transformer").at_hand == 0
    assert any("residency: stored, as fast does not fit" in told for told in engine.run(request).warnings)
    assert picture(engine) == bare
    assert not engine.networks._loaded["transformer"].adapter._attached._places
    engine.networks.manager = manager
    assert engine.plan(request).placed("transformer").at_hand > 0
    assert not any("residency" in told for told in engine.run(request).warnings)
    assert picture(engine) == bare


def test_streamed_layers_are_changed_too(folder: Path, plain: LightweightEngine) -> None:
    streaming = engine_in(folder, vram_state="NO_VRAM", compute_dtype="bf16", storage_dtype="bf16")
    resident = engine_in(folder, compute_dtype="bf16", storage_dtype="bf16")
    for loras in (("A",), (), ("B", "C")):
        assert picture(streaming, *loras) == picture(resident, *loras)
    assert streaming.plan(GenerationRequest(**SMALL)).stage("sample").moved > 0


def test_the_plan_counts_them(plain: LightweightEngine) -> None:
    bare = plain.plan(GenerationRequest(**SMALL)).stage("sample")
    changed = plain.plan(GenerationRequest(**{**SMALL, "loras": ["A", "B"]})).stage("sample")
    assert changed.adapters["transformer"] > 0
    assert changed.peak >= bare.peak + changed.adapters["transformer"]


def test_what_is_told(plain: LightweightEngine, tmp_path: Path) -> None:
    result = run(plain, "A:0.5", prompt="a cat<lora:C:1>")
    assert [(row.name, row.scale, row.applied == row.found) for row in result.loras] == [
        ("A", 0.5, True),
        ("C", 1.0, True),
    ]
    assert result.loras[1].patches["clip"] > 0
    assert f'Lora hashes: "A: {result.loras[0].sha256[:10]}, C: ' in result.infotexts[0]
    assert sidecar(result, 0)["loras"][0]["sha256"] == result.loras[0].sha256


def test_a_secret_in_an_address_is_told_nowhere(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    with serving() as site:
        site.files["style.safetensors"] = save(random_lora({"transformer": _shapes(folder)}, seed=9))
        url = site.url("style.safetensors?token=SECRET")
        engine = engine_in(folder, offline=False, allow_hosts=(site.name,), cache_dir=tmp_path / "cache")
        result = engine.run(GenerationRequest(**{**SMALL, "lora_urls": [url], "lora_scales": [0.5]}))
        assert result.loras[0].given == site.url("style.safetensors")
    saved = save_result(result, tmp_path / "out")
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for text in (caplog.text, repr(result), str(result.infotexts), str(sidecar(result, 0)), str(saved)):
        assert "SECRET" not in text
    assert b"SECRET" not in written
    assert not [path for path in tmp_path.rglob("*") if "SECRET" in path.name]


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return dict(ModelLibrary([folder]).choose().parts["transformer"].shapes)


def test_a_picture_with_loras_is_made_again(folder: Path, tmp_path: Path) -> None:
    with serving() as site:
        site.files["style.safetensors"] = save(random_lora({"transformer": _shapes(folder)}, seed=9))
        engine = engine_in(folder, offline=False, allow_hosts=(site.name,), cache_dir=tmp_path / "cache")
        urls = {"lora_urls": [site.url("style.safetensors?token=SECRET")], "lora_scales": [0.5]}
        saved = save_result(engine.run(GenerationRequest(**{**SMALL, "loras": ["A:0.7"], **urls})), tmp_path)[0]
        site.files.clear()  # the cache knows the file by its hash
    again = replay(engine, saved.path)
    assert again.identical and again.differences == ()
    assert [row.scale for row in again.result.loras] == [0.5, 0.7]


def test_after_a_refusal_the_next_job_is_right(plain: LightweightEngine, folder: Path) -> None:
    bare = picture(plain)
    with pytest.raises(ModelNotFoundError):
        run(plain, "A", "no such file")
    lora_file(folder / "Lora", {"lora_unet_x.lora_down.weight": torch.zeros(2, 2)}, name="odd.safetensors")
    with pytest.raises(AdapterError):
        run(plain, "odd")
    assert picture(plain) == bare


def test_running_out_of_memory_while_they_are_attached(
    plain: LightweightEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare, expected = picture(plain), picture(plain, "A", "B")
    picture(plain)
    follow, left = Adapter.follow, [1]

    def once(self: Adapter, loras: object, at_hand: object = ()) -> None:
        if left:
            left.pop()
            self.leave()
            raise torch.OutOfMemoryError("injected")
        follow(self, loras, at_hand)  # type: ignore[arg-type]

    monkeypatch.setattr(Adapter, "follow", once)
    result = run(plain, "A", "B")
    assert pixels_sha256(result.images[0]) == expected
    assert any("memory" in warning for warning in result.warnings)
    assert picture(plain) == bare


def test_what_loras_take_is_counted_once(plain: LightweightEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are those of networks that never counted, set by set, and equal sets are not counted again."""

    def rows(*loras: str) -> list[dict[str, object]]:
        return plain.plan(GenerationRequest(**{**SMALL, "loras": loras})).rows()

    plain.setup()
    sets, counted, fresh = [(), ("A",), ("C",), ("A", "C")], Mock(wraps=networks.adapter_cost), []
    monkeypatch.setattr(networks, "adapter_cost", counted)
    for loras in sets:
        plain.networks._costs.clear()
        fresh.append(rows(*loras))
    assert fresh[0] != fresh[1] != fresh[3]
    assert [rows(*loras) for loras in sets] == fresh
    calls = counted.call_count
    assert calls and [rows(*loras) for loras in reversed(sets)] == fresh[::-1] and counted.call_count == calls
