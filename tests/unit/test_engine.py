"""The engine on the embedded model: what it promises to a caller, and that it survives what goes wrong."""

from __future__ import annotations

import threading
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lightweight_engine import Config, GenerationRequest, LightweightEngine, Progress, UpscaleRequest
from lightweight_engine.core import engine as engine_module
from lightweight_engine.core.describe import PACKAGES, pixels_sha256, versions
from lightweight_engine.core.images import read_infotext, read_sidecar
from lightweight_engine.core.replay import read_recipe, replay, save_result
from lightweight_engine.errors import (
    ConfigError,
    GenerationCancelled,
    MemoryBudgetError,
    ModelNotFoundError,
    OutputError,
    RequestError,
)

SMALL = {"width": 128, "height": 128, "steps": 3, "seed": 7}


def request(**fields: object) -> GenerationRequest:
    return GenerationRequest(**{"prompt": "a smiling woman with red hair", **SMALL, **fields})


def hashes(images: object) -> list[str]:
    return [pixels_sha256(image) for image in images]  # type: ignore[attr-defined]


def test_a_picture_is_made_and_everything_about_it_is_told(engine: LightweightEngine) -> None:
    result = engine.run(request())
    assert [image.size for image in result.images] == [(128, 128)]
    assert result.seeds == (7,)
    assert {file.role for file in result.models} == {"transformer", "t5", "clip", "autoencoder"}
    assert all(len(file.sha256 or "") == 64 for file in result.models)
    assert {"encode", "sample", "decode"} <= set(result.timings)
    assert result.peak_memory > 0
    assert "Steps: 3, Sampler: Euler, Schedule type: Simple" in result.infotexts[0]
    assert any("tiny" in warning for warning in result.warnings)


def test_the_same_request_makes_the_same_picture(engine: LightweightEngine) -> None:
    assert hashes(engine.run(request()).images) == hashes(engine.run(request()).images)


def test_text_in_sixteen_bits_moves_a_picture_a_little(engine: LightweightEngine, tmp_path: Path) -> None:
    config = Config(models_dir=tmp_path, device="cpu", offline=True, text_compute_dtype="bf16")
    exact, short = (each.draw(request()).pixels for each in (engine, LightweightEngine(config)))
    assert 0 < (short - exact).abs().mean() < 0.03


def test_no_global_random_state_is_read_or_written(engine: LightweightEngine) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = hashes(engine.run(request(sampler="Euler a", image=Image.new("RGB", (128, 128), "red"))).images)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert hashes(engine.run(request(sampler="Euler a", image=Image.new("RGB", (128, 128), "red"))).images) == first


@pytest.mark.parametrize("sampler", ["Euler", "Euler a", "DPM++ 2M SDE"])
def test_each_of_several_outputs_equals_the_one_made_alone(engine: LightweightEngine, sampler: str) -> None:
    several = engine.run(request(num_outputs=3, sampler=sampler))
    assert several.seeds == (7, 8, 9)
    alone = [engine.run(request(seed=seed, sampler=sampler)).images[0] for seed in several.seeds]
    assert hashes(several.images) == hashes(alone)


def test_a_batch_equals_its_pictures_made_alone_within_rounding(engine: LightweightEngine) -> None:
    batch = engine.draw(request(num_outputs=2, batch_size=2)).latent
    alone = torch.cat([engine.draw(request(seed=seed)).latent for seed in (7, 8)])
    torch.testing.assert_close(batch, alone, rtol=0, atol=1e-3 * float(alone.abs().max()))


def test_a_variation_keeps_the_seed(engine: LightweightEngine) -> None:
    result = engine.run(request(num_outputs=2, subseed=5, subseed_strength=0.3))
    assert result.seeds == (7, 7) and result.subseeds == (5, 6)
    assert len(set(hashes(result.images))) == 2
    assert "Variation seed: 6, Variation seed strength: 0.3" in result.infotexts[1]


def test_a_random_seed_is_told(engine: LightweightEngine) -> None:
    result = engine.run(request(seed=-1))
    assert 0 <= result.seeds[0] < 2**32
    assert hashes(engine.run(request(seed=result.seeds[0])).images) == hashes(result.images)


def test_progress_rises_to_one(engine: LightweightEngine) -> None:
    seen: list[Progress] = []
    engine.run(request(num_outputs=2), on_progress=seen.append, preview_every=2)
    fractions = [progress.fraction for progress in seen]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0
    assert [p.step for p in seen if p.stage == "sample" and p.step] == [1, 2, 3, 1, 2, 3]
    assert {p.stage for p in seen} == {"encode", "sample", "decode", "done"}
    assert all(p.eta_seconds is not None for p in seen if p.step)
    previews = [p.preview for p in seen if p.preview is not None]
    assert [preview.size for preview in previews] == [(16, 16)] * 2
    assert {p.image_index for p in seen} == {0, 1}


def test_a_repeated_prompt_needs_no_encoder(engine: LightweightEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.run(request(prompt="said twice"))
    monkeypatch.setattr(type(engine.networks), "text_encoders", lambda self: pytest.fail("the encoders were used"))
    engine.run(request(prompt="said twice", seed=8))


@pytest.mark.parametrize("after", [1, 2])
def test_cancelled_within_one_step(engine: LightweightEngine, after: int) -> None:
    cancel, steps = threading.Event(), []

    def on_progress(progress: Progress) -> None:
        if progress.step:
            steps.append(progress.step)
        if progress.step == after:
            cancel.set()

    with pytest.raises(GenerationCancelled):
        engine.run(request(steps=8), on_progress=on_progress, cancel=cancel)
    assert max(steps) <= after + 1
    assert engine.run(request()).images


def test_out_of_memory_ends_the_job_and_not_the_engine(
    engine: LightweightEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = hashes(engine.run(request()).images)

    def fail(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    with monkeypatch.context() as patch:
        patch.setattr("lightweight_engine.core.processing.run", fail)
        with pytest.raises(MemoryBudgetError, match="20.00 GiB.*smaller picture") as caught:
            engine.run(request())
    assert caught.value.__context__ is None  # it would keep the frames of the job, and so its tensors
    assert hashes(engine.run(request()).images) == expected


def test_calls_from_several_threads_take_turns(engine: LightweightEngine) -> None:
    expected = hashes(engine.run(request(num_outputs=3)).images)
    found: dict[int, str] = {}

    def work(index: int) -> None:
        found[index] = hashes(engine.run(request(seed=7 + index)).images)[0]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(3)] == expected


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"width": 4104}, "width"),
        ({"height": 5000}, "height"),
        ({"prompt": "x" * 20_001}, "prompt"),
        ({"negative_prompt": "x" * 20_001}, "negative_prompt"),
        ({"num_outputs": 65}, "num_outputs"),
        ({"num_outputs": 10**5000}, "num_outputs"),
        ({"width": 10**5000}, "width"),
        ({"steps": 1000, "width": 4096, "height": 4096}, "steps"),
        ({"sampler": "Oiler"}, "sampler"),
        ({"scheduler": "Complex"}, "scheduler"),
        ({"scheduler": "Turbo"}, "scheduler"),
        ({"sampler": "LCM"}, "sampler"),
        ({"prompt": "a AND b:-1"}, "prompt"),
        ({"image": "/does/not/exist.png"}, "image"),
    ],
)
def test_bad_requests_name_their_field(engine: LightweightEngine, fields: dict, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        engine.run(request(**fields))
    assert caught.value.field == field
    assert engine.run(request()).images


def test_generate_takes_keywords(engine: LightweightEngine) -> None:
    (image,) = engine.generate(prompt="a bald man", **SMALL)
    assert image.size == (128, 128)
    with pytest.raises(RequestError, match="colour"):
        engine.generate(prompt="a bald man", colour="red")


@pytest.mark.parametrize("name", ["on_progress", "cancel", "preview_every", "interrupt", "hashed"])
def test_what_run_takes_beside_a_request_is_told_to_generate(engine: LightweightEngine, name: str) -> None:
    with pytest.raises(RequestError, match=f"^{name}: it is no field of a request, but run.. takes it") as caught:
        engine.generate(prompt="a bald man", **{name: None})
    assert caught.value.field == name


@pytest.mark.parametrize("given", [{"prompt": "a man"}, "a man", None])
def test_what_is_no_request_is_told_what_to_give(engine: LightweightEngine, given: Any) -> None:
    for method in (engine.run, engine.plan):
        with pytest.raises(RequestError, match=r"^a \w+ is no GenerationRequest; give engine.request\(prompt="):
            method(given)
    with pytest.raises(RequestError, match=r"^a \w+ is no UpscaleRequest; give one, or call upscale"):
        engine.run_upscale(given)


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ({"cancel": True}, "cancel: give a threading.Event"),
        ({"cancel": threading.Event}, "cancel: give a threading.Event"),
        ({"on_progress": 5}, "on_progress: give a function"),
        ({"interrupt": threading.Event()}, "interrupt: give a lightweight_engine.Interrupt"),
        ({"preview_every": -1}, "preview_every: give 0 or more"),
        ({"preview_every": "2"}, "preview_every: give 0 or more"),
    ],
)
def test_an_argument_of_another_kind_is_told_before_the_job(
    engine: LightweightEngine, argument: dict[str, Any], told: str
) -> None:
    with pytest.raises(RequestError, match=rf"^{told}.* \(got ") as caught:
        engine.run(request(), **argument)
    assert [caught.value.field] == list(argument)


@pytest.mark.parametrize("given", [{}, {"steps": 3}, "/models", Path("engine.toml")])
def test_settings_of_another_kind_are_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"^config: a \w+ is no Config; give Config\("):
        LightweightEngine(given)


@pytest.mark.parametrize(
    ("update", "told"), [({"steps": 0}, "^steps: 0 is too small; give 1"), ({"stepz": 2}, "^stepz: there is no such")]
)
def test_a_copy_with_wrong_values_is_refused(engine: LightweightEngine, update: dict[str, Any], told: str) -> None:
    for method in (engine.run, engine.plan):
        with pytest.raises(RequestError, match=told):
            method(request().model_copy(update=update))
    with pytest.raises(RequestError, match="^by: "):
        engine.run_upscale(UpscaleRequest(images=[Image.new("RGB", (8, 8))]).model_copy(update={"by": 0}))


def test_a_copy_keeps_what_was_asked_for_and_has_its_values_read(engine: LightweightEngine) -> None:
    asked = GenerationRequest(prompt="a man", **SMALL)
    made = engine.run(asked.model_copy(update={"steps": "2"})).request
    assert made.steps == 2 and made.model_fields_set == asked.model_fields_set


def test_generate_logs_what_a_result_would_tell(engine: LightweightEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(engine_module.log, "warning", lambda message, *values: told.append(message % values))
    engine.generate(prompt="a man", width=65, height=64, steps=1)
    assert any("multiples of 8" in each for each in told)


def test_the_size_left_out_is_the_models_own(engine: LightweightEngine) -> None:
    assert engine.run(GenerationRequest(prompt="x", steps=1, seed=1)).images[0].size == (256, 256)


@pytest.mark.parametrize(("asked", "made", "words"), [(135, 128, "multiples of 8"), (136, 136, "padded")])
def test_odd_sizes_are_told(engine: LightweightEngine, asked: int, made: int, words: str) -> None:
    result = engine.run(request(width=asked))
    assert result.images[0].size == (made, 128)
    assert any(words in warning for warning in result.warnings)


def test_tags_of_other_kinds_are_told(engine: LightweightEngine) -> None:
    plain = engine.run(request())
    result = engine.run(request(prompt="a smiling woman with red hair<hypernet:night:0.8>"))
    assert any("<hypernet:night:0.8>" in warning for warning in result.warnings)
    assert hashes(result.images) == hashes(plain.images)
    assert "<hypernet:night:0.8>" in result.infotexts[0]


def test_tags_leave_the_negative_prompt_too(engine: LightweightEngine) -> None:
    guided = {"cfg_scale": 2.0, "negative_prompt": "a hat"}
    plain = engine.run(request(**guided))
    tagged = engine.run(request(**{**guided, "negative_prompt": "a hat<lora:x:1>"}))
    assert hashes(plain.images) == hashes(tagged.images)


def test_image_to_image_goes_from_the_picture_to_the_prompt(engine: LightweightEngine) -> None:
    source = engine.run(request(prompt="a man, blue background", steps=8)).images[0]

    def distance(strength: float) -> float:
        made = engine.run(request(image=source, denoising_strength=strength, steps=8)).images[0]
        pixels = [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float() for image in (made, source)]
        return float((pixels[0] - pixels[1]).abs().mean())

    assert distance(0.1) < distance(0.6) < distance(1.0)


@pytest.mark.parametrize("format", ["png", "jpg", "webp"])
def test_a_saved_picture_can_be_made_again(engine: LightweightEngine, tmp_path: Path, format: str) -> None:
    result = engine.run(request(prompt="a (smiling:1.2) man, [red|blue] shirt", num_outputs=2, output_format=format))
    saved = save_result(result, tmp_path)
    assert [file.path.name for file in saved] == [f"00000-7.{format}", f"00001-8.{format}"]
    again = replay(engine, saved[1].path)
    assert again.identical is True and not again.differences
    assert again.result.seeds == (8,)


def test_a_picture_without_sidecar_is_made_from_its_text(engine: LightweightEngine, tmp_path: Path) -> None:
    result = engine.run(request(sampler="DPM++ 2M", scheduler="Beta", cfg_scale=1.5, negative_prompt="glasses, hat"))
    (saved,) = save_result(result, tmp_path)
    assert saved.sidecar is not None
    saved.sidecar.unlink()
    assert read_recipe(saved.path).sidecar is None
    assert replay(engine, saved.path).identical is True


def test_a_picture_that_says_nothing_cannot_be_made_again(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    with pytest.raises(RequestError, match="cannot be made again"):
        read_recipe(tmp_path / "x.png")


def test_released_networks_come_back(tmp_path: Path, engine: LightweightEngine) -> None:
    config = Config(models_dir=tmp_path, cache_dir=tmp_path, device="cpu", offline=True, vram_state="LOW_VRAM")
    lean = LightweightEngine(config)
    assert hashes(lean.run(request()).images) == hashes(engine.run(request()).images)
    assert not lean.networks._loaded


def test_a_named_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="flux1-dev"):
        LightweightEngine(Config(models_dir=tmp_path, checkpoint="flux1-dev", cache_dir=tmp_path)).setup()


def test_a_models_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="there is no folder"):
        LightweightEngine(Config(models_dir=tmp_path / "none", cache_dir=tmp_path)).setup()


def test_files_that_cannot_be_used_are_told_where_tiny_steps_in(tmp_path: Path) -> None:
    (tmp_path / "Stable-diffusion").mkdir()
    (tmp_path / "Stable-diffusion" / "x.safetensors").write_bytes(b"<html>")
    lean = LightweightEngine(Config(models_dir=tmp_path, cache_dir=tmp_path, device="cpu", offline=True))
    told = lean.run(request(steps=1)).warnings
    assert any("(1 file unusable)" in warning and "tiny" in warning and "doctor" in warning for warning in told)


def test_versions_are_looked_up_once_and_belong_to_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    told, packages = versions(), {name: metadata.version(name) for name in PACKAGES}
    assert told.items() >= packages.items()
    told["torch"] = "changed"
    monkeypatch.setattr(metadata, "version", lambda name: "asked again")
    assert versions().items() >= packages.items()


def test_a_result_is_saved_as_by_the_command_line(engine: LightweightEngine, tmp_path: Path) -> None:
    result = engine.run(request(num_outputs=2))
    paths = engine.save(result, tmp_path / "new")
    assert [path.name for path in paths] == [f"0000{i}-{seed}.png" for i, seed in enumerate(result.seeds)]
    assert [read_infotext(path) for path in paths] == list(result.infotexts)
    assert all(read_sidecar(path) for path in paths)
    with pytest.raises(OutputError, match="cannot"):
        engine.save(result, paths[0])
