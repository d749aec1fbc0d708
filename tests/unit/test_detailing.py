"""The detailer in a job: real detectors on a drawing, painted by jobs of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightweight_engine import Config, GenerationRequest, GenerationResult, LightweightEngine, Progress
from lightweight_engine.core.describe import pixels_sha256
from lightweight_engine.core.replay import replay, save_result
from lightweight_engine.errors import MemoryBudgetError, ModelNotFoundError, RequestError
from lightweight_engine.extensions.detailer_args import NONE_RUNS
from tools.tiny.draw import training_drawing

QUICK = {"ad_steps": 2, "ad_denoising_strength": 0.5, "ad_use_cfg_scale": False}
NEVER = {"ad_confidence": 1.0, "ad_use_inpaint_width_height": True, "ad_use_sampler": True}  # finds nothing
SMALL = {"prompt": "a woman", "width": 256, "height": 256, "steps": 2, "seed": 5, "denoising_strength": 0}


@pytest.fixture(scope="module")
def drawing() -> Image.Image:
    """A person with hands up."""
    for number in range(100):
        drawn = training_drawing(7, number, (256, 256))
        kinds = [mark.what for mark in drawn.marks]
        if kinds.count("face") == 1 and kinds.count("hand") == 2:
            return drawn.image
    raise AssertionError("no such drawing")


def run(engine: LightweightEngine, drawing: Image.Image, **fields: object) -> GenerationResult:
    defaults = {"image": drawing, "adetailer": True, "adetailer_args": QUICK, "adetailer_args_hands": QUICK}
    return engine.run(GenerationRequest(**{**SMALL, **defaults, **fields}))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


def test_faces_and_hands_are_painted_and_nothing_else(engine: LightweightEngine, drawing: Image.Image) -> None:
    plain = run(engine, drawing, adetailer=False).images[0]
    result = run(engine, drawing)
    faces, hands = result.details[0].passes
    assert (faces["model"], faces["painted"]) == ("face_tiny", 1)
    assert (hands["model"], hands["painted"]) == ("hand_tiny", 2)
    changed = np.abs(pixels(result.images[0]) - pixels(plain)).sum(axis=2) > 0
    near = np.zeros_like(changed)
    for found in [*faces["found"], *hands["found"]]:
        left, top, right, bottom = (int(side) for side in found["box"])
        near[max(top - 40, 0) : bottom + 40, max(left - 40, 0) : right + 40] = True
    assert changed.any() and not (changed & ~near).any()
    assert "ADetailer model: face_tiny" in result.infotexts[0]
    assert "ADetailer model 2nd: hand_tiny" in result.infotexts[0]


def test_it_repeats_and_is_made_again(engine: LightweightEngine, drawing: Image.Image, tmp_path: Path) -> None:
    drawing.save(tmp_path / "start.png")
    result = run(engine, tmp_path / "start.png")  # type: ignore[arg-type]
    assert pixels_sha256(result.images[0]) == pixels_sha256(run(engine, drawing).images[0])
    again = replay(engine, save_result(result, tmp_path)[0].path)
    assert again.identical and again.differences == ()


def test_a_pass_is_left_out(engine: LightweightEngine, drawing: Image.Image) -> None:
    result = run(engine, drawing, adetailer_args='{"ad_disable": true}')
    assert [row["model"] for row in result.details[0].passes] == ["hand_tiny"]
    assert NONE_RUNS not in result.warnings
    nothing = run(engine, drawing, adetailer_passes=[{"ad_model": "None"}])
    assert nothing.details == () and NONE_RUNS in nothing.warnings
    assert pixels_sha256(nothing.images[0]) == pixels_sha256(run(engine, drawing, adetailer=False).images[0])


def test_both_left_out_is_told(engine: LightweightEngine, drawing: Image.Image) -> None:
    off = {"ad_disable": True}
    assert NONE_RUNS in run(engine, drawing, adetailer_args=off, adetailer_args_hands=off).warnings
    assert NONE_RUNS not in run(engine, drawing, adetailer=False).warnings


def test_passes_of_ones_own_and_stages(engine: LightweightEngine, drawing: Image.Image) -> None:
    little = {**QUICK, "ad_use_steps": True, "ad_denoising_strength": 0.05}
    passes = [{**little, "ad_model": "hand_tiny.safetensors", "ad_mask_k": 1}] * 3
    result = run(engine, drawing, adetailer=False, adetailer_passes=passes, save_stages=True)
    assert [row["painted"] for row in result.details[0].passes] == [1, 1, 1]
    assert result.stages[0]["undetailed"].size == (256, 256)


def test_where_nothing_is_found_the_picture_stays(engine: LightweightEngine, drawing: Image.Image) -> None:
    never = {"ad_confidence": 1.0, "ad_scheduler": "Beta"}
    result = run(engine, drawing, adetailer_args=never, adetailer_args_hands=never)
    assert "adetailer_args.ad_scheduler had no effect without ad_use_sampler" in result.warnings
    assert [row["masks"] for row in result.details[0].passes] == [0, 0]
    assert "adetailer: face_tiny (pass 1) and hand_tiny (pass 2) found nothing on the picture" in result.warnings
    assert pixels_sha256(result.images[0]) == pixels_sha256(run(engine, drawing, adetailer=False).images[0])


def test_passes_that_found_nothing_on_any_picture_are_told_once(
    engine: LightweightEngine, drawing: Image.Image
) -> None:
    empty = Image.new("RGB", drawing.size)
    both = run(engine, (drawing, empty), num_outputs=2, batch_size=1, adetailer_args_hands={"ad_confidence": 1.0})
    assert [len(each.passes[0]["found"]) for each in both.details] == [1, 0]
    said = [text for text in both.warnings if "found nothing" in text]
    assert said == ["adetailer: hand_tiny (pass 2) found nothing on any picture"]
    alone = run(engine, empty, adetailer_args_hands={"ad_disable": True})
    assert "adetailer: face_tiny found nothing on the picture" in alone.warnings
    assert not [text for text in run(engine, drawing).warnings if "found nothing" in text]


def test_loras_of_the_prompt_act_on_masks(engine: LightweightEngine, drawing: Image.Image) -> None:
    args = {**QUICK, "ad_prompt": "a face"}
    plain = run(engine, drawing, adetailer_args=args)
    changed = run(engine, drawing, adetailer_args=args, prompt="a woman<lora:night:1>")
    assert pixels_sha256(plain.images[0]) != pixels_sha256(changed.images[0])
    assert [row.name for row in changed.loras] == ["night"]


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"adetailer_args": {"ad_model": "face_tinny"}}, ModelNotFoundError, "did you mean"),
        ({"adetailer_args": {"ad_model": "face_yolov8s.pt"}}, ModelNotFoundError, "download"),
        ({"adetailer_args": {"ad_model": "mediapipe_face_full"}}, RequestError, "MediaPipe"),
        ({"adetailer_args": {"ad_confidence": 2}}, RequestError, "ad_confidence"),
        ({"adetailer_args": {"ad_confidense": 0.2}}, RequestError, "did you mean 'ad_confidence'"),
        ({"adetailer_args": "{"}, RequestError, "JSON"),
        ({"adetailer_args": "x", "adetailer": False}, RequestError, "^adetailer_args: it is no JSON"),
        ({"adetailer_args_hands": "[1]", "adetailer": False}, RequestError, "^adetailer_args_hands: it is no JSON obj"),
        (
            {"adetailer_args": {"ad_stps": 1}, "adetailer_passes": [{"ad_model": "face_tiny"}]},
            RequestError,
            "did you mean 'ad_steps'",
        ),
        (
            {"adetailer_passes": [{"ad_modl": "face_tiny"}]},
            RequestError,
            r"^adetailer_passes\[0\]\.ad_modl: .*did you mean 'ad_model'",
        ),
        ({"adetailer_passes": [{"ad_steps": 2}]}, RequestError, r"^adetailer_passes\[0\]\.ad_model: there is none"),
        ({"adetailer_args": {"ad_use_checkpoint": True}}, RequestError, "ad_use_checkpoint"),
        ({"adetailer_args": {"ad_model_classes": "dog"}}, RequestError, "dog"),
        ({"adetailer_args": {"ad_use_inpaint_width_height": True, "ad_inpaint_width": 60000}}, RequestError, "width"),
        ({"adetailer_args_hands": {**NEVER, "ad_inpaint_width": 60000}}, RequestError, r"hands\.ad_inpaint_width: "),
        ({"adetailer_args_hands": {**NEVER, "ad_inpaint_height": 8}}, RequestError, r"hands\.ad_inpaint_height: "),
        ({"adetailer_args": {**NEVER, "ad_sampler": "Eular"}}, RequestError, r"^adetailer_args\.ad_sampler: .*'Euler'"),
        (
            {"adetailer_args": {**NEVER, "ad_sampler": "DDIM"}},
            RequestError,
            r"^adetailer_args\.ad_sampler: 'DDIM' is not",
        ),
        (
            {"adetailer_args": {**NEVER, "ad_scheduler": "Turbo"}},
            RequestError,
            r"^adetailer_args\.ad_scheduler: 'Turbo'",
        ),
        ({"adetailer_args": {**NEVER, "ad_prompt": "a" * 20_001}}, RequestError, r"^adetailer_args\.ad_prompt: 20,001"),
        (
            {"adetailer_args": {**NEVER, "ad_prompt": "[PROMPT]" * 9}, "prompt": "b" * 2_300},
            RequestError,
            r"^adetailer_args\.ad_prompt: 20,700 char",
        ),
        (
            {"adetailer_args": {**NEVER, "ad_prompt": "x[SEP]" * 64}},
            RequestError,
            r"^adetailer_args\.ad_prompt: 65 parts",
        ),
        ({"adetailer_args": {**NEVER, "ad_negative_prompt": "é " * 5_000}}, RequestError, r"ad_negative_prompt: 10,"),
        (
            {"adetailer_args": {**NEVER, "ad_prompt": "a face[SEP]a<lora:nite:1>"}},
            ModelNotFoundError,
            r"^adetailer_args\.ad_prompt: .*night",
        ),
        (
            {"adetailer_passes": [{"ad_model": "None"}, {**NEVER, "ad_model": "face_tiny", "ad_sampler": "x"}]},
            RequestError,
            r"^adetailer_passes\[1\]\.ad_sampler: ",
        ),
        ({"adetailer_passes": [3]}, RequestError, "adetailer_passes"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_drawn(
    engine: LightweightEngine, drawing: Image.Image, fields: dict, error: type[Exception], words: str
) -> None:
    seen: list[str] = []

    def watch(progress: Progress) -> None:
        seen.append(progress.stage)

    with pytest.raises(error, match=words):
        request = GenerationRequest(**{**SMALL, "image": drawing, "adetailer": True, **fields})
        engine.run(request, on_progress=watch)
    assert "sample" not in seen


def test_a_pass_that_does_not_fit_is_refused_beforehand(tmp_path: Path, drawing: Image.Image) -> None:
    engine = LightweightEngine(Config(models_dir=tmp_path, device="cpu", offline=True, vram_limit=0.5))
    big = {"ad_use_inpaint_width_height": True, "ad_inpaint_width": 2048, "ad_inpaint_height": 2048}
    with pytest.raises(MemoryBudgetError):
        run(engine, drawing, adetailer_args=big)
    engine.close()


def test_progress_and_cancelling(engine: LightweightEngine, drawing: Image.Image) -> None:
    seen: list[Progress] = []
    engine.run(GenerationRequest(**{**SMALL, "image": drawing, "adetailer": True, "adetailer_args": QUICK}),
               on_progress=seen.append)  # fmt: skip
    assert [p.fraction for p in seen] == sorted(p.fraction for p in seen)
    assert {"detect", "detail"} <= {p.stage for p in seen}
