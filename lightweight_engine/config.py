"""Settings of the engine: each with its bounds, its help, and where its value came from. Loads no torch.

Precedence: defaults < engine.toml < ``LWE_*`` environment < flags. ``EngineConfig.load`` reads them all;
``EngineConfig(...)`` takes keyword arguments and nothing else, for programs that decide everything themselves.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticKnownError

from .errors import ConfigError, RequestError
from .fields import PlainNumbers, limits_at, plain
from .labels import resolve_sampler, storage_format
from .request import MODEL_FIELDS, GenerationRequest, ImageFormat, NoiseSource

PREFIX = "LWE_"
FILE_NAME = "engine.toml"
FILE_VARIABLE = f"{PREFIX}CONFIG"

DType = Literal["auto", "bf16", "fp16", "fp32"]

# Variables of other programs -> the host that their tokens are for. What is set here wins.
TOKEN_VARIABLES = {
    "HF_TOKEN": "huggingface.co",
    "CIVITAI_API_TOKEN": "civitai.com",
    "CIVITAI_TOKEN": "civitai.com",
}

# Singular where one is the usual number.
_ALIASES = {"tokenizer_dir": "tokenizer_dirs"}

_FOLDERS = ("models_dir", "output_dir", "cache_dir")

# Variables with our prefix that are no settings: the file of settings, and where tests look for goldens.
_NO_SETTINGS = {FILE_VARIABLE, f"{PREFIX}GOLDEN_DIR"}

# What Docker and Kubernetes put into the environment for a service of our name, as its address.
_LINK = re.compile(rf"{PREFIX}(?:SERVICE_(?:HOST|PORT(?:_\w+)?)|PORT_\d+_(?:TCP|UDP|SCTP)(?:_(?:ADDR|PORT|PROTO))?)")
_LINK_PORT, _LINK_URL = f"{PREFIX}PORT", re.compile(r"(?:tcp|udp|sctp)://")

_KEY = re.compile(r"""\s*("[^"]+"|'[^']+'|[\w.-]+)\s*=""")  # of a line of TOML

_HOST_PORT = re.compile(r"(?:[a-z0-9._-]+|\[[0-9a-f:.]+\]):(?P<port>[0-9]{1,5})")
_HOST = re.compile(r"(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")
_HOST_NAME = re.compile(r"[a-z0-9._-]+|[0-9a-f:]*:[0-9a-f:.]+")  # or an address of IPv6, without brackets
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?|null")
_TOKEN = re.compile(r"[!-~]{1,4096}")  # what fits into a header
_MIN_KEY = 8  # characters: a shorter one is guessed, and taken out of the log wherever it stands in a word


_RULES = ("ge", "gt", "le", "min_length")  # of a request's field, which hold for the setting of its name


def default_cache_dir() -> Path:
    """Where fetched files and hashes are kept, by the XDG convention."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightweight-engine"


def _setting(default: Any, section: str, help: str, **bounds: Any) -> Any:
    made = "default_factory" if callable(default) else "default"
    return Field(**{made: default}, description=help, json_schema_extra={"section": section}, **bounds)


def _request(name: str) -> Any:
    """The default of a request field, with the help and the bounds that the request gives it."""
    info = GenerationRequest.model_fields[name]
    bounds = {rule: getattr(each, rule) for each in info.metadata for rule in _RULES if hasattr(each, rule)}
    return _setting(info.default, "request", info.description or "", **bounds)


class EngineConfig(PlainNumbers):
    """Every setting of the engine. Wrong ones raise ``ConfigError``, which says where the value came from."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    models_dir: Path = _setting(
        Path("models"), "files", "Folder with model files: ours, or that of a WebUI, Forge or ComfyUI. Only read."
    )
    checkpoint: str | None = _setting(
        None, "files", "Checkpoint to use, by name or path; left out, the first found.", min_length=1
    )
    require_model: bool = _setting(
        False,
        "files",
        "Refuse to start where no checkpoint is found and none is named, instead of drawing with `tiny`.",
    )
    t5: str | None = _setting(None, "files", "T5 text encoder to use in place of the one found.", min_length=1)
    clip: str | None = _setting(None, "files", "CLIP text encoder to use in place of the one found.", min_length=1)
    vae: str | None = _setting(None, "files", "Autoencoder to use in place of the one found.", min_length=1)
    variant: Literal["auto", "dev", "schnell"] = _setting(
        "auto",
        "files",
        "Whose noise schedule the checkpoint needs; auto, told by its guidance weights, which some de-distilled files "
        "of dev lack.",
    )
    tokenizer_dirs: tuple[Path, ...] = _setting((), "files", "Further folders to look for tokenizer files in.")
    output_dir: Path = _setting(Path("outputs"), "files", "Where pictures are saved.")
    cache_dir: Path = _setting(default_cache_dir, "files", "Where fetched tokenizers and hashes of files are kept.")
    offline: bool = _setting(False, "files", "Fetch nothing from the network.")

    device: str = _setting("auto", "device", "auto, cpu, cuda or cuda:N.")
    threads: int = _setting(0, "device", "Threads on the CPU; 0 leaves it to torch.", ge=0, le=1024)
    compute_dtype: DType = _setting("auto", "device", "What the transformer computes in.")
    vae_dtype: DType = _setting("bf16", "device", "What the autoencoder computes in; on a CPU float32, unless set.")
    text_compute_dtype: Literal["fp32", "bf16"] = _setting(
        "fp32", "device", "What the text encoders compute in; bf16 is ten times as fast, and moves pictures a little."
    )
    speed: Literal["exact", "fp8"] = _setting(
        "exact",
        "device",
        "fp8 computes the transformer's blocks in 8 bits where the GPU can, products and on Hopper attention, which is "
        "faster and changes pictures a little; their weights are kept in 8 bits then, whatever storage_dtype says.",
    )
    cuda_graphs: bool = _setting(
        True, "device", "Record a step of each pass and replay it, where all of the transformer is on the GPU."
    )
    noise_source: NoiseSource = _setting("GPU", "device", "Where noise is drawn, as in Forge; on a CPU, GPU means CPU.")

    storage_dtype: str = _setting(
        "nf4",
        "memory",
        "How the transformer's weights are kept; Forge's names are understood too. Unless set, a CPU and `tiny` keep "
        "what the file has. Files that are quantised already are used as they are, but for bf16, fp16 and fp32.",
    )
    text_storage_dtype: str = _setting(
        "auto", "memory", "How the text encoders' weights are kept; auto, as their files have them."
    )
    quantized_cache: bool = _setting(
        False, "memory", "Keep what was quantised on load in cache_dir, so that the next start reads a third."
    )
    quantized_cache_gib: float = _setting(
        64.0, "memory", "Most that these files may take together, in GiB; those used last stay.", gt=0
    )
    vram_state: Literal["NO_VRAM", "LOW_VRAM", "NORMAL_VRAM", "HIGH_VRAM", "SHARED"] = _setting(
        "HIGH_VRAM",
        "memory",
        "HIGH and SHARED keep all that fits, NORMAL drops modulation weights while sampling, LOW keeps nothing between "
        "stages, NO streams every block.",
    )
    vram_limit: float | None = _setting(None, "memory", "Most memory that may be taken, in GiB.", gt=0)
    residency: Literal["stored", "fast"] = _setting(
        "stored",
        "memory",
        "fast keeps the transformer's weights as numbers too, LoRAs added to them, where all of it fits: no step "
        "unpacks weights or pays for LoRAs, for 16 GiB more.",
    )
    inference_reserve: float = _setting(
        0.25, "memory", "Share of the GPU's memory that models leave free.", ge=0, le=0.9
    )
    allocator_fraction: float = _setting(
        0.95, "memory", "Share of the GPU's memory that may be taken at all.", gt=0, le=1
    )
    pinned_memory: bool = _setting(True, "memory", "Keep weights that wait on the host in pinned memory.")
    async_swap: bool = _setting(True, "memory", "Move weights while the GPU computes.")

    allow_hosts: tuple[str, ...] = _setting(
        (), "network", "host:port entries that may be of a private network, use another port, and do without https."
    )
    tokens: dict[str, SecretStr] = _setting(
        dict, "network", "host=token entries, sent to that host alone; HF_TOKEN and CIVITAI_TOKEN are understood too."
    )
    download_max_gib: float = _setting(4.0, "network", "Longest LoRA file that is fetched, in GiB.", gt=0)
    download_timeout: float = _setting(30.0, "network", "Seconds that one wait for a server may take.", gt=0)
    download_seconds: float = _setting(1800.0, "network", "Seconds that one file may take in all.", gt=0)
    download_min_speed: float = _setting(
        10_000.0, "network", "Bytes a second that a server must send; slower ones are given up.", ge=0
    )
    download_cache_gib: float = _setting(
        20.0, "network", "Most that fetched files may take together in cache_dir, in GiB; those used last stay.", gt=0
    )
    checkpoint_max_gib: float = _setting(
        32.0, "network", "Longest checkpoint that predict() fetches by URL, in GiB.", gt=0
    )
    checkpoint_cache_gib: float = _setting(
        64.0, "network", "Most that fetched checkpoints may take together in cache_dir, in GiB.", gt=0
    )

    max_side: int = _setting(4096, "limits", "Longest side of a picture, in pixels.", ge=16, le=16384)
    max_outputs: int = _setting(64, "limits", "Pictures in one request.", ge=1, le=1024)
    max_picture_megapixels: float = _setting(
        40.0, "limits", "Megapixels of a picture that a request brings; more are not decoded.", gt=0, le=1000
    )
    max_prompt_chars: int = _setting(20_000, "limits", "Characters in a prompt.", ge=1)
    max_prompt_tokens: int = _setting(
        4_096, "limits", "Tokens of T5 in a prompt, of which each part between BREAKs takes 256 or more.", ge=256
    )
    max_prompt_texts: int = _setting(
        64, "limits", "Texts of a prompt that are encoded: parts by AND, of its schedules, or between [SEP].", ge=1
    )
    max_megapixel_steps: float = _setting(
        4_000.0, "limits", "Work of one pass: megapixels x model calls x pictures.", gt=0
    )

    lora_merge: bool = _setting(
        False, "LoRA", "Merge LoRAs into 16- and 32-bit weights, instead of letting them act beside: slower to change."
    )
    exact_dora: bool = _setting(
        False, "LoRA", "DoRA measures the changed weight, as in training; off, the weight itself, as Forge does."
    )

    ad_order: Literal["None", "Position (left to right)", "Position (center to edge)", "Area (large to small)"] = (
        _setting("None", "detailer", "In which order the detailer paints what it found; None is surest first.")
    )
    ad_dynamic_denoise_power: float = _setting(
        0.0, "detailer", "Above 0, large boxes are changed less; below, more.", ge=-10, le=10
    )
    ad_match_size: Literal["Off", "Strict (SDXL only)", "Free"] = _setting(
        "Off", "detailer", "Whether a box is drawn at a size of its own aspect."
    )
    ad_same_seed: bool = _setting(False, "detailer", "Every mask has the seed of the picture, instead of counting up.")

    host: str = _setting("127.0.0.1", "service", "Address that the service listens on.", min_length=1)
    port: int = _setting(7860, "service", "Port that it listens on; 0 takes a free one.", ge=0, le=65535)
    api_keys: tuple[SecretStr, ...] = _setting(
        (), "service", "Keys, of which every caller must send one; needed where host is no loopback address."
    )
    metrics_key: SecretStr | None = _setting(
        None, "service", "A key that opens /metrics and nothing else, for who gathers them; beside api_keys."
    )
    host_names: tuple[str, ...] = _setting(
        (), "service", "Names by which callers reach the service, beside localhost and its address."
    )
    allowed_origins: tuple[str, ...] = _setting(
        (), "service", "Web pages that may call the service, as https://example.org; none, only its own."
    )
    queue_max: int = _setting(16, "service", "Jobs that wait at most; more are refused with 429.", ge=1, le=10_000)
    queue_max_per_key: int = _setting(
        0, "service", "Jobs of one key, or without keys of one address, that wait at most; 0 is queue_max.", ge=0
    )
    job_seconds: float = _setting(600.0, "service", "Longest that a job may wait and run, together.", gt=0)
    canary_minutes: float = _setting(
        0.0,
        "service",
        "How long a job that went well counts as readiness, in minutes; a tiny job is drawn where there are none for "
        "half of it. 0 draws none, and readiness is that of the process.",
        ge=0,
    )
    warm_up: bool = _setting(
        False, "service", "Draw a tiny job before the service is ready, so that the first caller need not wait for it."
    )
    drain_seconds: float = _setting(
        30.0, "service", "Seconds that a running job is given when it is told to end.", ge=0
    )
    max_body_mib: float = _setting(32.0, "service", "Longest body of a request, in MiB.", gt=0, le=1024)
    header_seconds: float = _setting(10.0, "service", "Seconds that the head of a request may take to come.", gt=0)
    body_seconds: float = _setting(60.0, "service", "Seconds that the body of a request may take to come.", gt=0)
    keep_results_mib: float = _setting(
        256.0, "service", "Finished pictures that are kept, in MiB; older ones go.", gt=0
    )
    keep_results_seconds: float = _setting(3600.0, "service", "How long finished pictures are kept.", gt=0)
    fetch_pictures: bool = _setting(
        False, "service", "Fetch start pictures that callers name by URL, behind the guards."
    )
    sdapi_cfg: Literal["literal", "distilled"] = _setting(
        "literal",
        "service",
        "What Forge's API does with a cfg_scale that comes without a negative prompt: literal, as it says; distilled, "
        "1, with the distilled guidance at 3.5, unless that was sent too.",
    )

    width: int | None = _request("width")
    height: int | None = _request("height")
    steps: int = _request("steps")
    cfg_scale: float = _request("cfg_scale")
    distilled_cfg_scale: float | None = _request("distilled_cfg_scale")
    sampler: str = _request("sampler")
    scheduler: str = _request("scheduler")
    hr_scale: float = _request("hr_scale")
    hr_steps: int = _request("hr_steps")
    hr_upscaler: str = _request("hr_upscaler")
    output_format: ImageFormat = _request("output_format")

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    def __init__(self, /, *, origins: Mapping[str, str] | None = None, **settings: Any) -> None:
        """``origins`` says where each of the settings came from, for messages and ``origin``."""
        refuse_unknown(settings)
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise ConfigError(_one_line(error, origins or {})) from None
        self._origins.update(origins or {})

    @classmethod
    def load(
        cls,
        file: Path | None = None,
        environ: Mapping[str, str] | None = None,
        assigned: Mapping[str, Any] | None = None,
        **flags: Any,
    ) -> EngineConfig:
        """The settings of this machine: file, environment and ``flags`` over the defaults.

        Args:
            file: the TOML file to read; left out, that of ``LWE_CONFIG``, else ``engine.toml`` in the working folder
                or in the user's configuration folder, where there is one.
            environ: left out, the environment of this process.
            assigned: what was given by ``--set``; it wins over the flags.
            flags: settings that win over those; None counts as not given.

        Raises:
            ConfigError: a name is unknown, a value is wrong, or the file cannot be read.
        """
        environ = os.environ if environ is None else environ
        values: dict[str, Any] = {}
        origins: dict[str, str] = {}
        given = {name: value for name, value in flags.items() if value is not None}
        refuse_unknown({**given, **(assigned or {})})
        flagged = (*_from_flags(given), *((name, value, f"--set {name}") for name, value in (assigned or {}).items()))
        own = (_from_file(_find_file(file, environ)), _from_environment(environ), flagged)
        layers = (_from_other_programs(environ), *own)
        for name, value, origin in (row for layer in layers for row in layer):
            if name == "tokens" and name in values:  # each layer may name other hosts
                value, origin = _joined_tokens(values[name], value), f"{origins[name]}, {origin}"
            values[name], origins[name] = value, origin
        return cls(origins=origins, **values)

    def origin(self, name: str) -> str:
        """Where a setting's value came from: ``default``, a file, a variable, a flag, or ``argument``."""
        if name in self._origins:
            return self._origins[name]
        return "argument" if name in self.model_fields_set else "default"

    def is_set(self, name: str) -> bool:
        """Whether somebody chose the value, even if it is the default's."""
        return name in self.model_fields_set

    def rows(self) -> Iterator[tuple[str, str, Any, str]]:
        """(section, name, value, origin) of every setting, in order."""
        for name, info in type(self).model_fields.items():
            yield _extra(info)["section"], name, getattr(self, name), self.origin(name)

    def request_defaults(self) -> dict[str, Any]:
        """What a request that leaves these fields out is given."""
        return {name: value for section, name, value, _ in self.rows() if section == "request"}

    def with_model_of(self, request: GenerationRequest) -> EngineConfig:
        """These settings with the model that a request names; these themselves, where it names none."""
        named = {name: value for name in MODEL_FIELDS if (value := getattr(request, name)) is not None}
        if not named:
            return self
        made = self.model_copy(update=named)
        made._origins = {**self._origins, **dict.fromkeys(named, "request")}
        return made

    def with_whole_folders(self) -> EngineConfig:
        """These settings with the whole paths of folders, which is how messages for others know what to leave out."""
        folders = {name: getattr(self, name).absolute() for name in _FOLDERS}
        made = self.model_copy(update=folders)
        made.model_fields_set.intersection_update(self.model_fields_set)  # nobody chose more than before
        return made

    @property
    def model(self) -> tuple[tuple[Any, bool], ...]:
        """What the settings say of the model: values, and whether somebody chose them."""
        return tuple((getattr(self, name), self.is_set(name)) for name in MODEL_FIELDS)

    def reserve_mb(self, total_mb: int) -> int:
        """Megabytes of a GPU's ``total_mb`` that models leave free."""
        return int(total_mb * self.inference_reserve)

    @field_validator("tokenizer_dirs", mode="before")
    @classmethod
    def _split_list(cls, value: Any) -> Any:
        """A list as one string is how an environment variable has it: parted as in PATH."""
        return tuple(part for part in value.split(os.pathsep) if part) if isinstance(value, str) else value

    @field_validator("api_keys", "host_names", "allowed_origins", mode="before")
    @classmethod
    def _split_commas(cls, value: Any) -> Any:
        """A list as one string, as an environment variable or ``--set`` has it."""
        return tuple(filter(None, (part.strip() for part in value.split(",")))) if isinstance(value, str) else value

    @field_validator("api_keys", mode="after")
    @classmethod
    def _keys(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for key in value:
            _check_key(key)
        return value

    @field_validator("metrics_key", mode="after")
    @classmethod
    def _key(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            _check_key(value)
        return value

    @field_validator("host_names", mode="after")
    @classmethod
    def _host_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """Names as a caller's ``Host`` has them: any other would never be met."""
        names = [name.lower().removeprefix("[").removesuffix("]") for name in value]
        return _as_sent(value, names, _HOST_NAME, "name of a host; write it as pics.example.org")

    @field_validator("allowed_origins", mode="after")
    @classmethod
    def _origins_of_pages(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """Origins as a browser sends them: any other would never be met."""
        pages = [page.lower().removesuffix("/") for page in value]
        return _as_sent(value, pages, _ORIGIN, "origin; write it as https://example.org")

    @field_validator("allow_hosts", mode="before")
    @classmethod
    def _hosts(cls, value: Any) -> Any:
        """host:port entries, or one string with commas between them, in lower case."""
        items = [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise ValueError("must be a list of host:port entries")
        entries = tuple(str(item).lower() for item in items)
        for entry in entries:
            found = _HOST_PORT.fullmatch(entry)
            if not found or not 1 <= int(found["port"]) <= 65535:
                raise ValueError(f"{entry!r:.80} is no host:port entry; write it as localhost:8000")
        return entries

    @field_validator("tokens", mode="before")
    @classmethod
    def _tokens(cls, value: Any) -> Any:
        return _as_tokens(value)

    @field_validator(*_FOLDERS, mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        """An empty text would be the working folder."""
        if value == "":
            raise PydanticKnownError("string_too_short", {"min_length": 1})
        return value

    @field_validator(*_FOLDERS, mode="after")
    @classmethod
    def _home(cls, value: Path) -> Path:
        return value.expanduser()

    @field_validator("device", mode="after")
    @classmethod
    def _device(cls, value: str) -> str:
        name, _, index = value.partition(":")
        if name not in ("auto", "cpu", "cuda") or (index and (name != "cuda" or not index.isdecimal())):
            raise ValueError("must be auto, cpu, cuda or cuda:N")
        return value

    @field_validator("storage_dtype", "text_storage_dtype", mode="after")
    @classmethod
    def _storage(cls, value: str) -> str:
        return storage_format(value)

    @model_validator(mode="after")
    def _as_request(self) -> EngineConfig:
        """The request's own rules hold for its defaults."""
        try:
            GenerationRequest(**self.request_defaults())
            resolve_sampler(self.sampler, self.scheduler)
        except RequestError as error:
            raise ValueError(str(error)) from None
        for name in ("width", "height"):
            if (side := getattr(self, name) or 0) > self.max_side:  # no request that leaves it out would be drawn
                limit = f"the limit of {self.max_side:,} pixels (setting max_side)"
                raise ValueError(f"{name}: {side:,} is over {limit}; set it lower, or max_side higher")
        return self

    @model_validator(mode="after")
    def _keys_beside(self) -> EngineConfig:
        if self.metrics_key is not None and not self.api_keys:
            raise ValueError("metrics_key: without api_keys all callers may read /metrics; set api_keys too, or no key")
        return self


Config = EngineConfig
"""The name that the first plan of this engine gave."""


def _extra(info: Any) -> dict[str, Any]:
    return info.json_schema_extra


def _one_line(error: ValidationError, origins: Mapping[str, str]) -> str:
    """A validation error as one sentence for each setting, with where the value came from."""
    parts = []
    for item in error.errors(include_url=False):
        name = str(item["loc"][0]) if item["loc"] else None
        message = item["msg"].removeprefix("Value error, ")
        if name is None:  # a rule of the request, whose message begins with the field's name
            name, _, message = message.partition(": ")
            parts.append(f"{name}{_came(name, origins)}: {message}")
            continue
        info = EngineConfig.model_fields.get(name)
        unit = "; it is a number of GiB" if info and "in GiB" in (info.description or "") else ""
        parts.append(f"{name}{_came(name, origins)}: {_fault(name, item, message)}{unit}")
    return "; ".join(parts)


def _fault(name: str, item: Any, message: str) -> str:
    """What is wrong with a setting, and with what was given; that is never shown of one that is a secret."""
    if name in ("tokens", "api_keys", "metrics_key"):
        return f"{message[:1].lower()}{message[1:]}"
    if item["type"] == "value_error":  # a rule of ours, in its own words
        given = "" if message.startswith(("'", '"')) else f", not {item['input']!r:.80}"  # it begins with what is wrong
        return f"{message[:1].lower()}{message[1:]}{given}"
    return plain(item, limits_at(EngineConfig, item["loc"]))


def _came(name: str, origins: Mapping[str, str]) -> str:
    return f" (from {origins[name]})" if name in origins else ""


def _check_key(key: SecretStr) -> None:
    """Refuse a key that no header could bring, or that could be guessed."""
    if not _TOKEN.fullmatch(key.get_secret_value()):
        raise ValueError("a key is empty, or holds spaces or other than plain letters")
    if len(key.get_secret_value()) < _MIN_KEY:
        raise ValueError(f"a key is shorter than {_MIN_KEY} characters; give longer ones, as of `openssl rand -hex 16`")


def refuse_unknown(names: Iterable[str], where: str = "") -> None:
    """
    Args:
        where: the names come from, for the message.

    Raises:
        ConfigError: one is no setting; with the nearest that is.
    """
    for name in names:
        if name not in EngineConfig.model_fields:
            raise _unknown(name, where, _closest(name, 0.5))


def _closest(name: str, cutoff: float) -> str | None:
    return next(iter(difflib.get_close_matches(name.lower(), EngineConfig.model_fields, n=1, cutoff=cutoff)), None)


def _unknown(name: str, where: str, meant: str | None) -> ConfigError:
    hint = f"did you mean {meant!r}?" if meant else "`lightweight-engine config show` lists the names"
    return ConfigError(f"{where}{name!r} is not a setting; {hint}")


def _as_sent(given: Iterable[str], spelt: Iterable[str], pattern: re.Pattern[str], kind: str) -> tuple[str, ...]:
    """Entries as a caller sends them, each of which the pattern fits; ``kind`` says what one is and how to write it."""
    entries = tuple(spelt)
    for said, entry in zip(given, entries, strict=True):
        if not pattern.fullmatch(entry):
            raise ValueError(f"{said!r:.80} is no {kind}, each by itself")
    return entries


def _as_tokens(value: Any) -> dict[str, SecretStr]:
    """Tokens by host: a mapping, or one string of host=token with commas between. Messages name hosts only."""
    pairs = _token_pairs(value) if isinstance(value, str) else value.items() if isinstance(value, Mapping) else None
    if pairs is None:
        raise ValueError("must be host=token entries")
    tokens = {}
    for host, token in pairs:
        text = token.get_secret_value() if isinstance(token, SecretStr) else token
        if not _HOST.fullmatch(str(host).lower()):
            raise ValueError("an entry does not begin with a host; write host=token, as in civitai.com=…")
        if not isinstance(text, str) or not _TOKEN.fullmatch(text):
            raise ValueError(f"the token for {host} is empty, or holds spaces or other than plain letters")
        tokens[str(host).lower()] = SecretStr(text)
    return tokens


def _token_pairs(text: str) -> Iterator[tuple[str, str]]:
    for item in filter(None, (item.strip() for item in text.split(","))):
        host, equals, token = item.partition("=")
        if not equals:  # it may be a token alone, which must not be shown
            raise ValueError("an entry has no '='; write host=token, as in civitai.com=…")
        yield host.strip(), token.strip()


def _joined_tokens(below: Any, above: Any) -> Any:
    """The tokens of two layers; what cannot be read is left to be refused as it is."""
    try:
        return {**_as_tokens(below), **_as_tokens(above)}
    except ValueError:
        return above


def _find_file(file: Path | None, environ: Mapping[str, str]) -> Path | None:
    named = file or (Path(environ[FILE_VARIABLE]) if environ.get(FILE_VARIABLE) else None)
    if named:
        return named.expanduser()
    home = Path(environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "lightweight-engine"
    return next((path for path in (Path(FILE_NAME), home / FILE_NAME) if path.is_file()), None)


def _from_file(path: Path | None) -> Iterator[tuple[str, Any, str]]:
    """The settings of a TOML file; its relative paths start from the folder that it lies in."""
    if path is None:
        return
    import tomllib  # most starts have no such file

    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        table = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"the settings file {path} cannot be read: {error.strerror}; give another") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        if twice := _standing_twice(text, str(error)):
            raise ConfigError(f"{path}: {twice}; keep one") from None
        raise ConfigError(f"the settings file {path} is not valid TOML ({error}); correct it") from None
    for name, value in table.items():
        if isinstance(value, dict) and name not in EngineConfig.model_fields:
            raise ConfigError(f"{path}: settings have no sections; leave out [{name}], and keep the lines below it")
    refuse_unknown(table, f"{path}: ")
    for name, value in table.items():
        if name in _FOLDERS and isinstance(value, str) and value:
            value = path.parent / Path(value).expanduser()
        elif name == "tokenizer_dirs" and isinstance(value, list):
            value = [path.parent / Path(str(item)).expanduser() for item in value]
        yield name, value, str(path)


def _standing_twice(text: str, error: str) -> str:
    """The key that stands twice in TOML, with its lines, where that is what its reader complains of; else nothing.

    Args:
        error: the reader's, which knows the line but not the key.
    """
    if not error.startswith("Cannot overwrite a value"):
        return ""
    at = re.search(r"at line (\d+)", error)
    lines = text.splitlines()[: int(at[1]) if at else None]
    keys = [(found[1], number) for number, line in enumerate(lines, 1) if (found := _KEY.match(line))]
    key = keys[-1][0] if keys else ""
    numbers = [number for each, number in keys if each == key]
    return f"{key} stands there twice (lines {numbers[-2]} and {numbers[-1]})" if len(numbers) > 1 else ""


def _from_other_programs(environ: Mapping[str, str]) -> Iterator[tuple[str, Any, str]]:
    """Tokens that lie in the environment for other programs; one that is of no use is theirs to complain of."""
    for variable, host in TOKEN_VARIABLES.items():
        token = environ.get(variable, "").strip()
        if _TOKEN.fullmatch(token):
            yield "tokens", {host: token}, variable


def _from_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, Any, str]]:
    """``LWE_NAME`` for each setting; an empty variable counts as not set.

    Others with the prefix are refused: a key that is set by a wrong name would leave the service open.
    """
    for variable, value in environ.items():
        if not variable.startswith(PREFIX) or variable in _NO_SETTINGS or not value:
            continue
        _refuse_link(variable, value)
        name = variable.removeprefix(PREFIX).lower()
        name = _ALIASES.get(name, name)
        if name not in EngineConfig.model_fields:
            meant = _closest(name, 0.5)
            raise _unknown(variable, "the environment variable ", meant and PREFIX + meant.upper())
        yield name, value, variable


def empty_variables(environ: Mapping[str, str]) -> list[str]:
    """Variables with our prefix that count as not set, as they are empty."""
    return [variable for variable, value in environ.items() if variable.startswith(PREFIX) and not value]


def _refuse_link(variable: str, value: str) -> None:
    """Say of an address that was never meant for us what it is, and not that it is a slip in the name of a setting."""
    if _LINK.fullmatch(variable) or (variable == _LINK_PORT and _LINK_URL.match(value)):
        raise ConfigError(
            f"the environment variable {variable!r} is no setting, but an address that Kubernetes or Docker sets for a "
            "service called 'lwe'; set enableServiceLinks: false in the pod's spec, or call the service otherwise"
        )


def _from_flags(given: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    for name, value in given.items():
        yield name, value, f"--{name.replace('_', '-')}"
