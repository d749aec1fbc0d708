"""The picture's text: order of keys, quoting, reading back, and what a hostile text may not do."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from lightweight_engine.core.infotext import (
    GenerationFacts,
    HiresFacts,
    ImageFacts,
    InfotextOptions,
    build_parameters,
    format_infotext,
    infotext,
    quote,
    sampler_parameters,
)
from lightweight_engine.core.infotext_parse import _PAIR, parse_infotext, request_fields, unquote
from lightweight_engine.errors import RequestError
from lightweight_engine.request import GenerationRequest

FACTS = GenerationFacts(
    prompt="a cat",
    steps=4,
    sampler="Euler",
    scheduler="Simple",
    cfg_scale=1.0,
    distilled_cfg_scale=3.5,
    seed=42,
    width=64,
    height=48,
    model_name="flux_dev_a.safetensors",
    model_hash="0000000000",
    rng="CPU",
    version="f2.0.1v1.10.1-<none>",
)


def test_the_plain_text() -> None:
    assert infotext(FACTS) == (
        "a cat\nSteps: 4, Sampler: Euler, Schedule type: Simple, CFG scale: 1.0, Distilled CFG Scale: 3.5, Seed: 42, "
        "Size: 64x48, Model hash: 0000000000, Model: flux_dev_a.safetensors, RNG: CPU, Version: f2.0.1v1.10.1-<none>"
    )


def test_what_sampler_and_prompt_add_comes_before_the_version() -> None:
    options = sampler_parameters(GenerationRequest(), "Beta")
    assert infotext(replace(FACTS, sampler_options=options)).endswith(
        "RNG: CPU, Beta schedule alpha: 0.6, Beta schedule beta: 0.6, Version: f2.0.1v1.10.1-<none>"
    )
    assert infotext(replace(FACTS, emphasis="None")).endswith("RNG: CPU, Emphasis: None, Version: f2.0.1v1.10.1-<none>")


def test_image_to_image_keeps_the_strength_in_its_place() -> None:
    facts = replace(FACTS, image=ImageFacts(denoising_strength=0.3))
    assert "Model: flux_dev_a.safetensors, Denoising strength: 0.3, RNG: CPU, Version" in infotext(facts)


def test_inpainting_names_only_what_differs() -> None:
    image = ImageFacts(
        denoising_strength=0.5, masked=True, mask_inverted=True, mask_blur=4, only_masked=True, masked_padding=32,
        masked_content=2, noise_multiplier=0.9,
    )  # fmt: skip
    assert (
        "Mask mode: Inpaint not masked, Mask blur: 4, Inpaint area: Only masked, Masked area padding: 32, "
        "Masked content: latent noise, Noise multiplier: 0.9, Version"
    ) in infotext(replace(FACTS, image=image))
    plain = infotext(replace(FACTS, image=ImageFacts(denoising_strength=0.5, masked=True)))
    assert "Mask" not in plain
    assert "Inpaint" not in plain


def test_hires_names_only_what_differs_from_the_first_pass() -> None:
    hires = HiresFacts(
        denoising_strength=0.5, sampler="Euler", prompt="a cat", negative_prompt="neg: x", scheduler="Beta",
        resize=(1024, 1536), steps=10, upscaler="Latent (nearest-exact)", modules=("dir/ae.safetensors", "clip_l.pt"),
    )  # fmt: skip
    assert (
        "Denoising strength: 0.5, RNG: CPU, Hires Module 1: ae, Hires Module 2: clip_l, "
        'Hires negative prompt: "neg: x", Hires CFG Scale: 1.0, Hires Distilled CFG Scale: 3.5, '
        "Hires schedule type: Beta, Hires resize: 1024x1536, Hires steps: 10, "
        "Hires upscaler: Latent (nearest-exact), Version"
    ) in infotext(replace(FACTS, hires=hires))


@pytest.mark.parametrize(("modules", "said"), [(None, False), ((), True)])
def test_no_hires_modules_are_built_in_ones(modules: tuple[str, ...] | None, said: bool) -> None:
    text = infotext(replace(FACTS, hires=HiresFacts(denoising_strength=0.5, modules=modules)))
    assert ("Hires Module 1: Built-in" in text) is said


def test_variation_resize_and_the_rest_of_the_table() -> None:
    facts = replace(
        FACTS, subseed=6, subseed_strength=0.1, seed_resize_from=(512, 768), clip_skip=2, ensd=31337, tiling=True,
        loras={"a:b,c": "0123"}, user="me", low_bits="bnb-nf4", modules=("x/ae.safetensors",),
    )  # fmt: skip
    assert infotext(facts, InfotextOptions(add_user_name=True)).endswith(
        "Variation seed: 6, Variation seed strength: 0.1, Seed resize from: 512x768, Clip skip: 2, ENSD: 31337, "
        'RNG: CPU, Tiling: True, Lora hashes: "abc: 0123", Version: f2.0.1v1.10.1-<none>, User: me, '
        "Diffusion in Low Bits: bnb-nf4, Module 1: ae"
    )


def test_options_leave_facts_out() -> None:
    quiet = InfotextOptions(add_model_hash=False, add_model_name=False, add_version=False)
    assert infotext(FACTS, quiet).endswith("Size: 64x48, RNG: CPU")
    assert "User" not in infotext(replace(FACTS, user="me"))


def test_a_repeated_key_keeps_its_place_and_takes_the_new_value() -> None:
    parameters = build_parameters(replace(FACTS, extra={"Seed": 7, "New": 1}))
    assert list(parameters).index("Seed") < list(parameters).index("Size")
    assert parameters["Seed"] == 7


def test_values_of_a_batch() -> None:
    parameters = {"L": ["a", "b"], "C": lambda index: f"c{index}", "Short": ["a"], "Same": "Same", "E": "", "N": None}
    assert format_infotext("p", "", parameters, 1) == "p\nL: b, C: c1, Same, E:"


def test_numbers_keep_their_type() -> None:
    assert quote(1) == 1
    assert format_infotext("", "", {"A": 1, "B": 1.0, "C": True}) == "A: 1, B: 1.0, C: True"


@pytest.mark.parametrize("text", ["a,b", "a:b", "a\nb", '"', 'say "x", y', "日本, 語", "\\", "\\,", "", '"a"'])
def test_quoting_comes_back(text: str) -> None:
    assert unquote(quote(text)) == (text if text != '"a"' else "a")


def test_text_comes_back() -> None:
    facts = replace(FACTS, prompt="a (cat:1.2), hat: red\nline two", negative_prompt="bad, ugly")
    parsed = parse_infotext(infotext(facts), defaults=False)
    assert parsed["Prompt"] == facts.prompt
    assert parsed["Negative prompt"] == facts.negative_prompt
    assert (parsed["Size-1"], parsed["Size-2"]) == ("64", "48")
    assert "Clip skip" not in parsed


def test_weights_in_a_prompt_fill_in_the_emphasis() -> None:
    line = "\nSteps: 20, Sampler: Euler, CFG scale: 1"
    assert parse_infotext(f"a (cat:1.2){line}")["Emphasis"] == "Original"
    assert parse_infotext(f"a cat\nNegative prompt: [dog]{line}")["Emphasis"] == "Original"
    assert parse_infotext(f"a (cat:1.2){line}, Emphasis: No norm")["Emphasis"] == "No norm"
    assert "Emphasis" not in parse_infotext(f"a cat BREAK <lora:x:0.5>{line}")


def test_models_and_modules_are_told_as_they_are() -> None:
    parsed = parse_infotext("p\nSteps: 1, Model: m, Module 1: ae, Hires Module 1: clip_l, FP8 weight: Enable")
    assert (parsed["Model"], parsed["Module 1"], parsed["Hires VAE/TE"]) == ("m", "ae", [])
    assert "VAE/TE" not in parsed and parsed["Cache FP16 weight for LoRA"] is False
    assert parse_infotext("p\nSteps: 1, Seed: 2, Size: 8x8")["Hires VAE/TE"] == ["Use same choices"]


def test_civitai_is_mended_only_where_it_should() -> None:
    parsed = parse_infotext("p\nClip skip: 12, Sampler: Euler a, CFG scale: 3.5, Civitai, Model: FLUX", defaults=False)
    assert parsed["Clip skip"] == "12"
    assert parsed["Sampler"] == "Euler a"
    assert (parsed["CFG scale"], parsed["Distilled CFG Scale"]) == ("1", "3.5")


def test_too_few_pairs_are_prompt() -> None:
    parsed = parse_infotext("a cat\nsize: big, mood: calm", defaults=False)
    assert parsed == {"Prompt": "a cat\nsize: big, mood: calm", "Negative prompt": ""}


def test_lines_of_both_prompts() -> None:
    parsed = parse_infotext("a\n\n b \nNegative prompt:\nbad\nworse\nSteps: 1, Sampler: Euler, Seed: 2", defaults=False)
    assert parsed["Prompt"] == "a\n\nb"
    assert parsed["Negative prompt"] == "bad\nworse"


def test_the_pair_pattern_finds_what_the_plain_rule_finds() -> None:
    plain = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    source = random.Random(0)
    for _ in range(20000):
        text = "".join(source.choices('ab -/:,"\\\t1é', k=source.randrange(1, 30)))
        assert _PAIR.findall(text) == plain.findall(text), text


@pytest.mark.parametrize("text", ["a" * 200000, "a" * 200000 + ":", 'ab:"' * 50000, 'ab:"\\' * 50000, "ab: " * 50000])
def test_hostile_text_is_read_in_linear_time(text: str) -> None:
    start = time.perf_counter()
    parse_infotext(text, defaults=False)
    assert time.perf_counter() - start < 2


def test_request_fields_make_the_request_again() -> None:
    facts = replace(
        FACTS, negative_prompt="bad", subseed=6, subseed_strength=0.1, seed_resize_from=(32, 64),
        image=ImageFacts(denoising_strength=0.3),
        sampler_options=sampler_parameters(GenerationRequest(eta=0.5, discard_next_to_last=True), "Beta"),
    )  # fmt: skip
    request = GenerationRequest(**request_fields(infotext(facts)))
    assert (request.prompt, request.negative_prompt, request.seed) == ("a cat", "bad", 42)
    assert (request.width, request.height, request.noise_source) == (64, 48, "CPU")
    assert (request.subseed, request.seed_resize_from_w, request.denoising_strength) == (6, 32, 0.3)
    assert (request.eta, request.beta_alpha, request.discard_next_to_last) == (0.5, 0.6, True)


def test_a_bad_number_names_the_field() -> None:
    with pytest.raises(RequestError, match="steps") as caught:
        request_fields("p\nSteps: many, Sampler: Euler, Seed: 1")
    assert caught.value.field == "steps"


def test_no_torch_is_loaded() -> None:
    modules = ("infotext", "infotext_parse", "filenames", "images", "image_text")
    code = "import sys; " + "; ".join(f"import lightweight_engine.core.{name}" for name in modules)
    subprocess.run(
        [sys.executable, "-c", f"{code}; assert not {{'torch', 'numpy', 'PIL'}} & set(sys.modules)"], check=True
    )
