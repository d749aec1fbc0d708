"""``doctor``: what this machine has, what is missing, and how to repair it."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any, Literal

import typer

from ..config import EngineConfig, empty_variables
from ..errors import ConfigError, EngineError, OutputError
from .console import DIFFERENT, Console, human_bytes, human_memory
from .options import Debug, Json, check_models_dir, load_config, takes_settings

LEAST_TORCH = (2, 10)
LITTLE_DISK = 1_000_000_000

REPAIR = "repair that and run doctor again: device, models and folders go by the settings, and were not looked at"

# Extra -> its packages, and what they are for; see docs/dependencies.md.
EXTRAS: dict[str, tuple[tuple[str, ...], str]] = {
    "upscale": (("spandrel",), "upscalers that are files"),
    "serve": (("fastapi", "uvicorn"), "the HTTP service"),
    "cog": (("cog",), "predict.py, under Cog"),
    "adetailer": (("ultralytics",), "detectors other than YOLOv8; its licence is AGPL-3.0"),
}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. ``fix`` is the one thing to do where the state is not ok."""

    name: str
    state: Literal["ok", "note", "bad"]
    found: str
    fix: str = ""


@takes_settings
def doctor(json: Json = False, debug: Debug = False, **settings: Any) -> None:
    """Look for problems and say how to repair each. Ends with code 9 where something must be repaired."""
    with Console(json=json, debug=debug) as console:
        checks = []
        for check in _checks(settings):
            checks.append(check)
            if not json:
                console.data(f"{check.state:4}  {check.name}: {check.found}")
                if check.fix:
                    console.data(f"      -> {check.fix}")
        bad = sum(check.state == "bad" for check in checks)
        if json:
            console.result({"ok": not bad, "checks": [asdict(check) for check in checks]})
        else:
            console.say(f"{bad} thing{'s' * (bad != 1)} to repair" if bad else "ready")
    if bad:
        raise typer.Exit(DIFFERENT)


def _checks(settings: Mapping[str, Any]) -> Iterator[Check]:
    """Of everything; where a setting is wrong, of that and of what depends on none."""
    try:
        config = load_config(settings)
    except ConfigError as error:
        for look in LOOKS:
            if look in WITHOUT_SETTINGS:
                yield from look(EngineConfig())
            elif look is _settings:
                yield Check("settings", "bad", str(error), REPAIR)
        return
    for look in LOOKS:
        yield from look(config)


def _python(config: EngineConfig) -> Iterator[Check]:
    found = f"{platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores"
    yield Check("python", "ok", found)


def _torch(config: EngineConfig) -> Iterator[Check]:
    try:
        version = metadata.version("torch")
        import torch
    except (ImportError, OSError) as error:
        yield Check("torch", "bad", f"cannot be imported: {error}", "pip install --force-reinstall torch")
        return
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    if numbers < LEAST_TORCH:
        yield Check("torch", "bad", f"{version}, {cuda}", "pip install --upgrade 'torch>=2.10'")
    else:
        yield Check("torch", "ok", f"{version}, {cuda}")


def _device(config: EngineConfig) -> Iterator[Check]:
    if util.find_spec("torch") is None:
        return
    from ..backend.devices import card_of, compute_dtype, pick_device

    try:
        device = pick_device(config.device)
    except EngineError as error:
        found = str(error).removeprefix("device: ").partition("; ")[0]
        yield Check("device", "bad", found, "set device to auto")
        return
    card = card_of(device)
    dtype = str(compute_dtype(config.compute_dtype, card)).removeprefix("torch.")
    memory = f"{human_memory(card.free)} of {human_memory(card.total)} free"
    yield Check("device", "ok", f"{device}, {card.name}, {memory}, computes in {dtype}")
    if device.type == "cpu" and config.device == "auto":
        yield Check("gpu", "note", "torch sees no CUDA GPU", "real Flux models need one to be of use; `tiny` does not")
    if device.type == "cuda":
        yield _triton()


def _triton() -> Check:
    if util.find_spec("triton") is None:
        found = "not installed: quantised weights are read by plain torch, which is slower"
        return Check("triton", "note", found, "pip install triton")
    return Check("triton", "ok", f"{metadata.version('triton')}, reads quantised weights on the GPU")


def _host(config: EngineConfig) -> Iterator[Check]:
    """The memory that models wait in; a container's limit counts."""
    if util.find_spec("torch") is None:
        return
    import torch

    from ..backend.devices import card_of

    host = card_of(torch.device("cpu"))
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = f", the limit of this control group (the machine has {human_memory(physical)})"
    found = f"{human_memory(host.free)} of {human_memory(host.total)} free{limit if host.total < physical else ''}"
    yield Check("host memory", "ok", found)


def _settings(config: EngineConfig) -> Iterator[Check]:
    chosen = [f"{name} ({came})" for _, name, _, came in config.rows() if came != "default"]
    yield Check("settings", "ok", ", ".join(chosen) or "all at their defaults")


def _environment(config: EngineConfig) -> Iterator[Check]:
    """Variables that somebody may think are settings; nothing where there are none."""
    if empty := empty_variables(os.environ):
        yield Check(
            "environment", "note", f"empty, and so not set: {', '.join(empty)}", "give a value, or leave it out"
        )


def _models(config: EngineConfig) -> Iterator[Check]:
    from ..core.choice import broken_checkpoints
    from ..core.folders import put_into, stray_models
    from ..core.models import TINY, ModelLibrary

    try:
        check_models_dir(config)
    except EngineError as error:
        yield Check("models", "bad", str(error))
        return
    library = ModelLibrary([config.models_dir])
    broken = broken_checkpoints(library)
    for entry in library.ls():
        if entry.problem:
            fix = f"it is left out; move {entry.path} to where it belongs, replace or remove it"
            yield Check("model file", "bad" if entry in broken else "note", entry.problem, fix)
    if stray := stray_models(config.models_dir):
        yield Check("models", "note", *stray.split("; ", 1))
    if not library.has_checkpoint:
        refused = config.require_model and not config.checkpoint
        then = "require_model is on" if refused else "the demonstration model `tiny` is used"
        fix = f"put a checkpoint into {put_into(config.models_dir)} there, or set --models-dir"
        yield Check("models", "bad" if refused else "note", f"no Flux checkpoint in {config.models_dir}; {then}", fix)
        if refused:
            return
        library = ModelLibrary([TINY])
    try:
        chosen = library.choose(config.checkpoint, t5=config.t5, clip=config.clip, autoencoder=config.vae)
    except EngineError as error:
        yield Check("models", "bad", str(error), "see `lightweight-engine models ls`")
        return
    files = dict.fromkeys(part.checkpoint.path.name for part in chosen.parts.values())
    yield Check("models", "ok", f"{chosen.name}: {', '.join(files)}")


def _upscalers_and_detectors(config: EngineConfig) -> Iterator[Check]:
    """Files of theirs that cannot be opened. Every hires pass needs the one that ``hr_upscaler`` names."""
    from ..extensions.detector_list import DetectorList
    from ..upscalers.files import UpscalerFiles

    for entry in UpscalerFiles([config.models_dir]).entries():
        if problem := entry.problem:
            wanted = entry.name.lower() == config.hr_upscaler.lower()
            yield Check("upscaler file", "bad" if wanted else "note", problem, f"replace or remove {entry.path}")
    for detector in DetectorList([config.models_dir]).entries():
        if problem := detector.problem:
            yield Check("detector file", "note", problem, f"replace or remove {detector.path}")


def _memory(config: EngineConfig) -> Iterator[Check]:
    """What the usual request would take, from headers alone, and settings that do nothing with these files."""
    if util.find_spec("torch") is None:
        return
    from ..core.engine import LightweightEngine

    engine = LightweightEngine(config)
    try:
        plan = engine.plan(engine.request(prompt=""))
    except EngineError:  # a device or a model that is not there, which has been told
        return
    *_, summary = plan.table().splitlines()
    if plan.fits:
        yield Check("memory", "ok", summary)
    else:
        yield Check("memory", "bad", summary, "see `lightweight-engine plan`; use a smaller storage_dtype or picture")
    for note in engine.notes:
        if "no effect" in note:
            yield Check("setting", "note", note, "leave it out, or use a file or a device that it is for")


def _tokenizers(config: EngineConfig) -> Iterator[Check]:
    """Those of the model in use; beside `tiny`, which has its own, those that a real model would need."""
    from ..core.choice import choose_models
    from ..core.tokenizer_files import TOKENIZERS, by_hand, hosts_of, kept_tokenizer, tokenizer_places
    from ..flux.tokenizers import check_tokenizer, hub_cache

    try:
        models = choose_models(config, [])
    except EngineError:  # which has been told
        models = None
    real = None if models is None or models.is_tiny else models
    folders = tokenizer_places(config, real)
    user = f"{real.name} cannot draw without" if real else "no real model can draw without; `tiny` has its own"
    for kind, files in TOKENIZERS.items():
        name, put, state = f"{kind} tokenizer", by_hand(kind, folders[0]), "bad" if real else "note"
        found = kept_tokenizer(kind, folders, config.cache_dir, hub_cache(dict(os.environ)))
        if found:
            try:
                check_tokenizer(kind, found)
            except EngineError as error:
                fix = f"remove {found}, so that it is fetched anew"
                yield Check(name, state, str(error), put if config.offline else f"{fix}, or {put}")
                continue
            yield Check(name, "ok", str(found))
        elif config.offline:
            yield Check(name, state, f"not found, and offline is on: {user}", f"{put}, or switch offline off")
        else:
            size, hosts = human_bytes(sum(file.size for file in files)), " or ".join(hosts_of(kind))
            told = f"not found: {real.name if real else 'a real model'} fetches it once, {size} from {hosts}"
            yield Check(name, "note", told, f"nothing, where that can be reached; else {put}")


def _folders(config: EngineConfig) -> Iterator[Check]:
    from ..core.images import check_folder

    for name, folder in (("output_dir", config.output_dir), ("cache_dir", config.cache_dir)):
        try:
            check_folder(folder)
        except OutputError as error:
            yield Check(name, "bad", str(error).rpartition("; ")[0], f"set {name} to a folder of yours")
            continue
        free = shutil.disk_usage(_nearest(folder)).free
        if free < LITTLE_DISK:
            yield Check(name, "note", f"{folder} has {human_bytes(free)} free", "free some space")
        else:
            yield Check(name, "ok", f"{folder}, {human_bytes(free)} free")


def _nearest(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    folder = folder.resolve()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _packages(config: EngineConfig) -> Iterator[Check]:
    there, missing = _installed(("numpy", "tokenizers", "ftfy", "regex", "pydantic", "pillow", "scipy"))
    yield Check("packages", "ok", ", ".join(there))
    if missing:
        yield Check("packages", "bad", f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")


def _extras(config: EngineConfig) -> Iterator[Check]:
    """Packages that only one feature needs; no fault where they are missing."""
    for extra, (packages, purpose) in EXTRAS.items():
        there, missing = _installed(packages)
        if missing:
            found = f"missing: {', '.join(missing)}, for {purpose}"
            yield Check(f"extra {extra}", "note", found, f"pip install 'lightweight-engine[{extra}]'")
        else:
            yield Check(f"extra {extra}", "ok", f"installed: {', '.join(there)}, for {purpose}")


def _installed(packages: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those that are there with their versions, and those that are not."""
    there, missing = [], []
    for name in packages:
        try:
            there.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    return there, missing


LOOKS = (
    _python,
    _torch,
    _device,
    _host,
    _settings,
    _environment,
    _models,
    _upscalers_and_detectors,
    _memory,
    _tokenizers,
    _folders,
    _packages,
    _extras,
)
WITHOUT_SETTINGS = (_python, _torch, _host, _environment, _packages, _extras)


def register(app: typer.Typer) -> None:
    app.command("doctor")(doctor)
