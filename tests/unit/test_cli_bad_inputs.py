"""The acceptance list's bad inputs on the command line: one line that names the fault, an exit code, and no picture.

What the service refuses and what the command line does come from the same code; here the way there is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from command_line import command_line
from PIL import Image

from lightweight_engine.apps import generate

SMALL = ("--width", 64, "--height", 64, "--steps", 1, "--device", "cpu", "--offline")
WRONG, MODEL, NETWORK = 2, 3, 6  # exit codes: the request, a model file, a server

FILES = ("text.png", "huge.png", "half.jpg", "whole.jpg")

Arguments = Sequence[object]

CASES: dict[str, tuple[Arguments, int, str]] = {
    "1 no width": (["--width", 0], WRONG, "width"),
    "2 a negative width": (["--width", -512], WRONG, "width"),
    "4 far too large": (["--width", 100_000, "--height", 100_000], WRONG, "max_side"),
    "6 half a pixel": (["--width", 512.5], WRONG, "width"),
    "7 not finite": (["--cfg-scale", "nan"], WRONG, "cfg-scale"),
    "8 no steps": (["--steps", 0], WRONG, "steps"),
    "9 too many steps": (["--steps", 5000], WRONG, "--steps: 5000 is too large; give 1 to 1,000"),
    "9 steps that are no number": (["--steps", "many"], WRONG, "--steps: 'many' is no whole number; give 1 to 1,000"),
    "9 half a step": (["--steps", "2.5"], WRONG, "--steps: '2.5' is no whole number; give 1 to 1,000"),
    "9 a strength that is no number": (
        ["--lora", "hat", "--lora-scales", "much"],
        WRONG,
        "--lora-scales: 'much' is no number; give -100 to 100",
    ),
    "10 no pictures": (["--num-outputs", 0], WRONG, "num-outputs"),
    "10 a thousand": (["--num-outputs", 1000], WRONG, "max_outputs"),
    "10 far too many": (
        ["--num-outputs", 5000],
        WRONG,
        "--num-outputs: 5000 is over the limit of 64 (setting max_outputs)",
    ),
    "11 too much work": (["--width", 4096, "--height", 4096, "--steps", 300], WRONG, "megapixel-steps"),
    "12 a seed beyond 63 bits": (["--seed", 2**64], WRONG, "seed"),
    "12 seed -2": (["--seed", -2], WRONG, "seed"),
    "13 guidance": (["--cfg-scale", 1e9], WRONG, "cfg-scale"),
    "14 distilled guidance": (["--distilled-cfg-scale", -1], WRONG, "distilled-cfg-scale"),
    "15 a strength": (["--denoising-strength", 1.1], WRONG, "denoising-strength"),
    "17 a hires scale": (["--hr-scale", 100], WRONG, "hr-scale"),
    "18 one pixel": (["--enable-hr", "--hr-resize-x", 1], WRONG, "hr-resize-x"),
    "19 a sampler": (["--sampler", "Foo"], WRONG, "Euler"),
    "19 an empty sampler": (["--sampler", ""], WRONG, "--sampler: it is empty; give a text, or leave it out"),
    "21 an empty checkpoint": (["--checkpoint", ""], WRONG, "checkpoint (from --checkpoint): it is empty"),
    "21 an empty folder of models": (["--models-dir", ""], WRONG, "models_dir (from --models-dir): it is empty"),
    "21 an empty folder of outputs": (["-o", ""], WRONG, "output_dir (from --output-dir): it is empty"),
    "20 a scheduler": (["--scheduler", "Foo"], WRONG, "Simple"),
    "19 a sampler of the hires pass": (["--hr-sampler", "Foo", "--enable-hr"], WRONG, "--hr-sampler: 'Foo'"),
    "20 a scheduler of the hires pass": (["--hr-scheduler", "Foo", "--enable-hr"], WRONG, "--hr-scheduler: 'Foo'"),
    "33 a mask of nothing": (
        ["--mask", "whole.jpg"],
        WRONG,
        "--mask: there is no picture that it belongs to; give --image",
    ),
    "21 a checkpoint": (["--checkpoint", "flux"], MODEL, "no model file"),
    "22 a LoRA outside": (["--lora", "../../etc/passwd"], MODEL, "--lora: there is no LoRA"),
    "22 an upscaler": (["--enable-hr", "--hr-upscaler", "Foo"], MODEL, "--hr-upscaler: there is no upscaler"),
    "22 a detector": (["--adetailer-passes", '{"ad_model": "Foo"}'], MODEL, "there is no detector"),
    "26 look-alike letters": (["--lora", "hаt"], MODEL, "no LoRA"),
    "29 arguments that are no object": (["--adetailer", "--adetailer-args", "[1]"], WRONG, "adetailer"),
    "29 arguments that nothing reads": (["--adetailer-args", "[1]"], WRONG, "adetailer-args: it is no JSON object"),
    "29 an unknown key": (["--adetailer", "--adetailer-args", '{"ad_stps": 1}'], WRONG, "ad_steps"),
    "19 a sampler of a pass": (
        ["--adetailer", "--adetailer-args", '{"ad_use_sampler": true, "ad_sampler": "Foo"}'],
        WRONG,
        "adetailer_args.ad_sampler: 'Foo'",
    ),
    "32 no picture": (["--image", ""], WRONG, "image"),
    "34 a text": (["--image", "text.png"], WRONG, "text.png"),
    "36 a header that claims much": (["--image", "huge.png"], WRONG, "pixels"),
    "38 half a JPEG": (["--image", "half.jpg"], WRONG, "half.jpg"),
    "50 ftp": (["--image", "ftp://good.example/x.png"], WRONG, "ftp"),
    "54 this machine": (["--no-offline", "--lora-urls", "https://127.0.0.1/a.safetensors"], NETWORK, "private network"),
    "53 no https": (
        ["--lora", "http://a.example/a.safetensors"],
        NETWORK,
        "--lora: a.example:80 was asked for without",
    ),
    "53 another scheme": (
        ["--lora", "hat", "--lora", "ftp://a.example/a"],
        NETWORK,
        "--lora[1]: not a URL that can be",
    ),
    "53 another port": (
        ["--lora-urls", "https://a.example:1/a.safetensors"],
        NETWORK,
        "port 1 of a.example is refused",
    ),
    "53 no address": (["--lora-urls", "hat"], NETWORK, "--lora-urls: not a URL that can be fetched"),
    "54 a picture": (["--no-offline", "--image", "https://127.0.0.1/a.png"], NETWORK, "--image: 127.0.0.1 is an addr"),
    "63 a pickle": (["--no-offline", "--lora-urls", "https://a.example/a.ckpt"], NETWORK, "safetensors"),
    "65 a hundred LoRAs": (["--lora", "hat"] * 100, WRONG, "16"),
    "66 a strength that is none": (["--lora", "hat:abc"], WRONG, "--lora: 'abc' is no strength; write hat:0.8"),
    "66 another that is none": (["--lora", "hat", "--lora", "hat:much"], WRONG, "--lora[1]: 'much' is no strength"),
    "66 a strength of a million": (["--lora", "hat:1000000"], WRONG, "100"),
    "69 a megabyte": (["--negative-prompt", "a" * 100_000], WRONG, "max_prompt_chars"),
    "71 brackets": (["--negative-prompt", "(" * 10_000], WRONG, "max_prompt_tokens"),
}


# Told only with the model there: calls of its network, and tokens.
LOADED = ("11 too much work", "71 brackets")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    noise.save(folder / "whole.jpg")
    (folder / "half.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:1200])
    (folder / "text.png").write_bytes(b"<html>")
    Image.new("1", (30_000, 30_000)).save(folder / "huge.png")
    return folder


@pytest.mark.parametrize("case", CASES)
def test_bad_inputs(
    case: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, code, said = CASES[case]
    given = [pictures / str(each) if each in FILES else each for each in arguments]
    done = command_line(capsys, tmp_path, monkeypatch)("generate", "a woman", *SMALL, *given)
    assert done.code == code, done.err
    assert re.search(rf"^[Ee]rror: .*{re.escape(said)}", done.err, re.MULTILINE), done.err
    assert "Traceback" not in done.err and done.out == ""
    assert "loading" not in done.err or case in LOADED
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith(("53", "54", "63"))])
def test_addresses_are_refused_at_once_in_the_words_of_who_would_fetch(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cli, given = command_line(capsys, tmp_path, monkeypatch), CASES[case][0]
    told = cli("generate", "a woman", *SMALL, *given).err
    monkeypatch.setattr(generate, "check_request", lambda request, config: None)
    later = cli("generate", "a woman", *SMALL, *given).err
    assert "loading" in later and later.splitlines()[-1:] == told.splitlines()
