"""Settings: defaults, precedence, origins, and what wrong ones say."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightweight_engine.config import Config, EngineConfig, empty_variables
from lightweight_engine.errors import ConfigError
from lightweight_engine.request import GenerationRequest


def load(tmp_path: Path, toml: str = "", environ: dict[str, str] | None = None, **flags: object) -> EngineConfig:
    file = tmp_path / "engine.toml"
    file.write_text(toml, encoding="utf-8")
    return EngineConfig.load(file, environ or {}, **flags)


def test_the_plans_defaults() -> None:
    config = Config()
    assert (config.steps, config.cfg_scale, config.distilled_cfg_scale, config.hr_steps) == (50, 1.0, 3.7, 10)
    assert (config.hr_upscaler, config.vae_dtype, config.storage_dtype) == ("4x-UltraSharp", "bf16", "nf4")
    assert (config.vram_state, config.allocator_fraction, config.noise_source) == ("HIGH_VRAM", 0.95, "GPU")
    assert config.pinned_memory and config.async_swap
    assert config.reserve_mb(81_090) == 20_272
    assert (config.max_side, config.max_prompt_chars) == (4096, 20_000)


def test_request_defaults_are_the_requests_own() -> None:
    assert GenerationRequest(**Config().request_defaults()) == GenerationRequest()


def test_precedence_and_origins(tmp_path: Path) -> None:
    toml = 'steps = 10\ncfg_scale = 2.0\nsampler = "Heun"\ndistilled_cfg_scale = 3'
    config = load(tmp_path, toml, {"LWE_STEPS": "11", "LWE_CFG_SCALE": "3.5"}, steps=12)
    assert (config.steps, config.cfg_scale, config.sampler, config.scheduler) == (12, 3.5, "Heun", "Simple")
    names = ("steps", "cfg_scale", "sampler", "scheduler")
    file = str(tmp_path / "engine.toml")
    assert [config.origin(name) for name in names] == ["--steps", "LWE_CFG_SCALE", file, "default"]
    assert Config(steps=3).origin("steps") == "argument"


def test_whole_folders_are_the_same_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plain = Config(models_dir="a/b", steps=3)
    whole = plain.with_whole_folders()
    assert (whole.models_dir, whole.output_dir, whole.steps) == (tmp_path / "a/b", tmp_path / "outputs", 3)
    origins = [[each.origin(name) for name in EngineConfig.model_fields] for each in (plain, whole)]
    assert origins[0] == origins[1] and whole.is_set("models_dir") and not whole.is_set("output_dir")


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        (
            {"LWE_WIDTH": "5000"},
            r"width \(from LWE_WIDTH\): 5,000 is over the limit of 4,096 pixels",
        ),
        ({"LWE_HEIGHT": "1024", "LWE_MAX_SIDE": "512"}, r"height \(from LWE_HEIGHT\): 1,024 is over the limit of 512"),
    ],
)
def test_a_default_side_is_within_the_limit(tmp_path: Path, environ: dict[str, str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load(tmp_path, environ=environ)
    assert load(tmp_path, environ={**environ, "LWE_MAX_SIDE": "5008"})


def test_rows_name_every_setting_once() -> None:
    assert [name for _, name, _, _ in Config().rows()] == list(EngineConfig.model_fields)
    assert all(info.description for info in EngineConfig.model_fields.values())


def test_flags_not_given_change_nothing(tmp_path: Path) -> None:
    assert load(tmp_path, "steps = 7", steps=None).steps == 7


def test_environment_values_are_read_by_type(tmp_path: Path) -> None:
    environ = {"LWE_OFFLINE": "true", "LWE_THREADS": "2", "LWE_TOKENIZER_DIRS": "/a:/b", "LWE_DEVICE": "", "HOME": "/"}
    config = load(tmp_path, environ=environ)
    assert config.offline and config.threads == 2 and config.device == "auto"
    assert config.tokenizer_dirs == (Path("/a"), Path("/b"))
    assert load(tmp_path, environ={"LWE_TOKENIZER_DIR": "/a"}).tokenizer_dirs == (Path("/a"),)


def test_paths_of_a_file_start_from_its_folder(tmp_path: Path) -> None:
    config = load(tmp_path, 'models_dir = "m"\noutput_dir = "/o"\ntokenizer_dirs = ["t"]')
    assert (config.models_dir, config.output_dir) == (tmp_path / "m", Path("/o"))
    assert config.tokenizer_dirs == (tmp_path / "t",)


def test_the_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir()
    (home / "lightweight-engine").mkdir(parents=True)
    (home / "lightweight-engine" / "engine.toml").write_text("steps = 1")
    named = tmp_path / "named.toml"
    named.write_text("steps = 3")
    monkeypatch.chdir(work)
    environ = {"XDG_CONFIG_HOME": str(home)}
    assert EngineConfig.load(environ=environ).steps == 1
    (work / "engine.toml").write_text("steps = 2")
    assert EngineConfig.load(environ=environ).steps == 2
    assert EngineConfig.load(environ={**environ, "LWE_CONFIG": str(named)}).steps == 3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"stepz": 3}, "did you mean 'steps'"),
        ({"quux_zzz": 3}, "config show"),
        ({"steps": 0}, "steps"),
        ({"steps": "many"}, "steps"),
        ({"width": 8}, "width"),
        ({"device": "gpu"}, "auto, cpu, cuda or cuda:N"),
        ({"device": "cpu:1"}, "auto, cpu, cuda or cuda:N"),
        ({"compute_dtype": "int8"}, "compute_dtype"),
        ({"inference_reserve": 2}, "inference_reserve"),
        ({"storage_dtype": "int3"}, "fp8_e4m3"),
        ({"storage_dtype": "gguf:Q4_K"}, "gguf:Q8_0"),
        ({"sampler": "Eulerr"}, "choose one of: DPM\\+\\+ 2M"),
        ({"scheduler": "Turbo"}, "not valid for Flux"),
        ({"max_side": 4}, "max_side"),
        ({"models_dir": 5}, "^models_dir: 5 is no path; give one as a text$"),
        ({"tokenizer_dirs": [5]}, "^tokenizer_dirs: 5 is no path"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        Config(**settings)
    assert "\n" not in str(raised.value) and raised.value.exit_code == 2


def test_an_error_says_where_the_value_came_from(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^steps \(from LWE_STEPS\)"):
        load(tmp_path, environ={"LWE_STEPS": "0"})
    with pytest.raises(ConfigError, match=r"^threads \(from --threads\): -1 is too small; give 0 to 1,024$"):
        load(tmp_path, threads=-1)
    with pytest.raises(ConfigError, match=r"^vram_limit .*'8 GB' is no number; .*; it is a number of GiB"):
        load(tmp_path, vram_limit="8 GB")
    for given, told in (
        ("steps = 'thirty'", "'thirty' is no whole number; give 1 to 1,000"),
        ("width = 3", "give 16 or more"),
    ):
        with pytest.raises(ConfigError, match=rf"^\w+ \(from .*engine.toml\): .*{told}$"):
            load(tmp_path, given)
    with pytest.raises(ConfigError, match=r"^threads \(from --set threads\)"):
        load(tmp_path, assigned={"threads": -1})
    with pytest.raises(ConfigError, match=r"engine.toml: 'stepz' is not a setting; did you mean 'steps'"):
        load(tmp_path, "stepz = 3")
    with pytest.raises(ConfigError, match=r"engine.toml: settings have no sections; leave out \[service\]"):
        load(tmp_path, "steps = 3\n[service]\nport = 8000")


@pytest.mark.parametrize(
    "name",
    ["models_dir", "output_dir", "cache_dir", "checkpoint", "t5", "clip", "vae", "host"]
    + ["sampler", "scheduler", "hr_upscaler"],
)
def test_an_empty_text_is_no_name(tmp_path: Path, name: str) -> None:
    told = r"it is empty; give a text, or leave it out$"
    for given in ({"assigned": {name: ""}}, {name: ""}):
        with pytest.raises(ConfigError, match=rf"^{name} \(from --.*\): {told}"):
            load(tmp_path, **given)
    with pytest.raises(ConfigError, match=rf"^{name} \(from .*engine.toml\): {told}"):
        load(tmp_path, f"{name} = ''")


@pytest.mark.parametrize(
    ("keys", "key", "told"),
    [
        ("", "who-gathers", "without api_keys all callers may read /metrics; set api_keys too"),
        ("some-key", "abc12", "a key is shorter than 8 characters"),
        ("some-key", "with spaces", "a key is empty, or holds spaces"),
    ],
)
def test_a_key_for_metrics_that_would_not_be_one(tmp_path: Path, keys: str, key: str, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"^metrics_key \(from LWE_METRICS_KEY\): {told}") as caught:
        load(tmp_path, environ={"LWE_API_KEYS": keys, "LWE_METRICS_KEY": key})
    assert key not in str(caught.value)


def test_an_empty_variable_counts_as_not_set(tmp_path: Path) -> None:
    environ = {"LWE_STEPS": "", "LWE_API_KEYS": "", "LWE_WIDTH": "64", "HOME": "", "OTHER_LWE_STEPS": ""}
    config = load(tmp_path, "steps = 3", environ)
    assert (config.steps, config.width, config.origin("api_keys")) == (3, 64, "default")
    assert config.origin("steps") == str(tmp_path / "engine.toml")
    assert empty_variables(environ) == ["LWE_STEPS", "LWE_API_KEYS"]


@pytest.mark.parametrize(
    ("variable", "said"),
    [
        ("LWE_MODEL_DIR", "did you mean 'LWE_MODELS_DIR'"),
        ("LWE_API_TOKEN", "did you mean 'LWE_"),
        ("LWE_QUUX_ZZZ", "config show"),
    ],
)
def test_a_variable_that_is_no_setting_is_refused(tmp_path: Path, variable: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"the environment variable '{variable}' is not a setting; .*{said}"):
        load(tmp_path, environ={variable: "x"})
    assert load(tmp_path, environ={variable: ""}) == load(tmp_path)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("LWE_PORT", "tcp://10.0.0.7:7860"),
        ("LWE_PORT", "udp://10.0.0.7:7860"),
        ("LWE_SERVICE_HOST", "10.0.0.7"),
        ("LWE_SERVICE_PORT", "7860"),
        ("LWE_SERVICE_PORT_HTTP", "7860"),
        ("LWE_PORT_7860_TCP", "tcp://10.0.0.7:7860"),
        ("LWE_PORT_7860_TCP_ADDR", "10.0.0.7"),
        ("LWE_PORT_7860_TCP_PROTO", "tcp"),
    ],
)
def test_addresses_of_a_service_called_lwe_are_told_as_such(tmp_path: Path, variable: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"'{variable}' is no setting, but an address .*enableServiceLinks: false"):
        load(tmp_path, environ={variable: value})


def test_a_port_is_a_port(tmp_path: Path) -> None:
    assert load(tmp_path, environ={"LWE_PORT": "8080"}).port == 8080
    with pytest.raises(ConfigError, match=r"^port \(from LWE_PORT\)"):
        load(tmp_path, environ={"LWE_PORT": "http://10.0.0.7"})


def test_variables_that_are_no_settings_are_left_alone(tmp_path: Path) -> None:
    assert load(tmp_path, environ={"LWE_GOLDEN_DIR": "x", "LWENGINE": "7"}) == load(tmp_path)


@pytest.mark.parametrize("toml", ["steps =", "\xff", "steps = 1\n[steps]\na = 2"])
def test_a_broken_file_is_refused(tmp_path: Path, toml: str) -> None:
    (tmp_path / "engine.toml").write_bytes(toml.encode("latin-1"))
    with pytest.raises(ConfigError, match="not valid TOML"):
        EngineConfig.load(tmp_path / "engine.toml", {})


@pytest.mark.parametrize(
    ("toml", "told"),
    [
        ("port = 1\n\nsteps = 2\nport = 3\n", "port stands there twice (lines 1 and 4)"),
        ("port = 1\nport = 3", "port stands there twice (lines 1 and 2)"),
        ("host_names = [\n'a']\nhost_names = [\n'b',\n]\nsteps = 2", "host_names stands there twice (lines 1 and 3)"),
        ('[tokens]\n"a.org" = "SECRET"\n"a.org" = "SECRET"\n', '"a.org" stands there twice (lines 2 and 3)'),
    ],
)
def test_a_key_that_stands_twice_is_named_with_its_lines(tmp_path: Path, toml: str, told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, toml)
    assert str(raised.value) == f"{tmp_path / 'engine.toml'}: {told}; keep one"


def test_a_missing_file_is_refused_where_it_was_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        EngineConfig.load(tmp_path / "none.toml", {})


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("bnb-nf4", "nf4"),
        ("bnb-nf4 (fp16 LoRA)", "nf4"),
        ("Automatic (fp16 LoRA)", "auto"),
        ("float8-e4m3fn", "fp8_e4m3"),
        ("float8-e5m2 (fp16 LoRA)", "fp8_e5m2"),
        ("FP16", "fp16"),
        ("gguf:Q5_1", "gguf:Q5_1"),
    ],
)
def test_forges_storage_names(given: str, kept: str) -> None:
    assert Config(storage_dtype=given).storage_dtype == kept


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(Exception, match="frozen"):
        Config().steps = 3  # type: ignore[misc]


class TestNetwork:
    def test_tokens_come_from_every_layer(self, tmp_path: Path) -> None:
        environ = {"HF_TOKEN": "hf-1", "CIVITAI_TOKEN": "c-1", "LWE_TOKENS": "civitai.com=c-2, files.example:8443=x"}
        config = load(tmp_path, 'tokens = {"example.org" = "e-1"}', environ)
        found = {host: token.get_secret_value() for host, token in config.tokens.items()}
        assert found == {
            "huggingface.co": "hf-1",
            "civitai.com": "c-2",
            "example.org": "e-1",
            "files.example:8443": "x",
        }
        assert config.origin("tokens").startswith("HF_TOKEN, CIVITAI_TOKEN, ")
        assert Config().tokens == {}

    def test_tokens_are_never_shown(self, tmp_path: Path) -> None:
        config = Config(tokens={"civitai.com": "sparrow"})
        shown = (repr(config), str(config), config.model_dump_json(), str(list(config.rows())))
        assert not any("sparrow" in text for text in shown)
        words = ("sparrow", "civitai.com=sparrow sparrow", "sparrow sparrow=x")
        for wrong in (*words, 7, {"civitai.com": 7}, ["sparrow"]):
            with pytest.raises(ConfigError, match="tokens") as caught:
                Config(tokens=wrong)
            assert "sparrow" not in str(caught.value)

    def test_allowed_hosts_are_hosts_with_ports(self, tmp_path: Path) -> None:
        config = load(tmp_path, environ={"LWE_ALLOW_HOSTS": "Localhost:80, [::1]:8000"})
        assert config.allow_hosts == ("localhost:80", "[::1]:8000")
        for wrong in ("localhost", "localhost:0", "localhost:99999", "http://localhost:80", "*:80", 5):
            with pytest.raises(ConfigError, match="host:port"):
                Config(allow_hosts=wrong)


def test_names_and_pages_are_those_that_a_caller_can_send(tmp_path: Path) -> None:
    environ = {
        "LWE_HOST_NAMES": "Pics.example, [::1], 10.0.0.5",
        "LWE_ALLOWED_ORIGINS": "https://App.example/, http://localhost:5173, null",
    }
    config = load(tmp_path, environ=environ)
    assert config.host_names == ("pics.example", "::1", "10.0.0.5")
    assert config.allowed_origins == ("https://app.example", "http://localhost:5173", "null")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *(("host_names", text) for text in ("*", "*.example", "https://pics.example", "pics.example:443", "a b")),
        *(("allowed_origins", text) for text in ("*", "app.example", "https://app.example/ui", "https://*.example")),
    ],
)
def test_names_and_pages_that_no_caller_sends_are_refused(tmp_path: Path, name: str, wrong: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, environ={f"LWE_{name.upper()}": f"localhost,{wrong}" if name == "host_names" else wrong})
    assert f"{name} (from LWE_{name.upper()})" in str(caught.value) and str(caught.value).count(repr(wrong)) == 1
    assert "write it as" in str(caught.value) and ", not " not in str(caught.value)


@pytest.mark.parametrize("keys", ["zq9", "seven77", "long-enough,short"])
def test_short_keys_are_refused_and_not_shown(tmp_path: Path, keys: str) -> None:
    with pytest.raises(ConfigError, match="shorter than 8 characters") as caught:
        load(tmp_path, environ={"LWE_API_KEYS": keys})
    assert keys.rpartition(",")[2] not in str(caught.value).split() and "long-enough" not in str(caught.value)


def numbers() -> list[str]:
    """The settings that their schema calls numbers."""
    fields = EngineConfig.model_json_schema()["properties"]
    kinds = {name: [each.get("type") for each in row.get("anyOf", [row])] for name, row in fields.items()}
    return [name for name, types in kinds.items() if {"integer", "number"} & set(types)]


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("name", numbers())
def test_a_switch_is_no_number(tmp_path: Path, name: str, value: bool) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} \(from .*\): true and false are no numbers; give (?!a number)"):
        load(tmp_path, f"{name} = {str(value).lower()}")
