"""The recipe of the embedded model family, and the files that it made."""

from __future__ import annotations

import string
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightweight_engine.backend.fused import heads
from lightweight_engine.backend.model_files import open_model
from lightweight_engine.core.models import ModelLibrary
from lightweight_engine.extensions.detectors import DetectorLibrary
from lightweight_engine.extensions.yolov8 import YOLOv8
from lightweight_engine.flux.lora_files import read_lora
from lightweight_engine.flux.params import FluxParams
from lightweight_engine.flux.schedules import make_sigmas
from tools.tiny import detector, train_autoencoder, train_detector, train_flow, train_texts, upscaler
from tools.tiny.captions import FRAMES, UNSEEN_FRAMES, VISIBLE, caption
from tools.tiny.classifier import EXTRAS_WEIGHTS, WITH_EXTRAS, Classifier, attributes_in, load_classifier, resized
from tools.tiny.data import KINDS, T5_KEPT, labels_of
from tools.tiny.detector_accuracy import average_precision, found_by
from tools.tiny.draw import SIZES, draw, empty_drawing, training_drawing
from tools.tiny.evaluate import score, shuffled, unseen_prompts
from tools.tiny.figure import BACKGROUND, SHIRT
from tools.tiny.files import CLIP, FLUX, PLACES, T5, TINY, load, save
from tools.tiny.fused import heads as compiled_heads
from tools.tiny.lora import DIALECTS, attach, frozen_copy, save_lora, shapes_of, with_loras
from tools.tiny.lora_effect import DARK, backdrop_light
from tools.tiny.pen import Pen
from tools.tiny.people import ATTRIBUTES, Person, random_person, values
from tools.tiny.sampling import Family, euler, simple_sigmas
from tools.tiny.tokens import CLIP_LENGTH, Tokens
from tools.tiny.train_upscaler import made_small
from tools.tiny.training import Course, Trainer
from tools.tiny.upscaler_gain import decibels, upscaled

PERSON = Person("long", "red", "light", "green", "smiling", "round", "one", "blue")


# --- drawings and captions ---------------------------------------------------------------------------------------


def test_a_drawing_is_fixed_by_its_seed_and_number() -> None:
    first, again, other = (training_drawing(3, number, (128, 128)) for number in (5, 5, 6))
    assert first.person == again.person and first.image.tobytes() == again.image.tobytes()
    assert first.image.tobytes() != other.image.tobytes()


@pytest.mark.parametrize("size", SIZES)
def test_drawings_have_the_size_asked_for_and_it_fits_the_latents(size: tuple[int, int]) -> None:
    assert training_drawing(0, 0, size).image.size == size
    assert size[0] % 16 == 0 and size[1] % 16 == 0


def test_colours_are_where_they_belong() -> None:
    pixels = np.asarray(draw(PERSON, 256, 256, np.random.default_rng(1))).astype(int)
    assert np.abs(pixels[:4, :4].mean((0, 1)) - BACKGROUND["blue"]).max() < 60
    shirt = np.abs(pixels - np.array(SHIRT["green"])).max(-1) < 30
    assert shirt[200:].mean() > 0.1 > shirt[:80].mean()


def test_training_never_draws_a_combination_that_is_held_out() -> None:
    rng = np.random.default_rng(0)
    assert not any(random_person(rng, held_out=False).held_out for _ in range(200))
    assert all(random_person(rng, held_out=True).held_out for _ in range(50))


def test_marks_are_where_faces_and_hands_are() -> None:
    for number in range(30):
        drawing = training_drawing(2, number, (256, 192))
        found = {what: [mark for mark in drawing.marks if mark.what == what] for what in KINDS}
        assert len(found["face"]) == (drawing.view != "hand")
        if drawing.view == "bust":
            assert drawing.person and len(found["hand"]) == ("none", "one", "two").index(drawing.person.hands)
        for _, left, top, right, bottom in drawing.marks:
            assert 0 <= left < right <= 256 and 0 <= top < bottom <= 192


def test_a_mark_follows_turns_and_mirrors() -> None:
    pen = Pen(100, 100).frame(50, 40, 10, angle=90, mirror=True)
    pen.mark("thing", [(1, 0), (3, 1)], margin=0.5)
    assert pen.marks[0] == pytest.approx(("thing", 35, 5, 55, 35))


def test_extras_change_the_picture_and_not_the_person() -> None:
    plain, hat, night = (training_drawing(4, 9, (192, 192), extras=e) for e in ((), ("hat",), ("night",)))
    assert plain.person == hat.person == night.person and plain.marks == hat.marks == night.marks
    pixels = [np.asarray(drawing.image).astype(int) for drawing in (plain, hat, night)]
    assert np.abs(pixels[0] - pixels[1])[100:].max() == 0 < np.abs(pixels[0] - pixels[1])[:60].max()
    assert backdrop_light(night.image) < DARK < backdrop_light(plain.image)
    assert labels_of(plain)[-2:] == [0, 0] and labels_of(hat)[-2:] == [1, 0] and labels_of(night)[-2:] == [0, 1]


def test_pictures_of_nobody_have_no_marks_and_no_labels() -> None:
    drawing = empty_drawing(0, 3, (128, 128))
    assert drawing.person is None and not drawing.marks and set(labels_of(drawing)) == {-1}
    assert drawing.image.tobytes() == empty_drawing(0, 3, (128, 128)).image.tobytes()


def test_a_caption_names_only_what_is_there_and_what_can_be_seen() -> None:
    rng = np.random.default_rng(2)
    for i in range(300):
        person, view = random_person(rng, held_out=None), ("bust", "face", "hand")[i % 3]
        made = caption(person, rng, view)
        assert made.text and all(person.attributes[name] == value for name, value in made.named.items())
        visible = {*VISIBLE[view], *(("hair_style", "hair_color") if "hair" in VISIBLE[view] else ())}
        assert set(made.named) <= visible


def test_evaluation_asks_in_sentences_and_for_combinations_that_training_never_had() -> None:
    assert not set(FRAMES) & set(UNSEEN_FRAMES)
    prompts = unseen_prompts(40, seed=5)
    assert len({prompt.text for prompt in prompts}) == 40 and all(len(prompt.named) >= 3 for prompt in prompts)
    assert [p.text for p in unseen_prompts(40, seed=5)] == [p.text for p in prompts]


# --- tokenizers --------------------------------------------------------------------------------------------------


def test_every_printable_character_is_known_and_case_does_not_matter() -> None:
    tokens = Tokens.shipped()
    for text in (string.printable, "Red HAIR, (blue shirt)!"):
        assert 2 not in tokens.t5.encode(text)
        assert tokens.t5.encode(text) == tokens.t5.encode(text.lower())
        assert tokens.clip.encode(text) == tokens.clip.encode(text.lower())
    assert max(tokens.t5.encode(string.printable)) < T5.vocab_size
    assert tokens.clip.end_id == CLIP.vocab_size - 1


def test_words_of_captions_are_single_tokens() -> None:
    tokens = Tokens.shipped()
    assert len(tokens.t5.encode("a smiling woman with long red hair,round glasses")) == 10
    assert len(tokens.clip.encode("a smiling woman with long red hair,round glasses")) == 10


def test_ids_are_framed_as_the_engine_frames_them() -> None:
    tokens = Tokens.shipped()
    clip, t5 = tokens.clip_ids("red hair"), tokens.t5_ids("red hair")
    assert len(clip) == CLIP_LENGTH and clip[0] == tokens.clip.start_id and clip[3:] == [tokens.clip.end_id] * 74
    assert len(t5) == 256 and t5[2] == 1 and t5[3:] == [0] * 253
    with pytest.raises(ValueError, match="do not fit"):
        tokens.t5_ids("red " * 200, T5_KEPT)


# --- training ----------------------------------------------------------------------------------------------------


def test_the_learning_rate_rises_then_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("tools.tiny.training.time.monotonic", lambda: now[0])
    course = Course(100, lr=1.0, warmup=0.1, lowest=0.01)
    rates = []
    for now[0] in (0.0, 5.0, 10.0, 50.0, 100.0):
        rates.append(round(course.rate(), 3))
    assert rates[:3] == [0.02, 0.5, 1.0] and rates[2] > rates[3] > rates[4] == 0.01


def test_a_trainer_lowers_the_loss_and_leaves_averaged_float32_weights() -> None:
    torch.manual_seed(0)
    network, x = torch.nn.Linear(4, 1), torch.randn(64, 4)
    target = (x @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]])).bfloat16()
    trainer = Trainer([network], Course(1e9, lr=5e-2, warmup=1e-12))
    for _ in range(200):
        trainer.step(torch.nn.functional.mse_loss(network(x.bfloat16()).float(), target.float()))
    trainer.use_averages()
    assert network.weight.dtype == torch.float32 and not network.weight.requires_grad
    assert torch.nn.functional.mse_loss(network(x), target.float()) < 0.5


def test_edges_weigh_more_and_weights_have_mean_one() -> None:
    pixels = torch.zeros(1, 3, 32, 32)
    pixels[..., 16:] = 1
    weight = train_autoencoder.near_edges(pixels)
    assert float(weight.mean()) == pytest.approx(1, abs=1e-5)
    assert weight[0, 0, 8, 16] > 2 * weight[0, 0, 8, 2]


def test_sigmas_cover_the_range_and_lean_to_where_sampling_spends_its_steps() -> None:
    sigmas = train_flow.random_sigmas(4000, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert 0 < float(sigmas.min()) < 0.05 and 0.95 < float(sigmas.max()) <= 1
    assert 0.58 < float(sigmas.mean()) < 0.75


def test_empty_rows_become_the_empty_prompt() -> None:
    tokens = Tokens.shipped()
    clip = torch.tensor([tokens.clip_ids("red hair")] * 2)
    t5 = torch.tensor([tokens.t5_ids("red hair", T5_KEPT)] * 2)
    clip_out, t5_out = train_flow.without_text(clip, t5, torch.tensor([False, True]))
    assert clip_out.tolist() == [tokens.clip_ids("red hair"), tokens.clip_ids("")]
    assert t5_out.tolist() == [tokens.t5_ids("red hair", T5_KEPT), tokens.t5_ids("", T5_KEPT)]


def test_text_examples_say_what_is_named() -> None:
    clip, t5, named = train_texts.examples(20, np.random.default_rng(0), FRAMES, False)
    assert clip.shape == (20, 77) and t5.shape == (20, T5_KEPT) and named.shape == (20, len(ATTRIBUTES))
    assert (named >= 0).all() and (named <= torch.tensor([len(values(name)) for name in ATTRIBUTES])).all()


def test_the_compiled_twin_of_norm_and_rotation_is_equal() -> None:
    torch.manual_seed(0)
    streams = [(torch.randn(2, tokens, 3 * 4 * 8), torch.rand(8), torch.rand(8)) for tokens in (2, 4)]
    rotary = torch.polar(torch.ones(6, 4), torch.rand(6, 4) * 6)
    twin = compiled_heads(streams, torch.view_as_real(rotary))
    for a, b in zip(heads(streams, rotary), twin, strict=True):
        torch.testing.assert_close(a, b)


# --- LoRAs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dialect", "modules"), [("kohya", 38), ("diffusers", 54)])
def test_factors_survive_saving_in_a_dialect_and_act_by_their_strength(
    dialect: str, modules: int, tmp_path: Path
) -> None:
    base, trained = load("transformer", TINY), load("transformer", TINY)
    kind, path = DIALECTS[dialect], tmp_path / "lora.safetensors"
    factors = attach(trained, kind.targets(FLUX), 2, seed=1)  # type: ignore[arg-type]
    torch.manual_seed(0)
    for value in (value for low_rank in factors.values() for value in low_rank.parameters()):
        value.data = (0.05 * torch.randn_like(value)).bfloat16().float()
    save_lora(path, kind, kind.targets(FLUX), factors, description="a test")
    report = read_lora(open_model(path), {"transformer": shapes_of(base)}).report  # type: ignore[arg-type]
    assert (report.found, report.applied, report.ignored) == (modules, modules, ())
    full, half = (with_loras(base, {path: strength}).state_dict() for strength in (1.0, 0.5))  # type: ignore[arg-type]
    for name, wanted in frozen_copy(trained).state_dict().items():  # type: ignore[arg-type]
        torch.testing.assert_close(full[name], wanted)
        torch.testing.assert_close(half[name], (wanted + base.state_dict()[name]) / 2)


def test_new_factors_change_nothing() -> None:
    base, trained = load("transformer", TINY), load("transformer", TINY)
    attach(trained, DIALECTS["diffusers"].targets(FLUX), 4, seed=1)  # type: ignore[arg-type]
    same = zip(base.parameters(), frozen_copy(trained).parameters(), strict=True)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in same)


# --- upscaler and detectors --------------------------------------------------------------------------------------


def test_the_upscaler_beats_lanczos_on_drawings_it_never_saw() -> None:
    network = upscaler.load_upscaler()
    for number in range(3):
        wanted = training_drawing(900, number, (256, 256), held_out=True).image
        small = wanted.resize((64, 64), Image.Resampling.LANCZOS)
        plain = small.resize((256, 256), Image.Resampling.LANCZOS)
        assert decibels(upscaled(network, small), wanted) > decibels(plain, wanted) + 1


def test_readers_take_the_upscaler_for_an_esrgan() -> None:
    spandrel = pytest.importorskip("spandrel")
    read = spandrel.ModelLoader().load_from_file(str(upscaler.WEIGHTS))
    pixels = torch.rand(1, 3, 12, 20)
    assert read.architecture.id == "ESRGAN" and read.scale == upscaler.SCALE
    with torch.no_grad():
        torch.testing.assert_close(read.model.float()(pixels), upscaler.load_upscaler()(pixels))


def test_pictures_are_made_four_times_smaller_whatever_the_way() -> None:
    torch.manual_seed(0)
    for _ in range(6):
        small = made_small(torch.rand(2, 3, 64, 64))
        assert small.shape == (2, 3, 16, 16) and float(small.min()) >= 0 and float(small.max()) <= 1


def test_overlaps_and_their_complete_form() -> None:
    box = torch.tensor([0.0, 0, 10, 10])
    others = torch.tensor([[0.0, 0, 10, 10], [0, 0, 5, 10], [20, 20, 30, 30]])
    assert detector.overlaps(box, others).tolist() == pytest.approx([1, 0.5, 0], abs=1e-5)
    whole = detector.complete_overlaps(others, box.expand(3, 4))
    assert float(whole[0]) == pytest.approx(1, abs=1e-5) and whole[1] < 0.5 and whole[2] < 0


def test_points_are_assigned_to_the_boxes_that_they_agree_with() -> None:
    points = torch.tensor([[x + 0.5, 5.0] for x in range(40)])
    truth = torch.tensor([[[0.0, 0, 20, 10], [20, 0, 40, 10], [0, 0, 0, 0]]])
    boxes = truth[0, (points[:, 0] > 20).long()][None]
    scores = torch.rand(1, 40, generator=torch.Generator().manual_seed(0))
    wanted = detector.assign(scores, boxes, points, truth, torch.tensor([[True, False, False]]))
    hits = (wanted.scores[0] > 0).nonzero().flatten()
    assert len(hits) == detector.TOP and int(hits.max()) < 20  # the second box is not there
    assert set(hits.tolist()) == set(scores[0, :20].topk(detector.TOP).indices.tolist())
    assert float(wanted.scores.max()) == pytest.approx(1, abs=1e-4) and (wanted.boxes[0, hits] == truth[0, 0]).all()


def test_the_loss_of_bins_is_least_where_the_expectation_is_right() -> None:
    wanted = torch.tensor([[2.25, 3.0, 7.5, 0.0]])
    logits = torch.full((1, 4, 16), -20.0)
    for side, (low, share) in enumerate(((2, 0.25), (3, 0.0), (7, 0.5), (0, 0.0))):
        logits[0, side, low], logits[0, side, low + 1] = np.log(1 - share), np.log(max(share, 1e-9))
    right = detector.bins_loss(logits.flatten(1), wanted)
    assert (
        right < detector.bins_loss(logits.flatten(1), wanted + 0.2) < detector.bins_loss(logits.flatten(1), wanted + 2)
    )


def test_boxes_go_where_their_pictures_go() -> None:
    torch.manual_seed(3)
    pixels, boxes = torch.zeros(6, 3, 128, 192), torch.tensor([[[60.0, 30, 110, 80]]]).repeat(6, 1, 1)
    pixels[..., 30:80, 60:110] = 1
    out, moved = train_detector.placed(pixels, boxes)
    inside, there = train_detector.cut(moved)
    for picture, box, seen in zip(out, inside[:, 0], there[:, 0], strict=True):
        rows, columns = (picture[0] > 0.7).nonzero().T if seen else (torch.zeros(1), torch.zeros(1))
        found = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert not seen or (found - box).abs().max() < 1.6


def test_a_detector_learns_one_picture() -> None:
    torch.manual_seed(0)
    network = YOLOv8(detector.SIZES)
    pixels, truth = torch.zeros(2, 3, 64, 64), torch.tensor([[[8.0, 16, 40, 56]], [[0, 0, 0, 0]]])
    pixels[0, :, 16:56, 8:40] = 1
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(40):
        loss, _ = detector.loss_of(network, network(pixels), truth, torch.tensor([[True], [False]]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    best = network.decode(network(pixels))[0].detach().T
    x, y, width, height = best[best[:, 4].argmax(), :4].tolist()
    found = torch.tensor([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    assert float(detector.overlaps(found, truth[0, 0])) > 0.8


def test_a_picture_without_boxes_has_a_loss_too() -> None:
    network = YOLOv8(detector.SIZES)
    loss, parts = detector.loss_of(
        network, network(torch.rand(1, 3, 64, 64)), torch.zeros(1, 3, 4), torch.zeros(1, 3) > 0
    )
    loss.backward()
    assert torch.isfinite(loss) and float(parts["box"].detach()) == 0


def test_average_precision_falls_with_misses_and_false_alarms() -> None:
    truth = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10]])
    wrong = torch.tensor([[50.0, 0, 60, 10]])
    sure = torch.tensor([0.9, 0.8, 0.7])
    assert average_precision([(truth, sure[:2], truth)]) == 1
    assert average_precision([(truth[:1], sure[:1], truth)]) == 0.5
    assert average_precision([(torch.cat((wrong, truth)), sure, truth)]) == pytest.approx(2 / 3)
    assert average_precision([(truth[[0, 0]], sure[:2], truth)]) == 0.5  # a box found twice counts once
    assert average_precision([(truth[:0], sure[:0], truth)]) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_detectors_find_what_was_drawn(kind: str) -> None:
    library = DetectorLibrary([TINY])
    assert set(library.names()) == {f"{name}_tiny.safetensors" for name in KINDS}
    found_in = partial(found_by, library.find(f"{kind}_tiny"))
    hits, boxes, true = 0, 0, 0
    for number in range(12):
        drawing = training_drawing(901, number, (256, 256), held_out=True)
        wanted = torch.tensor([mark[1:] for mark in drawing.marks if mark.what == kind]).view(-1, 4)
        found, _ = found_in(drawing.image)
        hits += int((detector.overlaps(wanted[:, None], found[None]) > 0.5).any(1).sum())
        boxes, true = boxes + len(found), true + len(wanted)
    assert hits >= 0.8 * true and hits >= 0.8 * boxes
    assert sum(len(found_in(empty_drawing(901, n, (256, 256)).image)[1]) for n in range(12)) <= 1


# --- evaluation --------------------------------------------------------------------------------------------------


def test_scores_count_named_attributes_only() -> None:
    found = [{"hair_color": "red", "shirt": "green"}, {"hair_color": "blue", "shirt": "white"}]
    report = score([{"hair_color": "red"}, {"hair_color": "red", "shirt": "white"}], found)
    assert report["all"] == pytest.approx(0.6667, abs=1e-4) and report["named"] == 3
    assert report["attributes"]["hair_color"] == {"named": 2, "found": 0.5}


def test_shuffling_leaves_nothing_in_its_place() -> None:
    items = [{"n": i} for i in range(30)]
    turned = shuffled(items, seed=1)
    assert turned != items and not any(a is b for a, b in zip(items, turned, strict=True))
    assert sorted(x["n"] for x in turned) == list(range(30))


def test_the_classifier_judges_pictures_of_any_size() -> None:
    assert resized(torch.rand(1, 3, 192, 320)).shape[-2:] == (160, 160)
    pictures = [draw(PERSON, width, height, np.random.default_rng(0)) for width, height in ((128, 128), (192, 320))]
    found = attributes_in(Classifier().eval(), pictures)
    assert len(found) == 2 and all(row[name] in values(name) for row in found for name in ATTRIBUTES)


def test_the_second_classifier_sees_hats_and_nights() -> None:
    network = load_classifier(EXTRAS_WEIGHTS)
    assert list(network.told) == list(WITH_EXTRAS)
    choices = [(), ("hat",), ("night",), ("hat", "night")]
    found = attributes_in(network, [draw(PERSON, 192, 192, np.random.default_rng(7), extras=e) for e in choices])
    assert [(row["hat"], row["night"]) for row in found] == [("no", "no"), ("yes", "no"), ("no", "yes"), ("yes", "yes")]


@pytest.mark.parametrize("steps", [1, 7, 20])
def test_the_training_loop_samples_on_the_engines_simple_schedule(steps: int) -> None:
    assert simple_sigmas(steps) == pytest.approx(make_sigmas("Simple", steps, mu=1.15), abs=1e-6)


# --- the files that ship -----------------------------------------------------------------------------------------


def test_a_network_survives_saving_and_reading(tmp_path: pytest.TempPathFactory) -> None:
    network = load("t5", TINY)
    save("t5", network, tmp_path)  # type: ignore[arg-type]
    again = load("t5", tmp_path)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))


def test_the_family_is_complete_small_and_found_by_the_engine() -> None:
    files = [path for path in TINY.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 32_000_000
    assert all((TINY / place).is_file() for place in PLACES.values())
    models = ModelLibrary([TINY]).choose()
    assert models.is_tiny and set(models.parts) == {"transformer", "t5", "clip", "autoencoder"}
    params = FluxParams.from_shapes(models.parts["transformer"].shapes, models.parts["transformer"].hints)
    assert params.guidance_embed and params.head_dim == 32 and params.hidden_size % 256 == 0


@pytest.mark.parametrize(("name", "modules"), [("night", 38), ("hat", 54)])
def test_the_loras_fit_the_transformer_to_the_last_tensor(name: str, modules: int) -> None:
    shapes = shapes_of(load("transformer", TINY))  # type: ignore[arg-type]
    path = TINY / "Lora" / f"{name}.safetensors"
    report = read_lora(open_model(path), {"transformer": shapes}).report
    assert (report.found, report.applied, report.ignored, report.notes) == (modules, modules, (), ())
    assert path.stat().st_size <= 600_000


def test_each_lora_does_its_part_on_one_prompt() -> None:
    family, classifier = Family.load(), load_classifier(EXTRAS_WEIGHTS)
    prompts, seen = ["a smiling woman with long red hair, green shirt, yellow background"], {}
    for name in ("", "night", "hat"):
        loras = {TINY / "Lora" / f"{name}.safetensors": 1.0} if name else {}
        changed = replace(family, transformer=with_loras(family.transformer, loras))
        image = euler(changed, prompts, steps=8, guidance=3.5, seed=4)[0]
        seen[name] = (attributes_in(classifier, [image])[0]["hat"], backdrop_light(image) < DARK)
    assert seen == {"": ("no", False), "night": ("no", True), "hat": ("yes", False)}


def test_guidance_and_prompt_change_the_picture() -> None:
    family = Family.load()
    options = {"width": 128, "height": 128, "steps": 2, "seed": 3}
    plain, guided = (np.asarray(euler(family, ["red hair"], guidance=g, **options)[0]).astype(int) for g in (1.0, 5.0))
    other = np.asarray(euler(family, ["blue hair"], guidance=5.0, **options)[0]).astype(int)
    assert np.abs(plain - guided).mean() > 1 and np.abs(guided - other).mean() > 1
