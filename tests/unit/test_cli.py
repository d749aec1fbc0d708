"""The command line: what goes to which stream, exit codes, and what each command prints. On a small random model."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import Cli, Done, command_line
from factories import AE, CLIP, T5, network, save, save_flux

from lightweight_engine import __version__
from lightweight_engine.apps import demo, doctor
from lightweight_engine.apps.cli import COMMANDS
from lightweight_engine.apps.console import EXIT_CODES, Console, option
from lightweight_engine.apps.progress import Bar, Silent, clock, describe, reporter, speed
from lightweight_engine.apps.session import watched
from lightweight_engine.core import images
from lightweight_engine.errors import EngineError, RequestError
from lightweight_engine.flux.autoencoder import Autoencoder
from lightweight_engine.flux.clip import CLIPText
from lightweight_engine.flux.t5 import T5Encoder
from lightweight_engine.labels import sampler_labels
from lightweight_engine.request import MODEL_FIELDS, GenerationRequest
from lightweight_engine.results import Progress

PROJECT = Path(__file__).resolve().parents[2]
TOKENIZERS = PROJECT / "lightweight_engine" / "tiny" / "tokenizers"
VOCABULARY = 4096  # more than the tokenizers of the embedded model have


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder in the layout of a WebUI: a small random family with the embedded model's tokenizers."""
    root = tmp_path_factory.mktemp("webui") / "models"
    save_flux(root / "Stable-diffusion" / "small.safetensors")
    save(root / "text_encoder" / "t5.safetensors", network(T5Encoder, replace(T5, vocab_size=VOCABULARY)))
    clip = network(CLIPText, replace(CLIP, vocab_size=VOCABULARY))
    save(root / "text_encoder" / "clip.safetensors", clip, config={"num_attention_heads": 2})
    save(root / "VAE" / "ae.safetensors", network(Autoencoder, AE))
    shutil.copytree(TOKENIZERS, root / "tokenizers")
    return root


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run the command line in this process, in an empty working folder."""
    return command_line(capsys, tmp_path, monkeypatch)


def draw(cli: Cli, models: Path, *more: object) -> Done:
    small = ("--width", 64, "--height", 64, "--steps", 2, "--seed", 5, "--device", "cpu")
    return cli("generate", "a cat", "--models-dir", models, *small, *more)


# --- help and names -----------------------------------------------------------------------------------------------


def test_help_lists_every_command_and_exit_code(cli: Cli) -> None:
    done = cli("--help")
    assert done.code == 0
    assert all(name in done.out for name in COMMANDS)
    assert all(f"{code:3}  {meaning}" in done.out for code, meaning in EXIT_CODES.items())


def test_every_error_has_a_documented_exit_code() -> None:
    def codes(kind: type[EngineError]) -> set[int]:
        return {kind.exit_code}.union(*(codes(below) for below in kind.__subclasses__()))

    assert codes(EngineError) <= set(EXIT_CODES)
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    assert all(f"| {code} | {meaning} |" in readme for code, meaning in EXIT_CODES.items())


def test_every_request_field_is_an_option(cli: Cli) -> None:
    text = cli("generate", "--help").out
    names = [name for name in GenerationRequest.model_fields if name not in ("prompt", *MODEL_FIELDS)]
    assert [name for name in names if option(name) not in text] == []
    assert all(text.count(f"{option(name)} ") <= 1 for name in MODEL_FIELDS), "a setting has one option"


def test_help_is_in_groups(cli: Cli) -> None:
    lines = cli("generate", "--help").out.splitlines()
    groups = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert groups[:4] == ["Arguments:", "Prompt:", "Picture:", "Sampling:"]
    assert groups[-3:] == ["Device:", "Settings:", "Options:"]
    assert len(groups) == len(set(groups))


def test_help_says_what_holds(cli: Cli) -> None:
    text = " ".join(cli("generate", "--help").out.split())
    assert "at most 64, by the setting max_outputs" in text
    assert "--ad-prompt <str> Prompt of the pass for faces" in text
    assert "--steps <int> Sampling steps." in text


@pytest.mark.parametrize("name", COMMANDS)
def test_the_short_help_is_not_out_of_step(cli: Cli, name: str) -> None:
    assert cli(name, "--help").code == 0


def test_version_and_lists(cli: Cli) -> None:
    assert cli("--version").out.strip() == __version__
    assert cli("generate", "--list-samplers").out.split("\n")[:-1] == sampler_labels()
    assert "Simple" in cli("generate", "--list-schedulers").out.split("\n")


def test_completion_offers_commands_and_options() -> None:
    environ = {**os.environ, "_LIGHTWEIGHT_ENGINE_COMPLETE": "complete_bash", "COMP_CWORD": "1"}
    for words, expected in (("lightweight-engine gen", "generate"), ("lightweight-engine mo", "models")):
        done = subprocess.run(
            [sys.executable, "-m", "lightweight_engine"],
            env={**environ, "COMP_WORDS": words},
            cwd=PROJECT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert expected in done.stdout


# --- generate -----------------------------------------------------------------------------------------------------


def test_generate_prints_paths_on_stdout_and_words_on_stderr(cli: Cli, models: Path, tmp_path: Path) -> None:
    done = draw(cli, models, "-n", 2)
    assert done.code == 0, done.err
    paths = [Path(line) for line in done.out.splitlines()]
    assert [path.suffix for path in paths] == [".png", ".png"]
    assert all(path.is_file() and path.with_suffix(".json").is_file() for path in paths)
    assert all((tmp_path / path).is_relative_to(tmp_path / "outputs") for path in paths)
    assert "model: small" in done.err
    assert "drawing, picture 1 of 2, 2 steps" in done.err


def test_json_is_one_object_on_stdout(cli: Cli, models: Path) -> None:
    done = draw(cli, models, "--json", "--output-format", "webp", "-o", "elsewhere")
    data = json.loads(done.out)
    (image,) = data["images"]
    assert Path(image["path"]).parts[0] == "elsewhere"
    assert (image["seed"], image["width"], Path(image["path"]).suffix) == (5, 64, ".webp")
    assert {row["role"] for row in data["models"]} == {"transformer", "t5", "clip", "autoencoder"}
    assert data["timings"]["sample"] > 0


@pytest.mark.parametrize("as_json", [False, True])
def test_pictures_that_were_saved_before_a_disk_was_full_are_told(
    cli: Cli, models: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    write, written = images._write, []

    def fill(path: Path, data: bytes) -> None:
        written.append(path)
        if len(written) > 4:  # two pictures, each with its sidecar
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, data)

    monkeypatch.setattr(images, "_write", fill)
    done = draw(cli, models, "-n", 3, *(["--json"] if as_json else []))
    assert done.code == 7
    assert "the disk is full; free some space or choose another output folder; 2 of 3 pictures were saved" in done.err
    paths = json.loads(done.out)["error"]["saved"] if as_json else done.out.splitlines()
    assert [Path(path).name for path in paths] == ["00000-5.png", "00001-6.png"]
    assert all(Path(path).is_file() for path in paths)


def test_that_there_is_no_checkpoint_is_one_short_line(cli: Cli, tmp_path: Path) -> None:
    def told() -> list[str]:
        done = cli("generate", "a cat", "-W", 64, "-H", 64, "-s", 1, "--device", "cpu", "--json")
        assert done.code == 0 and len(json.loads(done.out)["warnings"]) == 1, done.err
        return [line for line in done.err.splitlines() if line.startswith("warning")]

    said, see = "'tiny' is used, which draws cartoon people only", "; see `lightweight-engine doctor`"
    assert told() == [f"warning: no Flux checkpoint in models: {said}{see}"] and len(told()[0]) <= 120
    (tmp_path / "models" / "unet").mkdir(parents=True)
    (tmp_path / "models" / "unet" / "half.safetensors").write_bytes(b"<html>")
    assert told() == [f"warning: no Flux checkpoint in models (1 file unusable): {said}{see}"]
    assert "half.safetensors" in cli("doctor").out, "which is told there"


def test_quiet_says_nothing_but_warnings(cli: Cli, models: Path) -> None:
    done = draw(cli, models, "--quiet")
    assert all(line.startswith("warning:") for line in done.err.splitlines())


def test_the_prompt_may_come_from_standard_input(cli: Cli, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("a dog\n"))
    done = cli("generate", "-", "--models-dir", models, "-W", 64, "-H", 64, "-s", 1, "--json")
    assert json.loads(done.out)["images"][0]["infotext"].startswith("a dog\n")


def test_nothing_is_written_into_the_models_folder(cli: Cli, models: Path) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in models.rglob("*"))
    assert draw(cli, models).code == 0
    assert cli("models", "verify", "small", "--models-dir", models).code == 0
    assert sorted((path, path.stat().st_mtime_ns) for path in models.rglob("*")) == before


def test_settings_of_file_environment_and_flag(cli: Cli, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("engine.toml").write_text("steps = 1\nwidth = 64\nheight = 64\n")
    monkeypatch.setenv("LWE_SCHEDULER", "Normal")
    done = cli("generate", "a cat", "--models-dir", models, "--set", "sampler=Heun", "--json")
    text = json.loads(done.out)["images"][0]["infotext"]
    assert "Steps: 1, Sampler: Heun, Schedule type: Normal" in text
    assert "Size: 64x64" in text


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--hr-scale", 2, "--hr-upscaler", "Lanczoz"], 3, "did you mean 'Lanczos'"),
        (["--hr-scale", 2, "--hr-upscaler", "SwinIR 4x"], 3, "needs the file SwinIR_4x.pth"),
        (["--adetailer"], 3, "face_yolov8n.pt is not in"),
        (["--adetailer-passes", '{"ad_model": "face_tinny"}'], 3, "did you mean 'face_tiny'"),
        (["--adetailer-passes", '{"ad_model": "face_tiny", "ad_confidense": 1}'], 2, "'ad_confidence'"),
        (["--adetailer-passes", '{"ad_model": "face_tiny", "ad_restore_face": true}'], 2, "leave it at False"),
        (["--checkpoint", "smal"], 3, "did you mean 'small'"),
        (["--vae", "small"], 3, "not an autoencoder"),
    ],
)
def test_what_is_no_name_is_told_before_anything_is_loaded(
    cli: Cli, models: Path, arguments: list[object], code: int, said: str
) -> None:
    done = draw(cli, models, *arguments)
    assert done.code == code and said in done.err, done.err
    assert "loading" not in done.err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--steps", 0], 2, "error: --steps: "),
        (["--cfg-scale", 500, "--steps", 0], 2, "; --cfg-scale: "),
        (["-n", 100], 2, "error: --num-outputs: 100 is over the limit of 64 (setting max_outputs)"),
        (["--steps", "many"], 2, "--steps"),
        (["--no-such-option"], 2, "no-such-option"),
        (["--sampler", "Eulr"], 2, "choose one of: DPM++ 2M"),
        (["--scheduler", "Turbo"], 2, "not valid for Flux"),
        (["--set", "stepz=3"], 2, "did you mean 'steps'"),
        (["--set", "steps"], 2, "NAME=VALUE"),
        (["--set", "max_outputs=0"], 2, "max_outputs (from --set max_outputs): "),
        (["--set", "seed=5"], 2, "give it as --seed"),
        (["--threads", -1], 2, "threads (from --threads): "),
        (["--skip-img2img"], 2, "error: --skip-img2img details a start picture: give --image, and --adetailer or"),
        (["--sigma-min", 2, "--sigma-max", 1], 2, "error: --sigma-min must be below --sigma-max"),
        (["--config", "none.toml"], 2, "cannot be read"),
        (["--device", "tpu"], 2, "auto, cpu, cuda"),
        (["--checkpoint", "absent"], 3, "no model file is called 'absent'"),
        (["--checkpoint", "ae"], 3, "not a checkpoint"),
        (["--width", 9000], 2, "max_side"),
        (["--image", "none.png"], 2, "error: --image: cannot read none.png: there is no such file"),
        (["-o", "/dev/null/x"], 7, "cannot write"),
        (["--models-dir", "absent"], 2, "there is no folder"),
    ],
)
def test_wrong_input_is_one_line_with_its_exit_code(
    cli: Cli, models: Path, arguments: list[object], code: int, said: str
) -> None:
    done = draw(cli, models, *arguments)
    assert done.code == code, done.err
    assert said in done.err
    assert done.out == ""
    assert "Traceback" not in done.err
    last = done.err.strip().splitlines()[-1]
    assert last.lower().startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["-n", 100], 2),
        (["--width", 9000], 2),
        (["--image", "none.png"], 2),
        (["--sampler", "Eulr"], 2),
        (["-o", "/dev/null/x"], 7),
        (["-o", "missing/../../../../../../../../dev/null/x"], 7),
    ],
)
def test_what_can_be_told_at_once_is_told_before_anything_is_loaded(
    cli: Cli, models: Path, arguments: list[object], code: int
) -> None:
    done = draw(cli, models, *arguments)
    assert done.code == code
    assert "loading" not in done.err


def test_a_gpu_that_is_not_there_is_told_before_anything_is_loaded(
    cli: Cli, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (path,) = draw(cli, models).out.splitlines()
    for command in (["generate", "a cat"], ["replay", path], ["warmup"]):
        done = cli(*command, "--models-dir", models, "--device", "cuda")
        assert (done.code, done.err) == (
            2,
            "error: device: cuda is asked for, but torch sees no CUDA device; use device=cpu\n",
        )
    rows = json.loads(cli("doctor", "--models-dir", models, "--device", "cuda", "--json").out)["checks"]
    (row,) = (row for row in rows if row["name"] == "device")
    assert row["found"] == "cuda is asked for, but torch sees no CUDA device", "with one remedy, below"
    assert row["fix"] == "set device to auto"


def test_replay_and_demo_look_at_the_folder_before_they_draw(cli: Cli, models: Path) -> None:
    (path,) = draw(cli, models).out.splitlines()
    for command in (["replay", path, "--save"], ["demo"]):
        done = cli(*command, "-o", "/dev/null/x")
        assert (done.code, "loading" in done.err) == (7, False)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("hr_scale: over 64 (setting hr_scale); ask for less", "--hr-scale: over 64 (setting hr_scale); ask for less"),
        (
            "steps: 'hr_scale' and hr_scale.x are odd; give steps, by image",
            "--steps: 'hr_scale' and hr_scale.x are odd; give --steps, by image",
        ),
        (
            "steps, image and hr_scale cannot hold; give image too",
            "--steps, --image and --hr-scale cannot hold; give --image too",
        ),
        ("steps: the image has steps; image or mask", "--steps: the image has steps; --image or mask"),
    ],
)
def test_a_fault_of_several_fields_names_their_options_and_no_other_words(
    capsys: pytest.CaptureFixture[str], said: str, told: str
) -> None:
    console = Console()
    console.typed, console.options = (
        ("steps", "hr_scale"),
        {each: option(each) for each in ("steps", "image", "hr_scale")},
    )
    with pytest.raises(SystemExit):
        console.fail(RequestError(said, field=said.partition(":")[0].partition(",")[0]), 2)
    assert capsys.readouterr().err == f"error: {told}\n"


def test_errors_as_json(cli: Cli, models: Path) -> None:
    done = draw(cli, models, "--json", "--steps", 0)
    error = json.loads(done.out)["error"]
    assert (error["type"], error["field"], error["exit_code"]) == ("RequestError", "steps", 2)
    assert done.code == 2


def test_debug_shows_the_traceback(cli: Cli, models: Path) -> None:
    assert "Traceback" in draw(cli, models, "--debug", "--steps", 0).err


def test_an_error_of_our_own_is_told_without_traceback(cli: Cli, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightweight_engine.core.replay.save_result", lambda *a, **k: 1 / 0)
    done = draw(cli, models)
    assert done.code == 1
    assert "Traceback" not in done.err
    assert "ZeroDivisionError" in done.err
    assert "--debug" in done.err


def _start(*arguments: str, folder: Path) -> subprocess.Popen[str]:
    environ = {**os.environ, "PYTHONPATH": str(PROJECT), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "lightweight_engine", *arguments]
    return subprocess.Popen(command, cwd=folder, env=environ, stdout=-1, stderr=-1, text=True)


def _drawing(models: Path, folder: Path) -> subprocess.Popen[str]:
    """A command that has begun to draw, for longer than any test waits."""
    size = ("--width", "256", "--height", "256", "--steps", "1000", "--device", "cpu")
    process = _start("generate", "a cat", "--models-dir", str(models), *size, folder=folder)
    assert process.stderr is not None
    for line in process.stderr:
        if "drawing" in line:
            break
    return process


def test_ctrl_c_stops_within_a_step_and_saves_nothing(models: Path, tmp_path: Path) -> None:
    process = _drawing(models, tmp_path)
    process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    _, words = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "stopped by Ctrl-C" in words
    assert time.monotonic() - begin < 15
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("presses", [2, 3, 5])
def test_ctrl_c_several_times_ends_with_one_word(models: Path, tmp_path: Path, presses: int) -> None:
    process = _drawing(models, tmp_path)
    for _ in range(presses):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    _, words = process.communicate(timeout=30)
    assert process.returncode in (
        130,
        -signal.SIGINT,
    )  # as Python itself ends, the signal does; a shell has 130 of both
    assert [line for line in words.splitlines() if not line.startswith("drawing")] == [
        "error: stopped by Ctrl-C" + ("; this job saved nothing" if "nothing" in words else "")
    ]


def test_every_further_ctrl_c_ends_it_sooner_and_the_word_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", end)
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit, match="130"), Console(quiet=True) as console, watched(console) as options:
            signal.raise_signal(signal.SIGINT)
            assert options["cancel"].is_set()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        assert capfd.readouterr().err == "error: stopped by Ctrl-C\n"
        with pytest.raises(SystemExit, match="130"), Console():
            raise KeyboardInterrupt
        with pytest.raises(SystemExit, match="130"):
            signal.raise_signal(signal.SIGINT)  # while it ends
        assert capfd.readouterr().err == "error: stopped by Ctrl-C\n"
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_of_a_command_that_draws_nothing_is_told_too(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lightweight_engine.apps.settings.load_config", pressed)
    before = signal.getsignal(signal.SIGINT)
    try:
        assert cli("config", "show") == (130, "", "error: stopped by Ctrl-C\n")
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_while_loading(models: Path, tmp_path: Path) -> None:
    process = _start("generate", "a cat", "--models-dir", str(models), folder=tmp_path)
    assert process.stderr is not None
    assert process.stderr.readline() == "loading ...\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, words = process.communicate(timeout=30)
    assert (process.returncode, words) == (130, "error: stopped by Ctrl-C\n")


def test_a_closed_pipe_is_no_error(models: Path, tmp_path: Path) -> None:
    process = _start("models", "ls", "--models-dir", str(models), folder=tmp_path)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()
    assert process.wait(30) == 0


# --- progress -----------------------------------------------------------------------------------------------------


def test_progress_in_words() -> None:
    at = {"image_index": 1, "image_count": 2, "fraction": 0.6, "step": 3, "steps": 20, "steps_per_second": 2.5}
    assert describe(Progress(stage="sample", eta_seconds=67, **at)) == (
        "drawing, picture 2 of 2, step 3/20, 2.50 it/s, 1:07 left"
    )
    assert describe(Progress(stage="decode")) == "decoding"
    assert (speed(0.25), clock(3725), clock(-1)) == ("4.00 s/it", "1:02:05", "0:00")


def test_plain_lines_come_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with reporter(Console(), "1/8") as show:
        for step in range(21):
            now += 1.0
            show(Progress(stage="sample", step=step, steps=20))
        now += 9.0
        show(Progress(stage="done"))
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["1/8: drawing, 20 steps", *(f"1/8: drawing, step {step}/20" for step in (5, 10, 15, 20))]


def test_a_bar_on_a_terminal() -> None:
    bar = Bar("1/8")
    with bar:
        bar(Progress(stage="sample", step=3, steps=20, fraction=0.2))
    assert isinstance(reporter(Console(quiet=True)), Silent)


# --- the other commands -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "said"), [("http", "'http' is no whole number"), (70_000, "70000 is too large")])
def test_a_port_that_is_none_is_told_as_a_setting_is(cli: Cli, given: object, said: str) -> None:
    done = cli("serve", "--port", given)
    assert (done.code, done.err) == (2, f"error: port (from --port): {said}; give 0 to 65,535\n")


def test_a_quality_that_has_no_effect_or_is_none_is_told(cli: Cli, models: Path) -> None:
    assert "warning: --quality had no effect on png" in draw(cli, models, "--quality", 50).err
    assert "--quality" not in draw(cli, models, "--quality", 50, "--output-format", "jpg").err
    for given, said in (("500", "500 is too large"), ("high", "'high' is no whole number"), ("0", "0 is too small")):
        done = draw(cli, models, "--quality", given)
        assert (done.code, done.err) == (2, f"error: --quality: {said}; give 1 to 100\n")


def test_info_prints_the_text_and_the_sidecar(cli: Cli, models: Path) -> None:
    (path,) = draw(cli, models).out.splitlines()
    done = cli("info", path)
    assert done.out.startswith("a cat\nSteps: 2, Sampler: Euler, Schedule type: Simple")
    assert "File of transformer: small" in done.out
    data = json.loads(cli("info", path, "--json").out)
    assert data["parameters"]["Steps"] == "2"
    assert data["sidecar"]["seed"] == 5
    Path(path).with_suffix(".json").unlink()
    assert json.loads(cli("info", path, "--json").out)["sidecar"] is None


def test_info_of_what_has_none(cli: Cli, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "bare.png")
    (tmp_path / "text.png").write_text("hello")
    for name, said in (("bare.png", "carries no parameters"), ("text.png", "not a picture"), ("no.png", "no such")):
        done = cli("info", name)
        assert (done.code, done.out) == (2, "")
        assert said in done.err


def test_replay_makes_the_same_picture_again(cli: Cli, models: Path) -> None:
    (path,) = draw(cli, models, "--sampler", "Euler a").out.splitlines()
    done = cli("replay", path, "--device", "cpu")
    assert done.code == 0, done.err
    assert done.out.startswith("identical")
    assert cli("replay", path, "--device", "cpu", "--json").out.count('"identical": true') == 1
    sidecar = Path(path).with_suffix(".json")
    lonely = sidecar.rename(sidecar.with_name("lonely.json"))
    done = cli("replay", lonely, "--device", "cpu")
    assert done.code == 2 and "its picture (lonely.png or lonely.jpg or lonely.webp) is not beside it" in done.err


def test_replay_has_the_settings_of_then(cli: Cli, models: Path) -> None:
    (path,) = draw(cli, models, "--set", "storage_dtype=nf4").out.splitlines()
    done = cli("replay", path, "--device", "cpu")
    assert (done.code, done.out.strip()) == (0, "identical: every pixel is the same")
    done = cli("replay", path, "--device", "cpu", "--set", "storage_dtype=bf16")
    assert done.code == 9
    assert "another storage_dtype: nf4 then, bf16 now" in done.out
    assert "no effect" not in done.err


def test_replay_tells_of_settings_that_are_defaults_of_requests(cli: Cli, models: Path) -> None:
    (path,) = draw(cli, models).out.splitlines()
    done = cli("replay", path, "--device", "cpu", "--set", "steps=9", "--set", "cfg-scale=2", "--set", "variant=auto")
    assert (done.code, done.out.strip()) == (0, "identical: every pixel is the same"), done.err
    assert "warning: steps, cfg_scale had no effect by --set" in done.err


def test_replay_says_when_the_picture_differs(cli: Cli, models: Path) -> None:
    (path,) = draw(cli, models).out.splitlines()
    sidecar = Path(path).with_suffix(".json")
    data = json.loads(sidecar.read_text())
    data["pixels_sha256"] = "0" * 64
    data["versions"]["torch"] = "1.0"
    sidecar.write_text(json.dumps(data))
    done = cli("replay", path, "--device", "cpu")
    assert done.code == 9
    assert done.out.startswith("different")
    assert "another torch: 1.0 then" in done.out


def test_a_start_picture_of_which_only_the_hash_was_kept_is_asked_for(cli: Cli, models: Path) -> None:
    (start,) = draw(cli, models).out.splitlines()
    (path,) = draw(cli, models, "--image", start, "--denoising-strength", 0.5).out.splitlines()
    sidecar = Path(path).with_suffix(".json")
    data = json.loads(sidecar.read_text())
    sent = base64.b64encode(Path(start).read_bytes())
    data["request"]["image"] = f"sha256:{hashlib.sha256(sent).hexdigest()}"
    sidecar.write_text(json.dumps(data))
    done = cli("replay", path, "--device", "cpu")
    assert (done.code, done.out) == (2, "")
    assert "not kept, only their hashes" in done.err and "--image FILE" in done.err
    done = cli("replay", path, "--device", "cpu", "--image", start)
    assert (done.code, done.out.strip()) == (0, "identical: every pixel is the same"), done.err
    assert "is not the file that was sent" not in done.err
    assert "is not the file that was sent" in cli("replay", path, "--device", "cpu", "--image", path).err
    done = cli("replay", path, "--device", "cpu", "--image", start, "--mask", start)
    assert done.code == 2 and "error: --mask: the picture was made with none, and 1 file was given;" in done.err


def test_replay_has_start_pictures_that_were_named_in_another_working_folder(
    cli: Cli, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").symlink_to(models)
    models = Path("models")
    (start,) = draw(cli, models).out.splitlines()
    shutil.copy(start, tmp_path / "start.png")
    (drawn,) = draw(cli, models, "--image", "start.png", "--mask", "start.png", "--denoising-strength", 0.5).out.split()
    path = Path(drawn).absolute()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    done = cli("replay", path, "--device", "cpu")
    assert (done.code, done.out.strip()) == (0, "identical: every pixel is the same"), done.err
    sidecar = path.with_suffix(".json")
    data = json.loads(sidecar.read_text())
    data["request"]["image"] = "start.png"  # as sidecars had it before
    sidecar.write_text(json.dumps(data))
    assert "start.png is not there any more" in cli("replay", path, "--device", "cpu").err
    monkeypatch.chdir(tmp_path)
    assert cli("replay", path, "--device", "cpu").code == 0


def test_a_picture_that_was_ended_early_is_told_and_not_compared(cli: Cli, models: Path) -> None:
    (path,) = draw(cli, models).out.splitlines()
    sidecar = Path(path).with_suffix(".json")
    assert "Ended early" not in cli("info", path).out
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "interrupted": True}))
    assert "Ended early" in cli("info", path).out
    done = cli("replay", path, "--device", "cpu")
    assert (done.code, "was ended early and cannot be compared" in done.out) == (0, True), done
    assert json.loads(cli("replay", path, "--device", "cpu", "--json").out)["identical"] is None


def test_models_ls_tells_what_each_file_is(cli: Cli, models: Path) -> None:
    done = cli("models", "ls", "--models-dir", models, "--json")
    files = {row["name"]: row for row in json.loads(done.out)["files"]}
    assert files["Stable-diffusion/small.safetensors"]["roles"] == ["transformer"]
    assert all(row["used"] for row in files.values())
    lines = cli("models", "ls", "--models-dir", models).out.splitlines()
    assert len(lines) == 1 + len(files)


def test_models_verify(cli: Cli, models: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    source = models / "VAE" / "ae.safetensors"
    done = cli("models", "verify", source)
    assert done.code == 0, done.err
    assert "all in place and finite" in done.out
    tensors = load_file(source)
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, tmp_path / "nan.safetensors")
    (tmp_path / "short.safetensors").write_bytes(source.read_bytes()[:-10])
    for name, said in (("nan", "not finite"), ("short", "incomplete")):
        done = cli("models", "verify", tmp_path / f"{name}.safetensors")
        assert (done.code, done.out) == (3, "")
        assert said in done.err


def test_config_show_with_origins(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LWE_THREADS", "1")
    data = json.loads(cli("config", "show", "--json", "--device", "cpu").out)
    assert data["threads"] == {"value": 1, "origin": "LWE_THREADS"}
    assert data["device"] == {"value": "cpu", "origin": "--device"}
    assert data["steps"]["origin"] == "default"
    lines = cli("config", "show", "--origin").out.splitlines()
    assert "steps 50 default" in [" ".join(line.split()) for line in lines]
    assert next(line for line in lines if line.startswith("threads")).split() == ["threads", "1", "LWE_THREADS"]


def test_config_show_explains_every_setting(cli: Cli) -> None:
    lines = cli("config", "show", "--explain").out.splitlines()
    assert {"# service", "# memory"} <= set(lines) and not any(line.startswith("[") for line in lines)
    for number, line in enumerate(lines):
        if line and not line.lstrip().startswith("#"):
            assert lines[number - 1].startswith("  # "), f"{line} has no explanation"
    assert not any(line.startswith("  #") for line in cli("config", "show").out.splitlines())


def test_config_show_of_some(cli: Cli) -> None:
    lines = cli("config", "show", "steps", "queue-max").out.splitlines()
    assert [line.split()[0] for line in lines if line[:1].isalpha()] == ["queue_max", "steps"]
    assert set(json.loads(cli("config", "show", "steps", "--json").out)) == {"steps"}
    wrong = cli("config", "show", "stesp")
    assert (wrong.code, wrong.out) == (2, "") and "'stesp' is not a setting; did you mean 'steps'?" in wrong.err


def test_config_show_says_where_a_default_is_not_in_effect(cli: Cli) -> None:
    def told(*more: object) -> str:
        lines = cli("config", "show", *more).out.splitlines()
        return next(" ".join(line.split()[1:]) for line in lines if line.startswith("storage_dtype"))

    assert told() == "nf4 on a GPU; as the file has it on a CPU, and of tiny"
    assert told("--set", "storage_dtype=nf4") == "nf4"


def test_config_show_says_so_as_data(cli: Cli) -> None:
    def told(*more: object) -> dict[str, dict[str, str]]:
        return json.loads(cli("config", "show", "storage_dtype", "vae_dtype", "speed", "--json", *more).out)

    usual, cpu = told(), told("--device", "cpu")
    assert usual["storage_dtype"] == {
        "value": "nf4", "origin": "default", "note": "nf4 on a GPU; as the file has it on a CPU, and of tiny"
    }  # fmt: skip
    assert cpu["storage_dtype"] == {**usual["storage_dtype"], "in_effect": "auto"}
    assert cpu["vae_dtype"] == {**usual["vae_dtype"], "in_effect": "fp32"}
    assert told("--device", "cuda")["storage_dtype"] == usual["storage_dtype"], "what a GPU keeps is the value"
    assert cpu["speed"] == {"value": "exact", "origin": "default"}
    given = told("--device", "cpu", "--set", "storage_dtype=nf4")["storage_dtype"]
    assert set(given) == {"value", "origin"}


def test_doctor_is_content_with_a_whole_folder(cli: Cli, models: Path) -> None:
    done = cli("doctor", "--models-dir", models, "--json")
    checks = {row["name"]: row for row in json.loads(done.out)["checks"]}
    assert done.code == 0, done.out
    assert "small.safetensors" in checks["models"]["found"]
    for name in ("device", "host memory", "memory"):
        assert "GiB" in checks[name]["found"] and " GB" not in checks[name]["found"], "one unit for memory"
    assert str(models) in checks["clip tokenizer"]["found"]


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("real", [False, True])
def test_doctor_tells_what_happens_without_tokenizers(
    cli: Cli, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real: bool, offline: bool
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "webui" / "models"
    folder.mkdir(parents=True)
    if real:
        shutil.copytree(models, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("tokenizers"))
    ask = (
        "--models-dir",
        folder,
        "--set",
        f"cache_dir={tmp_path / 'cache'}",
        "--offline" if offline else "--no-offline",
    )
    done = cli("doctor", *ask, "--json")
    checks = {row["name"]: row for row in json.loads(done.out)["checks"]}
    home = folder / "tokenizers" / "t5xxl"
    told = checks["t5 tokenizer"]
    assert told["fix"].removeprefix("nothing, where that can be reached; else ").startswith("put tokenizer.json of ")
    assert str(home) in told["fix"]
    if offline:
        draws = cli("generate", "x", "-W", 64, "-H", 64, "-s", 1, *ask)
        assert (done.code, draws.code) == ((9, 3) if real else (0, 0)), draws.err
        assert told["state"] == ("bad" if real else "note")
        assert told["found"].endswith("small cannot draw without" if real else "without; `tiny` has its own")
    else:
        assert (done.code, told["state"]) == (0, "note")
        assert f"{'small' if real else 'a real model'} fetches it once, 2.4 MB from huggingface.co" in told["found"]
    shutil.copytree(TOKENIZERS / "t5xxl", home)
    rows = json.loads(cli("doctor", *ask, "--json").out)["checks"]
    states = {row["name"]: (row["state"], row["found"]) for row in rows}
    assert states["t5 tokenizer"] == ("ok", str(home)) and states["clip tokenizer"][0] != "ok"


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize(("kind", "file"), [("clip", "clip_l/vocab.json"), ("t5", "t5xxl/tokenizer.json")])
def test_doctor_reads_tokenizers(cli: Cli, models: Path, tmp_path: Path, kind: str, file: str, offline: bool) -> None:
    """One that was cut off on its way is there by its marks, and no picture can be drawn with it."""
    folder = tmp_path / "webui" / "models"
    shutil.copytree(models, folder)
    broken = folder / "tokenizers" / file
    broken.write_bytes(broken.read_bytes()[:-9])
    ask = ("--models-dir", folder, "--offline" if offline else "--no-offline")
    done = cli("doctor", *ask, "--json")
    checks = {row["name"]: row for row in json.loads(done.out)["checks"]}
    told = checks[f"{kind} tokenizer"]
    assert done.code == 9 and told["state"] == "bad" and str(broken.parent) in told["found"]
    assert told["fix"].startswith("put " if offline else f"remove {broken.parent}, so that it is fetched anew, or put ")
    assert checks[f"{'t5' if kind == 'clip' else 'clip'} tokenizer"]["state"] == "ok"
    assert draw(cli, folder).code != 0


def test_doctor_looks_for_tokenizers_beside_the_text_encoders(
    cli: Cli, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    encoders = tmp_path / "elsewhere"
    shutil.copytree(models / "text_encoder", encoders)
    shutil.copytree(models, tmp_path / "webui" / "models", ignore=shutil.ignore_patterns("tokenizers", "text_encoder"))
    shutil.copytree(TOKENIZERS, encoders / "tokenizers")
    named = ("--t5", encoders / "t5.safetensors", "--clip", encoders / "clip.safetensors")
    ask = ("--models-dir", tmp_path / "webui" / "models", *named, "--set", f"cache_dir={tmp_path / 'cache'}")
    rows = {row["name"]: row for row in json.loads(cli("doctor", *ask, "--json").out)["checks"]}
    assert rows["clip tokenizer"]["state"] == "ok" and str(encoders) in rows["clip tokenizer"]["found"]


def test_doctor_tells_what_each_extra_is_for_and_how_to_get_it(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    features = {extra: rows for extra, rows in listed.items() if extra not in ("test", "bench", "dev")}
    assert {extra: [re.split("[>=<]", row)[0] for row in rows] for extra, rows in features.items()} == {
        extra: list(packages) for extra, (packages, _) in doctor.EXTRAS.items()
    }
    monkeypatch.setitem(doctor.EXTRAS, "upscale", (("spandrel", "no-such-package"), "upscalers"))
    monkeypatch.setitem(doctor.EXTRAS, "serve", (("pydantic",), "the service"))
    rows = {row["name"]: row for row in json.loads(cli("doctor", "--json").out)["checks"]}
    missing = rows["extra upscale"]
    assert (missing["state"], missing["fix"]) == ("note", "pip install 'lightweight-engine[upscale]'")
    assert missing["found"] == "missing: no-such-package, for upscalers"
    assert rows["extra serve"]["state"] == "ok" and rows["extra serve"]["found"].startswith("installed: pydantic 2.")


def test_doctor_says_what_to_repair(cli: Cli, models: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(models / "Stable-diffusion", broken / "Stable-diffusion")
    (broken / "Stable-diffusion" / "half.safetensors").write_bytes(b"<html>")
    done = cli("doctor", "--models-dir", broken, "--output-dir", "/dev/null/x")
    assert done.code == 9
    assert "-> it is left out; move " in done.out
    assert "holds no T5 text encoder" in done.out
    assert "-> set output_dir to a folder of yours" in done.out


@pytest.mark.parametrize("folder", ["/dev/null/x", "taken", "taken/../x", "missing/../taken/x", "link/x"])
def test_doctor_finds_a_folder_of_outputs_that_cannot_be_made(cli: Cli, tmp_path: Path, folder: str) -> None:
    (tmp_path / "taken").write_text("a file")
    (tmp_path / "link").symlink_to("gone")
    done = cli("doctor", "-o", tmp_path / folder, "--json")
    checks = {row["name"]: row for row in json.loads(done.out)["checks"]}
    assert (done.code, checks["output_dir"]["state"]) == (9, "bad")
    assert checks["output_dir"]["found"].startswith(f"cannot write {tmp_path / folder}: ")
    assert cli("generate", "x", "-o", tmp_path / folder).code == 7, "which refuses it too"
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stesp = 3", "bad.toml: 'stesp' is not a setting; did you mean 'steps'?"),
        ("max_side = 'big'", "max_side (from bad.toml): 'big' is no whole number"),
        ("max_side = [1", "bad.toml is not valid TOML"),
        (None, "bad.toml cannot be read"),
    ],
)
def test_doctor_tells_of_wrong_settings_and_looks_at_the_rest(
    cli: Cli, tmp_path: Path, text: str | None, said: str
) -> None:
    if text is not None:
        (tmp_path / "bad.toml").write_text(text)
    done = cli("doctor", "--config", "bad.toml", "--json")
    checks = {row["name"]: row for row in json.loads(done.out)["checks"]}
    assert (done.code, checks["settings"]["state"]) == (9, "bad")
    assert said in checks["settings"]["found"] and "run doctor again" in checks["settings"]["fix"]
    assert {"python", "torch", "packages"} <= checks.keys()
    assert not {"device", "models", "output_dir"} & checks.keys(), "these go by settings that nobody chose"


def test_an_empty_variable_is_told_of(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "environment" not in cli("doctor").out and not cli("config", "show").err
    monkeypatch.setenv("LWE_STEPS", "")
    monkeypatch.setenv("LWE_API_KEYS", "")
    shown = cli("config", "show", "steps", "--json")
    assert json.loads(shown.out) == {"steps": {"value": 50, "origin": "default"}}
    assert "warning: LWE_STEPS is empty, which counts as not set\n" in shown.err
    checks = {row["name"]: row for row in json.loads(cli("doctor", "--json").out)["checks"]}
    assert checks["environment"]["state"] == "note"
    assert checks["environment"]["found"].startswith("empty, and so not set: ")
    assert {"LWE_STEPS", "LWE_API_KEYS"} == set(checks["environment"]["found"].partition(": ")[2].split(", "))


def test_doctor_fails_for_want_of_a_checkpoint(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "none" / "Stable-diffusion"
    folder.mkdir(parents=True)
    for options, code, states in (
        ((), 0, ["note", "ok"]),
        (("--set", "require_model=true"), 9, ["bad"]),
        (("--set", "require_model=true", "--checkpoint", "tiny"), 0, ["note", "ok"]),
    ):
        done = cli("doctor", "--models-dir", folder.parent, *options, "--json")
        rows = [row["state"] for row in json.loads(done.out)["checks"] if row["name"] == "models"]
        assert (done.code, rows) == (code, states), options
    (folder / "half.safetensors").write_bytes(b"<html>")
    done = cli("doctor", "--models-dir", folder.parent, "--json")
    checks = {row["name"]: row for row in json.loads(done.out)["checks"]}
    assert (done.code, checks["model file"]["state"]) == (9, "bad") and "half" in checks["model file"]["found"]
    assert cli("generate", "x", "--models-dir", folder.parent, "--set", "require_model=true").code == 3


@pytest.mark.parametrize("steps", ["0", "1001", "1.5", "many", ""])
def test_demo_tells_of_wrong_steps_as_generate_does(cli: Cli, steps: str) -> None:
    done, usual = cli("demo", "--steps", steps, "--json"), cli("generate", "x", "--steps", steps, "--json")
    assert done.code == usual.code == 2 and done.err == usual.err and done.out == usual.out
    assert done.err.startswith("error: --steps: ") and "give 1 to 1,000" in done.err


def test_demo_tells_of_an_empty_folder(cli: Cli) -> None:
    done = cli("demo", "-o", "")
    assert (done.code, done.err) == (2, "error: --output-dir: it is empty; give a path, or leave it out\n")


def test_demo_says_at_once_that_its_last_picture_needs_a_package(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    done = cli("demo")
    assert done.code == 8 and "pip install 'lightweight-engine[upscale]'" in done.err and "loading" not in done.err


def test_replay_takes_a_sidecar_and_names_the_picture_of_a_stage(cli: Cli, models: Path) -> None:
    (path,) = draw(cli, models).out.splitlines()
    picture = Path(path)
    told = cli("replay", picture.with_suffix(".json"), "--models-dir", models)
    assert told.code == 0 and told.out.startswith("identical"), told.err
    from PIL import Image

    stage = picture.with_name(f"{picture.stem}-base.png")
    Image.new("RGB", (64, 64)).save(stage)
    done = cli("replay", stage)
    assert done.code == 2 and f"cannot be made again, but {picture.name} may, whose stage it is" in done.err
    picture.with_suffix(".json").rename(picture.with_name("alone.json"))
    assert cli("replay", picture.with_name("alone.json")).code == 2


def test_demo_shows_prompts_loras_and_a_production_job(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    quick = {"hr_steps": 1, "adetailer_args": {"ad_steps": 1}, "adetailer_args_hands": {"ad_steps": 1}}
    monkeypatch.setattr(demo, "JOB", {**demo.JOB, **quick})
    monkeypatch.setattr(demo, "PROMPTS", demo.PROMPTS[:1])
    done = cli("demo", "--steps", 1, "--json")
    assert done.code == 0, done.err
    data = json.loads(done.out)
    assert len(data["images"]) == 1 + len(demo.LORAS) + 1
    assert all(Path(row["path"]).exists() for row in data["images"])
    assert list(Path("outputs/demo").glob("*-production-upscaled.png"))
    with Image.open(data["contact_sheet"]) as sheet:
        assert sheet.width > sheet.height > 0
    told = cli("info", data["images"][-1]["path"]).out
    assert "Hires upscaler: 4x_tiny" in told and "ADetailer model" in told and "Lora hashes" in told
