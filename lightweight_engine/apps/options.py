"""Command-line options, derived from the fields of the request and of the settings, so that none is typed twice.

Help is plain text in groups: rich would draw it in panels, and take as long to import as all the rest of the help.
"""

from __future__ import annotations

import inspect
import os
import types
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from typer.core import TyperCommand

from ..config import EngineConfig
from ..errors import ConfigError
from ..fields import bounds_of, plain
from ..request import MODEL_FIELDS, GenerationRequest
from .console import Console, option

# Settings that have an option of their own; --set reaches the others.
SETTINGS = (
    "models_dir",
    "checkpoint",
    "t5",
    "clip",
    "vae",
    "output_dir",
    "device",
    "threads",
    "compute_dtype",
    "vae_dtype",
    "offline",
)

SHORT = {"width": "-W", "height": "-H", "steps": "-s", "num_outputs": "-n", "output_dir": "-o"}
_ENDLESS = 1_000_000  # an upper bound that says nothing to a person

METAVARS = {"loras": "LORA", "image": "PICTURE", "models_dir": "FOLDER", "output_dir": "FOLDER"}

# Fields of the request that are options; those of its model are settings here.
_FIELDS = {name: info for name, info in GenerationRequest.model_fields.items() if name not in MODEL_FIELDS}

# Request fields whose upper bound is a setting, which may be far below what the field itself allows.
CAPPED_BY = {"width": "max_side", "height": "max_side", "num_outputs": "max_outputs"}

# Those as they are typed; the prompt is an argument.
REQUEST_OPTIONS = {name: option(name) for name in _FIELDS if name != "prompt"}

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the log.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Settings file to read.", rich_help_panel="Settings"),
]
Assignments = Annotated[
    list[str],
    typer.Option(
        "--set", metavar="NAME=VALUE", help="Any setting of `config show`; repeatable.", rich_help_panel="Settings"
    ),
]


class Grouped(TyperCommand):
    """A command whose help shows its options in groups, in the order in which their first options come."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups.setdefault(_group(parameter), []).append(record)
        for name, rows in groups.items():
            if rows:
                with formatter.section(name):
                    formatter.write_dl(rows)


def _group(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return "Arguments"
    return getattr(parameter, "rich_help_panel", None) or "Options"


def takes_settings(function: Callable[..., Any], *, without: Collection[str] = ()) -> Callable[..., Any]:
    """Give a command that ends in ``**settings`` the options of the settings, but for those that do nothing there."""
    return _with_parameters(function, [each for each in setting_parameters() if each.name not in without])


def takes_request(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command that ends in ``**values`` the options of the request and of the settings, before its own."""
    return _with_parameters(function, [*request_parameters(), *setting_parameters()], first=True)


def request_parameters() -> list[inspect.Parameter]:
    """An option for every such field but the prompt, which is an argument."""
    return [_parameter(name, _FIELDS[name]) for name in REQUEST_OPTIONS]


def setting_parameters() -> list[inspect.Parameter]:
    """An option for every setting in ``SETTINGS``, the settings file, and ``--set``."""
    own = [_parameter(name, EngineConfig.model_fields[name]) for name in SETTINGS]
    return [*own, _keyword("config_file", ConfigFile, None), _keyword("assignments", Assignments, [])]


def split_request(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The request fields that were given, and the values that are about settings."""
    fields = {name: value for name, value in values.items() if name in _FIELDS}
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items() if v not in (None, [])}
    return given, {name: value for name, value in values.items() if name not in fields}


def load_config(settings: Mapping[str, Any], **forced: Any) -> EngineConfig:
    """The settings with those of the command line on top; ``forced`` ones win over all."""
    flags = {name: settings.get(name) for name in SETTINGS}
    values = {name: value for name, value in assigned(settings).items() if name not in forced}
    return EngineConfig.load(settings.get("config_file"), assigned=values, **{**flags, **forced})


def assigned(settings: Mapping[str, Any]) -> dict[str, str]:
    """The settings that were given by ``--set``.

    Raises:
        ConfigError: one has no value, or is an option of ``generate``.
    """
    return dict(_assignment(text) for text in settings.get("assignments") or ())


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    name = name.strip().replace("-", "_")
    if not equals:
        raise ConfigError(f"--set {text!r:.80} has no '='; write --set NAME=VALUE")
    if name in GenerationRequest.model_fields and name not in EngineConfig.model_fields:
        raise ConfigError(f"--set {name}: this is no setting but an option of `generate`; give it as {option(name)}")
    return name, value.strip()


def read_number(name: str, given: str, kind: Any, *, unit: str = "") -> Any:
    """The number of an option that is no field or setting; a wrong one is told as theirs are.

    Args:
        kind: an annotated type, with its bounds.
        unit: said where the number is wrong.

    Raises:
        ConfigError: it is no number, or out of the bounds.
    """
    try:
        return TypeAdapter(kind).validate_python(given)
    except ValidationError as error:
        (fault,) = error.errors(include_url=False)
        told = plain(fault, bounds_of(FieldInfo.from_annotation(kind)))
        raise ConfigError(f"{name}: {told}{unit and f'; it is a number of {unit}'}") from None


def read_path(name: str, given: str) -> Path:
    """The path of an option that is no setting.

    Raises:
        ConfigError: it is empty, which would be the working folder.
    """
    if not given:
        raise ConfigError(f"{name}: it is empty; give a path, or leave it out")
    return Path(given)


def picture_quality(console: Console, given: str | None, usual: int, format: str) -> int:
    """The quality of files by ``--quality``, which some formats have none of."""
    if given is None:
        return usual
    quality = read_number("--quality", given, Annotated[int, Field(ge=1, le=100)])
    if format == "png":
        console.warn("--quality had no effect on png, which loses nothing")
    return quality


def check_models_dir(config: EngineConfig) -> None:
    """Refuse a models folder that somebody named and that is not there or may not be read.

    The default one may be absent: then the model that ships with the engine is used.
    """
    folder = config.models_dir
    if not config.is_set("models_dir"):
        return
    where = f"models_dir (from {config.origin('models_dir')})"
    if not folder.is_dir():
        raise ConfigError(f"{where}: there is no folder {folder}; name the one that holds Stable-diffusion/ or unet/")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise ConfigError(f"{where}: {folder} may not be read by this user; change its permissions")


def _with_parameters(
    function: Callable[..., Any], added: Iterable[inspect.Parameter], *, first: bool = False
) -> Callable[..., Any]:
    """Replace the ``**`` of a function's signature, which is what the command line is built from."""
    signature = inspect.signature(function, eval_str=True)
    kept = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in kept]
    parameters = [*added, *own] if first else [*own, *added]
    setattr(function, "__signature__", signature.replace(parameters=parameters))  # noqa: B010 - unknown to type checkers
    function.__annotations__ = {p.name: p.annotation for p in parameters}
    return function


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _parameter(name: str, info: Any) -> inspect.Parameter:
    """The option of a field. Its default is None, which is "not given": the field's own default stays in one place."""
    kind, metavar = _plain_type(info.annotation)
    spelling = f"{option(name)}/--no-{option(name)[2:]}" if kind is bool else option(name)
    names = [SHORT[name], spelling] if name in SHORT else [spelling]
    metavar = METAVARS.get(name) or metavar
    group = info.json_schema_extra["section"]
    panel = group[:1].upper() + group[1:]
    given = typer.Option(*names, help=_help(name, info), metavar=metavar, show_default=False, rich_help_panel=panel)
    if get_origin(kind) is list:
        return _keyword(name, Annotated[kind, given], [])
    return _keyword(name, Annotated[kind | None, given], None)


def _plain_type(annotation: Any) -> tuple[Any, str | None]:
    """A type that the command line can read, and what its help shows for a value.

    Numbers, choices and paths are text: the model itself reads them, and says what they may be. An empty text would
    be the working folder as a path.
    """
    if get_origin(annotation) in (Union, types.UnionType):
        inner = [part for part in get_args(annotation) if part is not type(None)]
        return _plain_type(inner[0])
    if get_origin(annotation) is Literal:
        return str, "|".join(map(str, get_args(annotation)))
    if get_origin(annotation) is Annotated:
        return _plain_type(get_args(annotation)[0])
    if get_origin(annotation) is tuple:
        kind, metavar = _plain_type(get_args(annotation)[0])
        return list[kind], metavar
    if annotation in (int, float):
        return str, f"<{annotation.__name__}>"
    if annotation is Path:
        return str, None
    is_own = isinstance(annotation, type) and issubclass(annotation, BaseModel)  # which reads its own spelling
    return (str if annotation is Any or is_own else annotation), None


def _help(name: str, info: Any) -> str:
    """The field's help with its bounds and its default."""
    notes = _bounds(name, info)
    default = info.get_default(call_default_factory=True)
    if default not in (None, "", (), False):
        notes.append(f"default {default}")
    text = info.description or ""
    return f"{text} ({'; '.join(notes)})" if notes else text


def _bounds(name: str, info: Any) -> list[str]:
    if setting := CAPPED_BY.get(name):
        return [f"at most {EngineConfig.model_fields[setting].default}, by the setting {setting}"]
    low, above, high = (_limit(info, rule) for rule in ("ge", "gt", "le"))
    if low is None and above is None:
        return []
    start = f"above {above}" if low is None else str(low)
    return [f"{start} to {high}" if high is not None and high < _ENDLESS else f"{start} or more"]


def _limit(info: Any, name: str) -> Any:
    return next((getattr(rule, name) for rule in info.metadata if hasattr(rule, name)), None)
