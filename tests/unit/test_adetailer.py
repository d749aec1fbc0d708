"""The detailer's rules where the data does not reach: bounds, forms, refusals, and the differences on purpose."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lightweight_engine.errors import RequestError
from lightweight_engine.extensions.adetailer import ADetailer, DetailerOptions, Outer, Repaint
from lightweight_engine.extensions.detailer_args import (
    FACES,
    HANDS,
    ADetailerArgs,
    Passes,
    idle_arguments,
    read_args,
    read_passes,
    service_passes,
)
from lightweight_engine.extensions.detailer_infotext import detailer_infotext, infotext_of
from lightweight_engine.extensions.detailer_prompts import is_skipped, prompts_of
from lightweight_engine.extensions.detailer_targets import Target, changed, drawn
from lightweight_engine.extensions.detection import Detection
from lightweight_engine.labels import Compat
from lightweight_engine.upscalers.picture import Picture

FACE = "face_yolov8n.pt"
SIZE = (64, 48)
OUTER = Outer(
    prompts=("a man", "a woman"),
    negative_prompts=("blurred", "dark"),
    seeds=(100, 101),
    subseeds=(7, 8),
    size=(32, 24),
    steps=20,
    cfg_scale=1.0,
    distilled_cfg_scale=2.5,
    sampler="Euler",
    scheduler="Simple",
)
BOXES = ((4.0, 4.0, 20.0, 16.0), (40.0, 10.0, 50.0, 30.0))


class Seer:
    """Sees the same things on every picture. Painting writes the number of the job into the picture."""

    name: str = FACE
    nbytes: int = 0
    classes: tuple[str, ...] = ("face", "hand")

    def __init__(self, boxes: Sequence[Any] = BOXES) -> None:
        self.boxes = boxes
        self.asked: list[tuple[str, ...]] = []
        self.jobs: list[Repaint] = []

    def find(self, name: str) -> Seer:
        if name != FACE:
            raise RequestError(f"ad_model: there is no detector {name!r}", field="ad_model")
        return self

    def detect(self, picture: Picture, confidence: float, classes: Sequence[str] = ()) -> list[Detection]:
        assert picture.image.mode == "RGB"
        self.asked.append(tuple(classes))
        return [Detection(box, 0.9 - number / 10, "face") for number, box in enumerate(self.boxes)]

    def check_classes(self, classes: Sequence[str]) -> None:
        if set(classes) - set(self.classes):
            raise RequestError("ad_model_classes: unknown", field="ad_model_classes")

    def paint(self, job: Repaint) -> Image.Image | None:
        self.jobs.append(job)
        painted = job.image.copy()
        painted.putpixel((0, 0), (len(self.jobs), 0, 0))
        return painted


def one(**values: Any) -> Passes:
    return Passes((read_args({"ad_model": FACE, **values}, "args"),))


def run(seer: Seer, passes: Passes, outer: Outer = OUTER, **options: Any) -> Any:
    return ADetailer(seer, DetailerOptions(**options)).detail(Image.new("RGB", SIZE), passes, outer, seer.paint)


def test_each_mask_is_painted_on_the_picture_before() -> None:
    seer = Seer()
    result = run(seer, one())
    assert np.asarray(result.image)[0, 0].tolist() == [2, 0, 0] and result.is_changed
    assert np.asarray(seer.jobs[1].image)[0, 0].tolist() == [1, 0, 0]
    assert [job.seed for job in seer.jobs] == [100, 101] and [job.subseed for job in seer.jobs] == [7, 8]
    (report,) = result.reports
    assert (len(report.found), len(report.targets), report.painted) == (2, 2, 2)


def test_what_a_pass_takes_over_and_what_it_has_of_its_own() -> None:
    seer = Seer(BOXES[:1])
    run(seer, one(), replace(OUTER, index=1))
    (job,) = seer.jobs
    assert (job.prompt, job.negative_prompt, job.seed, job.size) == ("a woman", "dark", 101, (32, 24))
    assert (job.steps, job.cfg_scale, job.sampler, job.scheduler) == (20, 1.0, "Euler", "Simple")
    assert job.noise_multiplier is None
    own = {"ad_use_steps": True, "ad_steps": 7, "ad_use_cfg_scale": True, "ad_cfg_scale": 3.4, "ad_use_sampler": True}
    own |= {"ad_sampler": "DEIS", "ad_scheduler": "Beta", "ad_use_inpaint_width_height": True, "ad_inpaint_width": 640}
    own |= {"ad_use_noise_multiplier": True, "ad_noise_multiplier": 1.1}
    run(seer, one(**own))
    job = seer.jobs[1]
    assert (job.steps, job.cfg_scale, job.sampler, job.scheduler, job.size) == (7, 3.4, "DEIS", "Beta", (640, 512))
    assert job.noise_multiplier == 1.1
    run(seer, one(ad_use_sampler=True, ad_sampler="Use same sampler"))
    assert (seer.jobs[2].sampler, seer.jobs[2].scheduler) == ("Euler", "Simple")


def test_the_distilled_scale_is_that_of_the_job() -> None:
    seer = Seer(BOXES[:1])
    run(seer, one())
    run(seer, one(), compat="forge")
    assert [job.distilled_cfg_scale for job in seer.jobs] == [2.5, 3.5]


def test_classes_filter_on_every_model() -> None:
    seer = Seer()
    run(seer, one(ad_model_classes="face, hand ,"))
    run(seer, one(ad_model_classes="face"), compat="forge")  # which only asks models called -world
    assert seer.asked == [("face", "hand"), ()]


def test_nothing_found_leaves_the_picture() -> None:
    for seer in (Seer(()), Seer(((0.0, 0.0, 1.0, 1.0),))):
        result = run(seer, one(ad_mask_min_ratio=0.5))
        assert not result.is_changed and not seer.jobs and result.reports[0].painted == 0


def test_three_hundred_things_are_all_painted() -> None:
    seer = Seer([(float(n % 60), float(n % 40), n % 60 + 3.0, n % 40 + 3.0) for n in range(300)])
    assert run(seer, one()).reports[0].painted == 300
    assert run(seer, one(ad_mask_k=5)).reports[0].painted == 5


def test_an_interrupted_pass_leaves_the_picture_as_it_was() -> None:
    seer = Seer()
    paint = lambda job: None if seer.jobs else seer.paint(job)
    image = Image.new("RGB", SIZE)
    result = ADetailer(seer).detail(image, one(), OUTER, paint)
    assert result.image is image and not result.is_changed


def test_only_what_meets_the_mask_of_the_job_is_detailed() -> None:
    mask = Image.new("L", SIZE)
    mask.paste(255, (45, 0, 64, 48))
    seer = Seer()
    run(seer, one(), replace(OUTER, mask=mask))
    assert [job.mask.getbbox() for job in seer.jobs] == [(39, 9, 53, 33)]


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, [(32, 24), (32, 24)]),
        ({"match_size": "Free"}, [(32, 24), (16, 32)]),
        ({"match_size": "Strict (SDXL only)"}, [(1152, 896), (768, 1344)]),
        ({"match_size": "Strict (SDXL only)", "compat": "forge"}, [(32, 24), (32, 24)]),
    ],
)
def test_sizes_that_follow_the_box(options: dict[str, Any], sizes: list[tuple[int, int]]) -> None:
    seer = Seer()
    run(seer, one(), **options)
    assert [job.size for job in seer.jobs] == sizes
    run(seer, one(ad_use_inpaint_width_height=True), **options)
    assert seer.jobs[-1].size == (512, 512)


def test_one_seed_for_all() -> None:
    seer = Seer()
    run(seer, one(), same_seed=True)
    assert [job.seed for job in seer.jobs] == [100, 100]


def targets(*boxes: tuple[int, int, int, int]) -> list[Target]:
    found = []
    for box in boxes:
        mask = Image.new("L", SIZE)
        mask.paste(255, box)
        found.append(Target(box, mask))
    return found


def test_boxes_stay_with_their_masks() -> None:
    args = ADetailerArgs(ad_dilate_erode=-4)
    small_and_large = targets((4, 4, 6, 6), (10, 10, 30, 30))
    assert [each.box for each in changed(small_and_large, args)] == [(10, 10, 30, 30)]
    assert [each.box for each in changed(small_and_large, args, "forge")] == [(4, 4, 6, 6)]  # the other's


def test_a_merged_mask_has_the_box_of_all() -> None:
    args = ADetailerArgs(ad_dilate_erode=0, ad_mask_merge_invert="Merge")
    (merged,) = changed(targets((0, 0, 2, 2), (10, 10, 30, 30)), args)
    assert merged.box == (0, 0, 30, 30)
    (merged,) = changed(targets((0, 0, 2, 2), (10, 10, 30, 30)), args, "forge")
    assert merged.box == (0, 0, 2, 2)
    inverted = ADetailerArgs(ad_dilate_erode=0, ad_mask_merge_invert="Merge and Invert")
    assert changed(targets((0, 0, *SIZE)), inverted) == []  # nothing is left to paint


def test_a_mask_that_was_moved_away_is_dropped() -> None:
    args = ADetailerArgs(ad_dilate_erode=0, ad_x_offset=100)
    assert changed(targets((0, 0, 9, 9)), args) == []
    assert len(changed(targets((0, 0, 9, 9)), args, "forge")) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ad_model": "nothing.pt"}, "there is no detector 'nothing.pt'"),
        ({"ad_model_classes": "foot"}, "ad_model_classes: unknown"),
        ({"ad_restore_face": True}, "ad_restore_face: there are no face restorers.*leave it at False"),
        ({"ad_controlnet_model": "tile"}, "ad_controlnet_model: ControlNet is not run; leave it at 'None'"),
        ({"ad_use_checkpoint": True, "ad_checkpoint": "x"}, "ad_use_checkpoint: a pass is drawn with the model"),
        ({"ad_use_vae": True, "ad_vae": "x"}, "ad_use_vae: a pass is drawn with the autoencoder of the job"),
        ({"ad_use_clip_skip": True}, "ad_use_clip_skip: Flux takes no hidden layer"),
    ],
)
def test_what_cannot_run_is_told_beforehand(values: dict[str, Any], message: str) -> None:
    detailer = ADetailer(Seer())
    with pytest.raises(RequestError, match=message):
        detailer.check(one(**values))
    skipped = one(**values, ad_tab_enable=False)
    detailer.check(skipped)  # what does not run is not looked at
    assert detailer.detail(Image.new("RGB", SIZE), skipped, OUTER, Seer().paint).reports == ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ad_confidense": 1}, "ad_confidense: there is no such argument; did you mean 'ad_confidence'"),
        ({"ad_confidence": 1.1}, "ad_confidence: 1.1 is too large; give 0 to 1"),
        ({"ad_confidence": float("nan")}, "ad_confidence"),
        ({"ad_cfg_scale": float("inf")}, "ad_cfg_scale"),
        ({"ad_mask_k": -1}, "ad_mask_k"),
        ({"ad_mask_k": True}, "ad_mask_k: true and false are no numbers; give 0 or more"),
        ({"ad_confidence": False}, "ad_confidence: true and false are no numbers; give 0 to 1"),
        ({"ad_mask_blur": float("inf")}, "ad_mask_blur: inf is no whole number; give 0 to 256"),
        ({"ad_mask_blur": "four"}, "ad_mask_blur: 'four' is no whole number; give 0 to 256"),
        ({"ad_mask_min_ratio": -0.1, "ad_mask_max_ratio": 2}, "ad_mask_min_ratio.*ad_mask_max_ratio"),
        ({"ad_dilate_erode": 10**9}, "ad_dilate_erode"),
        ({"ad_inpaint_width": 0}, "ad_inpaint_width: 0 is too small; give 1 to 65,536"),
        ({"ad_steps": 10**9}, "ad_steps"),
        ({"ad_mask_filter_method": "area"}, "ad_mask_filter_method: 'area' is no choice; give Area or Confidence"),
        ({"ad_prompt": "x" * 100_001}, "ad_prompt"),
        ({"ad_model": None}, "ad_model"),
        ({"ad_tab_enable": "perhaps"}, "ad_tab_enable"),
        ({"x" * 5000: 1}, "xxx: there is no such argument; there are ad_model, .* and [0-9]+ more"),
    ],
)
def test_bounds(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=rf"somewhere\..*{message}") as caught:
        read_args(values, "somewhere")
    assert caught.value.field == f"somewhere.{next(iter(values))[:80]}" and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("name", "given", "read"),
    [
        ("ad_mask_blur", 4.9, 4),
        ("ad_mask_blur", "6", 6),
        ("ad_dilate_erode", -4.9, -4),
        ("ad_confidence", "0.4", 0.4),
        ("ad_prompt", 5, "5"),
        ("ad_tab_enable", "no", False),
    ],
)
def test_spellings(name: str, given: Any, read: Any) -> None:
    assert getattr(read_args({name: given}, "args"), name) == read


def test_forms_of_several_passes(caplog: pytest.LogCaptureFixture) -> None:
    face, hand, wrong = {"ad_model": FACE}, {"ad_model": "hand_yolov8n.pt"}, {"ad_model": FACE, "ad_steps": 0}

    def names(args: list[Any], compat: Compat = "fixed") -> list[str]:
        return [each.ad_model for each in read_passes(args, compat).active]

    assert (
        names([face, hand]) == names([True, face, hand]) == names([True, False, face, hand]) == [FACE, hand["ad_model"]]
    )
    assert names([False, face]) == names([]) == names([True, False]) == []
    assert names([True, {"ad_model": "None"}, hand]) == [hand["ad_model"]]
    assert read_passes([True, True, face]).skip_img2img and not read_passes([True, face]).skip_img2img
    for args in ([True, False, "face"], [None, face], [3], [face] * 17):
        with pytest.raises(RequestError, match="give two booleans at most, then up to 16 objects"):
            read_passes(args)
    with pytest.raises(RequestError, match=r"ADetailer.args\[2\].ad_steps: "):
        read_passes([True, False, wrong, hand])
    with caplog.at_level(logging.WARNING):
        assert names([True, False, wrong, hand, None], "forge") == [hand["ad_model"]]
    assert "ad_steps" in caplog.text and "left out" in caplog.text


def test_the_service_has_defaults_of_its_own() -> None:
    faces, hands = service_passes().passes
    for args, expected in ((faces, FACES), (hands, HANDS)):
        assert {name: getattr(args, name) for name in expected} == expected
        assert (args.ad_inpaint_width, args.ad_use_inpaint_width_height, args.ad_use_sampler) == (1024, False, False)
    assert (faces.ad_denoising_strength, faces.ad_steps, hands.ad_confidence, hands.ad_mask_blur) == (0.04, 40, 0.28, 8)


def test_arguments_of_the_service() -> None:
    passes = service_passes('{"ad_steps": 9}', {"ad_disable": True}, faces_prompt="a face", hands_prompt="a hand")
    (faces,) = passes.passes
    assert (faces.ad_steps, faces.ad_cfg_scale, faces.ad_prompt) == (9, 3.4, "a face")
    (faces, _) = service_passes(json.dumps({"ad_prompt": "own", "ad_disable": False}), "", faces_prompt="a face").passes
    assert faces.ad_prompt == "own"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{", "adetailer_args_hands: it is no JSON"),
        ("[]", "adetailer_args_hands: it is no JSON object"),
        ("3", "it is no JSON object"),
        ("[" * 100_000, "it is no JSON"),
        ('{"ad_steps": 0}', "adetailer_args_hands.ad_steps: "),
        ('{"ad_disable": "yes"}', "adetailer_args_hands: ad_disable"),
    ],
)
def test_arguments_of_the_service_that_are_wrong(given: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        service_passes("{}", given)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"ad_steps": 5}, "adetailer_args[0].ad_steps had no effect without ad_use_steps"),
        (
            {"ad_scheduler": "Beta", "ad_sampler": "Euler"},
            "ad_sampler, ad_scheduler had no effect without ad_use_sampler",
        ),
        ({"ad_inpaint_width": 768}, "ad_inpaint_width had no effect without ad_use_inpaint_width_height"),
        ({"ad_noise_multiplier": 1.2}, "ad_noise_multiplier had no effect without ad_use_noise_multiplier"),
        ({"ad_mask_min_ratio": 0.9, "ad_mask_max_ratio": 0.1}, "ad_mask_min_ratio is above ad_mask_max_ratio"),
        ({"ad_steps": 5, "ad_use_steps": True}, None),
        ({"ad_steps": 5, "ad_use_steps": False}, None),  # a whole form, whose switch was meant
        ({"ad_steps": 28, "ad_cfg_scale": 7.0}, None),
        ({"ad_steps": 5, "ad_tab_enable": False}, None),
    ],
)
def test_arguments_in_vain_are_told(values: dict[str, Any], told: str | None) -> None:
    said = idle_arguments(read_passes([{"ad_model": FACE, **values}], field="adetailer_args"))
    assert len(said) == (told is not None) and (told or "") in "".join(said)


def test_the_services_own_defaults_ask_nothing_in_vain() -> None:
    assert idle_arguments(service_passes()) == []
    assert idle_arguments(service_passes({"ad_sampler": "Eulr"})) == [
        "adetailer_args.ad_sampler had no effect without ad_use_sampler"
    ]


def test_prompts() -> None:
    assert prompts_of("", ("main",), 0, "") == ("main",)
    assert prompts_of("a [SEP]  [SEP][PROMPT]!", ("x", "y"), 3, "") == ("a", "y", "y!")
    assert prompts_of("[prompt]", ("x",), 0, "") == ("[prompt]",)  # in capitals only
    assert is_skipped(" [SKIP]\n") and not is_skipped("[SKIP] x") and not is_skipped("")


def test_prompts_of_masks_and_masks_that_are_skipped() -> None:
    seer = Seer()
    run(seer, one(ad_prompt="[SKIP][SEP]an eye of [PROMPT]", ad_negative_prompt="bad"))
    (job,) = seer.jobs
    assert (job.prompt, job.negative_prompt, job.seed) == ("an eye of a man", "bad", 101)


def test_infotext_counts_passes() -> None:
    skipped, face = ADetailerArgs(), read_args({"ad_model": FACE}, "args")
    entries = detailer_infotext(Passes((face, skipped, face)))
    assert "ADetailer model" in entries and "ADetailer model 3rd" in entries and "ADetailer model 2nd" not in entries
    assert list(entries)[-1] == "ADetailer version"
    assert detailer_infotext(Passes((skipped,))) == detailer_infotext(Passes(())) == {}
    suffixes = [next(iter(infotext_of(face, number))).rpartition(" ")[2] for number in (3, 10, 11, 20, 21)]
    assert suffixes == ["4th", "11th", "12th", "21st", "22nd"]


def test_what_was_found_can_be_drawn() -> None:
    seer = Seer()
    image = Image.new("RGB", SIZE, "white")
    found, those = ADetailer(seer).find_targets(image, one().passes[0])
    assert np.asarray(drawn(image, found, those))[4, 10].tolist() == [0, 255, 0]  # the side of a box
    tinted = np.asarray(drawn(image, [], those))
    assert tinted[12, 12].tolist() == [255, 128, 128] and tinted[46, 62].tolist() == [255, 255, 255]
