"""The recipe of the embedded model family, and the files that it made."""

from __future__ import annotations

import string

import numpy as np
import pytest
import torch

from lightweight_engine.core.models import ModelLibrary
from lightweight_engine.flux.params import FluxParams
from lightweight_engine.flux.schedules import make_sigmas
from lightweight_engine.flux.transformer import QKNorm
from tools.tiny import train_autoencoder, train_flow, train_texts
from tools.tiny.captions import FRAMES, UNSEEN_FRAMES, VISIBLE, caption
from tools.tiny.classifier import Classifier, attributes_in, resized
from tools.tiny.data import T5_KEPT
from tools.tiny.draw import SIZES, draw, training_drawing
from tools.tiny.evaluate import score, shuffled, unseen_prompts
from tools.tiny.figure import BACKGROUND, SHIRT
from tools.tiny.files import CLIP, PLACES, T5, TINY, load, save
from tools.tiny.fused import qk_norm_rotate
from tools.tiny.people import ATTRIBUTES, Person, random_person, values
from tools.tiny.sampling import Family, euler, simple_sigmas
from tools.tiny.tokens import CLIP_LENGTH, Tokens
from tools.tiny.training import Course, Trainer

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
    norm, qkv = QKNorm(8), torch.randn(2, 6, 3 * 4 * 8)
    rotary = torch.polar(torch.ones(6, 4), torch.rand(6, 4) * 6)
    twin = qk_norm_rotate(qkv, norm.query_norm.scale, norm.key_norm.scale, torch.view_as_real(rotary))
    for a, b in zip(norm(qkv, rotary), twin, strict=True):
        torch.testing.assert_close(a, b)


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
    assert sum(path.stat().st_size for path in files) <= 24_000_000
    assert all((TINY / place).is_file() for place in PLACES.values())
    models = ModelLibrary([TINY]).choose()
    assert models.is_tiny and set(models.parts) == {"transformer", "t5", "clip", "autoencoder"}
    params = FluxParams.from_shapes(models.parts["transformer"].shapes, models.parts["transformer"].hints)
    assert params.guidance_embed and params.head_dim == 32 and params.hidden_size % 256 == 0


def test_guidance_and_prompt_change_the_picture() -> None:
    family = Family.load()
    options = {"width": 128, "height": 128, "steps": 2, "seed": 3}
    plain, guided = (np.asarray(euler(family, ["red hair"], guidance=g, **options)[0]).astype(int) for g in (1.0, 5.0))
    other = np.asarray(euler(family, ["blue hair"], guidance=5.0, **options)[0]).astype(int)
    assert np.abs(plain - guided).mean() > 1 and np.abs(guided - other).mean() > 1
