"""The hires pass: its arithmetic, and through the engine on the embedded model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import AE, network, save, save_drawable
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from lightweight_engine import Config, GenerationRequest, LightweightEngine, Progress
from lightweight_engine.core.describe import pixels_sha256
from lightweight_engine.core.infotext_parse import request_fields
from lightweight_engine.core.models import TINY
from lightweight_engine.core.replay import replay, save_result
from lightweight_engine.errors import GenerationCancelled, ModelNotFoundError, RequestError
from lightweight_engine.extensions.hires_fix import LATENT_MODES, Target, enlarge_pixels, second_pass, target_size
from lightweight_engine.flux.autoencoder import Autoencoder
from lightweight_engine.upscalers.upscaler import PLAIN

SMALL = {"prompt": "a smiling woman with red hair", "width": 64, "height": 96, "steps": 2, "seed": 7, "hr_steps": 2}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LightweightEngine]:
    folder = tmp_path_factory.mktemp("engine")
    (folder / "ESRGAN").mkdir()
    save_file(compact_state(), folder / "ESRGAN" / "4x-Small.safetensors")
    made = LightweightEngine(Config(models_dir=folder, cache_dir=folder / "cache", device="cpu", offline=True))
    made.setup()
    yield made
    made.close()


def compact_state(scale: int = 4, width: int = 8) -> dict[str, Tensor]:
    """A network in the layout of SRVGG ("Compact"), small enough for tests."""
    torch.manual_seed(3)
    sizes = [(3, width), (width, width), (width, 3 * scale**2)]
    state = {}
    for i, (inputs, outputs) in enumerate(sizes):
        state[f"body.{2 * i}.weight"] = torch.randn(outputs, inputs, 3, 3) * 0.05
        state[f"body.{2 * i}.bias"] = torch.zeros(outputs)
        if i < len(sizes) - 1:
            state[f"body.{2 * i + 1}.weight"] = torch.full((width,), 0.2)
    return state


def request(**fields: object) -> GenerationRequest:
    return GenerationRequest(**{**SMALL, "hr_scale": 1.5, "hr_upscaler": "Latent", **fields})


# --- arithmetic ---------------------------------------------------------------------------------------------------


def test_both_sides_given_cover_the_target_and_are_cut() -> None:
    target = target_size(500, 832, 1.0, 1920, 2048, 8)
    assert (target.width, target.height, target.cut_height) == (1920, 3194, 143)
    assert target.cells(8) == (256, 240)
    pixels = torch.arange(3194.0).view(1, 1, -1, 1).expand(1, 1, 3194, 1920)
    cut = target.cut_pixels(pixels, 8)
    assert cut.shape[2:] == (2048, 1920) and cut[0, 0, 0, 0] == 71 * 8


def test_the_second_pass_takes_what_is_left_out_from_the_first() -> None:
    first = GenerationRequest(prompt="a", negative_prompt="b", steps=7, cfg_scale=2, distilled_cfg_scale=3, hr_steps=0)
    second = second_pass(first)
    assert (second.prompt, second.negative_prompt, second.steps) == ("a", "b", 7)
    assert (second.cfg_scale, second.distilled_cfg_scale, second.denoising_strength) == (2, 3, 0.7)
    own = second_pass(first.model_copy(update={"hr_prompt": "c", "hr_cfg": 1.0, "hr_sampler": "DEIS", "hr_steps": 3}))
    assert (own.prompt, own.cfg_scale, own.sampler, own.steps) == ("c", 1, "DEIS", 3)


def test_pixels_become_bytes_on_the_way() -> None:
    pixels = torch.full((1, 3, 8, 8), 0.9999)
    made = enlarge_pixels(pixels, Target(8, 8), PLAIN[1])
    assert torch.equal(made, torch.full((1, 3, 8, 8), 254 / 255))
    assert enlarge_pixels(pixels * float("nan"), Target(16, 12), None).shape == (1, 3, 12, 16)


# --- through the engine -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("upscaler", [*LATENT_MODES, "None", "Lanczos", "Nearest", "4x-Small"])
def test_every_upscaler_gives_the_size(engine: LightweightEngine, upscaler: str) -> None:
    if upscaler == "4x-Small":
        pytest.importorskip("spandrel")
    result = engine.run(request(hr_upscaler=upscaler))
    assert result.images[0].size == (96, 144)
    assert f"Hires upscaler: {upscaler}" in result.infotexts[0]
    assert "Size: 64x96" in result.infotexts[0]


@pytest.mark.parametrize("upscaler", ["Latent", "Lanczos"])
def test_an_autoencoder_with_other_cells(tmp_path: Path, upscaler: str) -> None:
    root = save_drawable(tmp_path)
    save(root / "VAE" / "ae.safetensors", network(Autoencoder, replace(AE, widths=(32, 32, 32))))
    places = {"models_dir": root, "cache_dir": root / "cache", "tokenizer_dirs": (TINY,)}
    engine = LightweightEngine(Config(**places, device="cpu", offline=True))
    result = engine.run(request(hr_upscaler=upscaler, hr_resize_x=80, hr_resize_y=80))
    assert engine.networks.autoencoder_factor == 4 and result.images[0].size == (80, 80)
    engine.close()


def test_a_picture_does_not_depend_on_its_batch(engine: LightweightEngine) -> None:
    together = engine.run(request(num_outputs=2, hr_upscaler="Lanczos"))
    alone = engine.run(request(seed=8, hr_upscaler="Lanczos"))
    assert pixels_sha256(together.images[1]) == pixels_sha256(alone.images[0])
    batch = engine.run(request(num_outputs=2, batch_size=2, hr_upscaler="Lanczos"))
    difference = np.array(batch.images[1]).astype(int) - np.array(alone.images[0])
    assert np.abs(difference).max() <= 1


def test_strength_0_returns_the_enlarged_picture(engine: LightweightEngine) -> None:
    base = engine.run(request(hr_scale=1.0)).images[0]
    made = engine.run(request(denoising_strength=0, hr_upscaler="Nearest", hr_scale=2)).images[0]
    assert np.array_equal(np.array(made), np.array(base.resize((128, 192), Image.Resampling.NEAREST)))


def test_scale_1_asked_for_refines_at_the_same_size(engine: LightweightEngine) -> None:
    result = engine.run(request(hr_scale=1.0, enable_hr=True, hr_upscaler="Lanczos", denoising_strength=0.4))
    assert result.images[0].size == (64, 96)
    assert pixels_sha256(result.images[0]) != pixels_sha256(engine.run(request(hr_scale=1.0)).images[0])
    assert "the hires pass draws at the same size, 64x96; raise hr_scale to enlarge" in result.warnings


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"hr_scale": 1.01}, "64x96; raise hr_scale"),
        ({"enable_hr": True, "hr_resize_x": 64}, "64x96; raise hr_resize_x"),
        ({"hr_scale": 1.25}, None),
        ({"enable_hr": True, "hr_scale": 1.0, "hr_resize_y": 128}, None),
    ],
)
def test_a_pass_that_enlarges_nothing_is_told(
    engine: LightweightEngine, fields: dict[str, object], told: str | None
) -> None:
    same = "the hires pass draws at the same size, "
    found = [each for each in engine.run(request(**fields)).warnings if each.startswith(same)]
    assert found == ([f"{same}{told} to enlarge"] if told else [])


@pytest.mark.parametrize(("steps", "told"), [(2, True), (3, False)])
def test_a_first_pass_of_which_nothing_is_seen(engine: LightweightEngine, steps: int, told: bool) -> None:
    results = [engine.run(request(steps=first, hr_steps=steps)) for first in (2, 3)]
    assert np.array_equal(*(np.array(result.images[0]) for result in results)) == told
    assert any(each.startswith("hr_steps: 2 at denoising_strength 0.7 begin") for each in results[0].warnings) == told


def test_stages_are_kept_where_asked(engine: LightweightEngine, tmp_path: Path) -> None:
    result = engine.run(request(hr_upscaler="Lanczos", save_stages=True))
    assert {name: image.size for name, image in result.stages[0].items()} == {"base": (64, 96), "upscaled": (96, 144)}
    assert list(engine.run(request(save_stages=True)).stages[0]) == ["base"]
    save_result(result, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        "00000-7-base.png", "00000-7-upscaled.png", "00000-7.png"
    ]  # fmt: skip


def test_progress_never_goes_back(engine: LightweightEngine) -> None:
    seen: list[Progress] = []
    engine.run(request(hr_upscaler="Lanczos", num_outputs=2), on_progress=seen.append)
    fractions = [report.fraction for report in seen]
    assert fractions == sorted(fractions) and fractions[-1] == 1
    assert {"encode", "sample", "decode", "upscale", "done"} <= {report.stage for report in seen}
    assert [report.step for report in seen if report.stage == "sample" and report.step] == [1, 2] * 4


def test_tiles_are_told(engine: LightweightEngine) -> None:
    pytest.importorskip("spandrel")
    seen: list[Progress] = []
    engine.run(request(hr_upscaler="4x-Small", width=256), on_progress=seen.append)
    assert [(report.step, report.steps) for report in seen if report.stage == "upscale"] == [(0, 0), (1, 2), (2, 2)]


def test_a_job_can_be_stopped_in_its_second_pass(engine: LightweightEngine) -> None:
    class Stop:
        stopped = False

        def is_set(self) -> bool:
            return self.stopped

    stop = Stop()

    def watch(report: Progress) -> None:
        stop.stopped = stop.stopped or report.stage == "upscale"

    with pytest.raises(GenerationCancelled):
        engine.run(request(hr_upscaler="Lanczos"), on_progress=watch, cancel=stop)
    assert engine.run(request()).images[0].size == (96, 144)


def test_own_prompt_steps_and_guidance(engine: LightweightEngine) -> None:
    plain = engine.run(request())
    own = engine.run(
        request(hr_prompt="a man with a hat", hr_cfg=2.0, hr_negative_prompt="hat", hr_sampler="DEIS", hr_steps=3)
    )
    assert pixels_sha256(plain.images[0]) != pixels_sha256(own.images[0])
    told = "Hires sampler: DEIS, Hires prompt: a man with a hat, Hires negative prompt: hat, Hires CFG Scale: 2.0"
    assert told in own.infotexts[0]


def test_the_text_alone_names_the_same_pass(engine: LightweightEngine) -> None:
    asked = request(hr_scale=1.0, enable_hr=True, hr_steps=0, hr_upscaler="Lanczos", denoising_strength=0.5)
    result = engine.run(asked)
    again = GenerationRequest(**request_fields(result.infotexts[0]))
    assert pixels_sha256(engine.run(again).images[0]) == pixels_sha256(result.images[0])


def test_replay_is_bit_for_bit(engine: LightweightEngine, tmp_path: Path) -> None:
    saved = save_result(engine.run(request(hr_upscaler="Lanczos", hr_resize_x=80, hr_resize_y=80)), tmp_path)
    assert replay(engine, saved[0].path).identical


def test_the_plan_has_the_larger_pass(engine: LightweightEngine) -> None:
    plan = engine.plan(request(hr_upscaler="Lanczos"))
    assert [row["stage"] for row in plan.rows()] == [
        *("encode", "hires encode", "sample", "decode", "hires upscale", "hires sample", "hires decode")
    ]
    rows = {row["stage"]: row for row in plan.rows()}
    assert rows["hires sample"]["room"] > rows["sample"]["room"]
    assert "hires upscale" in rows and plan.peak >= rows["hires sample"]["peak"]
    assert "hires sample" in plan.table()


@pytest.mark.parametrize(
    ("fields", "kind", "said"),
    [
        ({"hr_upscaler": "Latnt"}, ModelNotFoundError, "hr_upscaler: there is no upscaler 'Latnt'"),
        ({"hr_upscaler": "SwinIR 4x"}, ModelNotFoundError, "SwinIR_4x.pth"),
        ({"hr_scale": 4, "width": 2048}, RequestError, "hr_scale: the hires pass would draw 8192x384"),
        ({"hr_scale": 4, "width": 2048}, RequestError, "(setting max_side); lower hr_scale"),
        ({"hr_resize_x": 9000}, RequestError, "hr_resize_x: the hires pass"),
        ({"hr_resize_x": 64, "hr_resize_y": 9000}, RequestError, "hr_resize_y: the hires pass would draw 6000x9000"),
        ({"hr_resize_y": 9000}, RequestError, "(setting max_side); lower that side"),
        ({"hr_sampler": "Foo"}, RequestError, "sampler: 'Foo' is not known"),
        ({"hr_prompt": "x" * 20_001}, RequestError, "hr_prompt: 20,001 characters"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_drawn(
    engine: LightweightEngine, fields: dict[str, object], kind: type[Exception], said: str
) -> None:
    seen: list[Progress] = []
    with pytest.raises(kind) as caught:
        engine.run(request(**fields), on_progress=seen.append)
    assert said in str(caught.value) and not [report for report in seen if report.stage != "load"]


def test_a_start_picture_has_no_hires_pass_and_says_so(engine: LightweightEngine) -> None:
    result = engine.run(request(image=Image.new("RGB", (64, 96), "red")))
    assert result.images[0].size == (64, 96)
    assert any("hires pass is left out" in warning for warning in result.warnings)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"hr_scale": 1.5}, True),
        ({"enable_hr": True, "hr_scale": 1.0, "hr_resize_x": 128}, True),
        ({"hr_scale": 1.5, "image": Image.new("RGB", (64, 96), "red")}, False),
        ({"enable_hr": True, "hr_scale": 1.0}, False),
        ({"hr_scale": 1.0}, False),
    ],
    ids=("enlarged", "to a size", "a start picture", "no larger", "no hires pass"),
)
def test_another_upscaler_is_told_where_one_runs(
    engine: LightweightEngine, fields: dict[str, object], told: bool
) -> None:
    """The demonstration model's own, in place of the one that nobody has put there."""
    usual = GenerationRequest.model_fields["hr_upscaler"].default
    warnings = engine.run(request(hr_upscaler=usual, hr_steps=1, denoising_strength=0.1, **fields)).warnings
    assert [warning for warning in warnings if usual in warning] == (
        [f"{usual} is not there: the demonstration model enlarges with its own 4x_tiny"] if told else []
    )
