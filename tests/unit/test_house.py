"""The rules of the house: floors, arrows, and what may be imported where. Read from the source by ast.

A module is named by its path below the package, as ``flux.prompt``. Imports inside functions count; those under
``TYPE_CHECKING`` count for floors, and not for arrows and circles, as they never run.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
PACKAGE = PROJECT / "lightweight_engine"

# A folder may import those below it; folders on one floor do not import one another.
FLOORS = {"": 0, "backend": 1, "flux": 2, "upscalers": 2, "extensions": 3, "core": 4, "apps": 5}

# Inside a folder: which module may import which, named from the folder on. A module without a row imports none of its
# neighbours.
ARROWS = {
    # floor 0
    "fields": "errors",
    "lora_spec": "errors fields",
    "request": "errors fields labels lora_spec",
    "results": "fields request",
    "labels": "errors",
    "config": "errors fields labels request",
    # backend
    "backend.attention": "kernels.attention kernels.hopper",
    "backend.checkpoint": "kept_files",
    "backend.feature_maps": "kernels kernels.group_norm",
    "backend.convolutions": "kernels kernels.convolution",
    "backend.eight_bit": "fp8 kernels kernels.fused linear packed",
    "backend.eight_bit_attention": "attention eight_bit fused kernels.eight_bit_attention kernels.hopper",
    "backend.fused": "eight_bit kernels kernels.fused linear",
    "backend.nf4": "kernels kernels.dequantize kernels.quantize packed",
    "backend.fp8": "kernels.dequantize packed",
    "backend.gguf": "block_types kernels.dequantize packed",
    "backend.packed": "kernels",
    "backend.devices": "early_fetch host_memory processes",
    "backend.in_pieces": "kernels kernels.pieces",
    "backend.linear": "in_pieces packed",
    "backend.ahead": "linear",
    "backend.lora_algorithms": "lora",
    "backend.lora_modules": "lora lora_algorithms",
    "backend.lora_layers": "eight_bit fp8 kernels.dequantize linear lora packed",
    "backend.streaming": "devices",
    "backend.together": "in_pieces linear streaming",
    "backend.early_fetch": "gpu_driver kept_files read_ahead reader",
    "backend.staging": "checkpoint early_fetch",
    "backend.pages": "checkpoint devices streaming",
    "backend.memory_manager": "devices host_memory",
    "backend.quantize": "block_types fp8 gguf nf4 packed",
    "backend.kernels": "kernels.launch",
    "backend.kernels.attention": "kernels.cuda kernels.hopper",
    "backend.kernels.eight_bit_attention": "kernels.cuda kernels.hopper",
    "backend.kernels.hopper": "kernels.cuda",
    "backend.kernels.cuda": "gpu_driver kernels.launch",
    "backend.kernels.convolution": "kernels.launch kernels.lines kernels.taps",
    "backend.kernels.dequantize": "block_types kernels.launch kernels.four_bit kernels.float8 kernels.gguf",
    "backend.kernels.fused": "kernels.launch kernels.streams",
    "backend.kernels.group_norm": "kernels.channels kernels.launch",
    "backend.kernels.pieces": "kernels.launch kernels.splitting",
    "backend.kernels.quantize": "kernels.launch kernels.four_bit",
    "backend.urls": "addresses",
    "backend.net": "addresses urls",
    "backend.tar_member": "checkpoint",
    "backend.satellites": "fp8 nf4 packed",
    "backend.safetensors_writer": "checkpoint",
    "backend.stored": "checkpoint packed nf4 fp8 gguf",
    "backend.gguf_file": "block_types checkpoint",
    "backend.zip_entries": "checkpoint",
    "backend.pickled_modules": "checkpoint pickles zip_entries",
    "backend.pickles": "checkpoint zip_entries",
    "backend.legacy_pickles": "checkpoint pickles zip_entries",
    "backend.model_files": "checkpoint gguf_file legacy_pickles pickles",
    # flux: networks know params only; samplers know their parts; text goes prompt -> chunks -> encoders -> conditioner
    "flux.recognise": "layouts params",
    "flux.keymaps": "layouts params recognise sources",
    "flux.autoencoder": "params",
    "flux.clip": "blocks params",
    "flux.t5": "blocks params",
    "flux.transformer": "blocks params",
    "flux.units": "keymaps",
    "flux.footprint": "keymaps load params units",
    "flux.convert": "keymaps load",
    "flux.verify": "keymaps load",
    "flux.lora_keys": "layouts params sources",
    "flux.lora_metadata": "layouts",
    "flux.lora_files": "layouts lora_families lora_keys lora_metadata params",
    "flux.lora_set": "layouts lora_files",
    "flux.load": "autoencoder clip keymaps params t5 transformer units",
    "flux.recorded": "transformer",
    "flux.tiling": "autoencoder",
    "flux.preview": "autoencoder",
    "flux.velocity": "conditioning latents transformer",
    "flux.prompt": "prompt_schedule",
    "flux.prompt_slips": "prompt",
    "flux.chunks": "prompt prompt_slips tokenizers",
    "flux.text_encoders": "chunks clip prompt t5 tokenizers",
    "flux.conditioner": "conditioning prompt prompt_slips text_encoders",
    "flux.guidance": "conditioning sampler_parts",
    "flux.dpm_solver": "sampler_parts",
    "flux.samplers_ode": "sampler_parts",
    "flux.samplers_stochastic": "sampler_parts samplers_ode schedules",
    "flux.samplers_discrete": "sampler_parts schedules",
    "flux.unipc": "sampler_parts samplers_discrete schedules",
    "flux.samplers": "dpm_solver samplers_discrete samplers_ode samplers_stochastic sampler_parts unipc",
    "flux.sampling": "noise sampler_parts samplers schedules",
    # upscalers: pictures, then what enlarges them, then where it is found
    "upscalers.picture": "resampling",
    "upscalers.tiles": "resampling",
    "upscalers.upscaler": "resampling",
    "upscalers.resizing": "picture resampling upscaler",
    "upscalers.networks": "dense files tiles upscaler visits",
    "upscalers.library": "files networks upscaler",
    # extensions
    "extensions.lora": "lora_library",
    "extensions.detection": "boxes",
    "extensions.yolov8": "yolov8_sizes",
    "extensions.detailer_infotext": "detailer_args",
    "extensions.detailer_targets": "detailer_args detailer_masks detection",
    "extensions.adetailer": "detailer_args detailer_masks detailer_prompts detailer_targets detection",
    "extensions.ultralytics_detector": "detection detector_files",
    "extensions.detector_networks": "detection detector_files detector_list detector_place ultralytics_detector yolov8",
    "extensions.detector_list": "detector_files",
    "extensions.detectors": "detector_list detector_networks detector_place",
    "extensions.inpainting": "masks",
    # core
    "core.adapters": "",
    "core.images": "image_text png",
    "core.pictures": "image_text images",
    "core.infotext_parse": "infotext",
    "core.file_cache": "locked_files",
    "core.lora_sources": "",
    "core.tokenizer_files": "",
    "core.transfer": "file_cache",
    "core.download": "file_cache lora_sources transfer",
    "core.models": "folders hashes",
    "core.plan": "",
    "core.precision": "models",
    "core.loras": "download lora_sources models",
    "core.networks": "adapters models plan precision",
    "core.quantized_names": "folders models",
    "core.quantized_cache": "folders models precision quantized_names",
    "core.choice": "folders models",
    "core.head_start": "choice folders models quantized_names",
    "core.named": "models named_passes",
    "core.named_passes": "",
    "core.limits": "images",
    "core.assembly": "models networks plan precision quantized_cache tokenizer_files",
    "core.recovery": "networks plan",
    "core.current_model": "assembly choice folders head_start loras models networks plan precision recovery",
    "core.start_pictures": "colours pictures",
    "core.coding": "finite",
    "core.processing": "coding finite images networks progress recovery start_pictures",
    "core.passes": "idle_fields limits networks pictures plan processing",
    "core.describe": "infotext infotext_parse lora_sources pictures",
    "core.recipe_text": "infotext infotext_parse lora_sources",
    "core.replay": "describe filenames images loras pictures recipe_text",
    "core.detailing": "limits mask_request named_passes passes plan",
    "core.workshop": "mask_request processing",
    "core.jobs": "detailing finite idle_fields images limits named networks passes plan processing progress "
    "recovery start_pictures",
    "core.upscaling": "image_text images named progress",
    "core.turns": "progress",
    "core.engine": "assembly current_model describe detailing finite hashes jobs limits models networks passes "
    "pictures plan precision processing progress recovery replay turns upscaling workshop",
    # apps
    "__main__": "cli interrupts",
    "apps.cli": "console",
    "apps.console": "interrupts",
    "apps.options": "console",
    "apps.progress": "console",
    "apps.session": "console interrupts options progress",
    "apps.generate": "console options session",
    "apps.demo": "console options progress session",
    "apps.plan": "console options session",
    "apps.warmup": "console options session",
    "apps.replay": "console options session",
    "apps.info": "console options",
    "apps.models": "console options",
    "apps.settings": "console options",
    "apps.cache": "console options",
    "apps.upscale": "console options session",
    "apps.lora": "console options",
    "apps.detail": "console options session",
    "apps.doctor": "console options",
    # the service: what both processes share, then the worker, then the front from its heart outwards
    "apps.serve": "console options server.logs server.run server.supervisor",
    "apps.server.faults": "wording",
    "apps.server.logs": "wording",
    "apps.server.messages": "server.faults",
    "apps.server.facts": "wording",
    "apps.server.tasks": "server.faults",
    "apps.server.sources": "server.tasks",
    "apps.server.worker": "server.facts server.faults server.logs server.messages server.sources wording",
    "apps.server.supervisor": "interrupts server.faults server.messages server.worker",
    "apps.server.jobs": "server.faults server.messages",
    "apps.server.metrics": "server.messages",
    "apps.server.canary": "server.faults server.logs server.messages server.metrics server.supervisor",
    "apps.server.service": "server.canary server.estimate server.faults server.jobs server.logs server.messages "
    "server.metrics server.sources server.supervisor server.tasks",
    "apps.server.bodies": "server.faults",
    "apps.server.schemas": "server.jobs server.messages",
    "apps.server.guards": "server.bodies server.faults server.logs server.metrics",
    "apps.server.protocol": "server.faults server.guards server.metrics",
    "apps.server.asking": "server.faults server.guards server.jobs server.messages server.service",
    "apps.server.events": "server.jobs server.schemas server.service",
    "apps.server.native": "server.asking server.bodies server.events server.faults server.jobs server.queries "
    "server.schemas server.service",
    "apps.server.status": "server.asking server.bodies server.guards server.messages server.metrics server.native "
    "server.queries server.schemas server.service server.supervisor server.tasks",
    # Forge's API, from its words outwards
    "apps.server.sdapi.models": "server.sdapi.fields",
    "apps.server.sdapi.options": "server.sdapi.models",
    "apps.server.sdapi.catalogue": "server.faults server.sdapi.options server.service",
    "apps.server.sdapi.translate": "server.faults server.sdapi.catalogue server.sdapi.fields server.sdapi.models "
    "server.sdapi.options server.sdapi.scripts wording",
    "apps.server.sdapi.answers": "server.jobs server.schemas server.sdapi.models server.sdapi.translate",
    "apps.server.sdapi.session": "server.faults server.jobs server.sdapi.options server.service",
    "apps.server.sdapi.generation": "server.asking server.bodies server.faults server.native server.queries "
    "server.sdapi.answers server.sdapi.catalogue server.sdapi.models server.sdapi.options server.sdapi.session "
    "server.sdapi.translate",
    "apps.server.sdapi.lists": "server.native server.sdapi.scripts server.sdapi.session",
    "apps.server.sdapi.progress": "server.bodies server.native server.schemas server.sdapi.answers "
    "server.sdapi.models server.sdapi.session",
    "apps.server.sdapi.pictures": "server.bodies server.faults server.native server.sdapi.models server.sdapi.session",
    "apps.server.sdapi.extras": "server.asking server.bodies server.jobs server.queries server.schemas "
    "server.sdapi.generation server.sdapi.models server.sdapi.options server.sdapi.session",
    "apps.server.sdapi.files": "server.asking server.messages server.native server.sdapi.catalogue "
    "server.sdapi.models server.sdapi.session",
    "apps.server.sdapi.settings": "server.bodies server.native server.sdapi.catalogue server.sdapi.generation "
    "server.sdapi.options server.sdapi.session server.service server.tasks",
    "apps.server.sdapi.routes": "server.sdapi.extras server.sdapi.files server.sdapi.generation server.sdapi.lists "
    "server.sdapi.pictures server.sdapi.progress server.sdapi.session server.sdapi.settings server.service",
    "apps.server.description": "server.asking server.guards server.schemas server.sdapi.models",
    "apps.server.app": "server.asking server.bodies server.description server.faults server.guards server.native "
    "server.sdapi.routes server.service server.status",
    "apps.server.run": "server.app server.protocol server.service server.supervisor",
    # predict() under Cog
    "apps.predictor.requests": "predictor.inputs",
    "apps.predictor.predictor": "predictor.inputs predictor.outputs predictor.postback predictor.requests wording",
    "apps.predictor.start": "predictor.predictor server.logs",
}

# Package -> the only modules that may import it ("" is nobody). A name ending in "." stands for a whole folder.
ONLY = {
    "fastapi": "apps.server.",
    "starlette": "apps.server.",
    "uvicorn": "apps.server.",
    "h11": "apps.server.",
    "typer": "apps.",
    "click": "apps.",
    "rich": "apps.",
    "triton": "backend.kernels.",
    "ultralytics": "extensions.ultralytics_detector",
    "spandrel": "upscalers.",
    "socket": "backend.net",
    "ssl": "backend.net",
    "http": "backend.net",
    "cog": "",
    "requests": "",
    "httpx": "",
    "transformers": "",
    "diffusers": "",
    "huggingface_hub": "",
}

# Heavy or seldom used: imported inside the functions that use them, never at the top of a module.
LAZY = ("scipy", "ftfy", "regex", "tokenizers", "rich", "triton", "spandrel", "ultralytics")

# Modules written in Triton's language need it at their top, so that they are lazy themselves.
LAZY_MODULES = (
    "backend.kernels.four_bit",
    "backend.kernels.float8",
    "backend.kernels.gguf",
    "backend.kernels.streams",
    "backend.kernels.channels",
    "backend.kernels.lines",
    "backend.kernels.splitting",
    "backend.kernels.taps",
)

# Modules that a program may import without paying for torch.
LIGHT = (
    "",
    "errors",
    "request",
    "results",
    "labels",
    "config",
    "core.models",
    "core.head_start",
    "core.images",
    "core.infotext_parse",
    "core.recipe_text",
    "extensions.detailer_args",
    "extensions.detector_list",
    "upscalers.files",
    "apps.cli",
    "apps.server.run",
    "apps.server.sdapi.models",
    "apps.predictor.inputs",
    "apps.predictor.start",
)


@dataclass(frozen=True)
class Import:
    """``target`` is a module of ours, or the top package of another's."""

    source: str
    target: str
    ours: bool
    typing_only: bool
    top: bool
    line: int


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def sources() -> dict[str, ast.Module]:
    return {
        name_of(path): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
        if "__pycache__" not in path.parts
    }


@cache
def imports() -> tuple[Import, ...]:
    return tuple(row for name, tree in sources().items() for row in _imports_of(name, tree))


def _imports_of(name: str, tree: ast.Module) -> list[Import]:
    is_folder = (PACKAGE / name.replace(".", "/")).is_dir()
    package = name.split(".") if is_folder else name.split(".")[:-1]
    package = [part for part in package if part]
    typing_only = {id(inner) for node in ast.walk(tree) if _checks_types(node) for inner in ast.walk(node)}
    rows = []
    for node in ast.walk(tree):
        common = {"typing_only": id(node) in typing_only, "top": node in tree.body, "line": getattr(node, "lineno", 0)}
        if isinstance(node, ast.Import):
            rows += [Import(name, alias.name.split(".")[0], False, **common) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            rows.append(Import(name, (node.module or "").split(".")[0], False, **common))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] + (node.module or "").split(".") * bool(node.module)
            for alias in node.names:
                module = ".".join([*base, alias.name])
                rows.append(Import(name, module if module in sources() else ".".join(base), True, **common))
    return rows


def _checks_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def folder(module: str) -> str:
    if module == "__main__":
        return "apps"
    return module.split(".")[0] if "." in module or module in FLOORS else ""


def within_folder(module: str) -> str:
    return module.removeprefix(f"{folder(module)}.")


def test_every_folder_has_a_floor() -> None:
    assert {folder(name) for name in sources()} <= set(FLOORS)
    assert not (PACKAGE / "utils").exists(), "utils is a folder named by not knowing"


def test_imports_go_down_only() -> None:
    wrong = [
        f"{row.source}:{row.line} imports {row.target}"
        for row in imports()
        if row.ours
        and row.source
        and row.target  # the package itself holds only names
        and folder(row.source) != folder(row.target)
        and FLOORS[folder(row.source)] <= FLOORS[folder(row.target)]
    ]
    assert not wrong, "\n".join(wrong)


def test_arrows_inside_a_folder() -> None:
    wrong = [
        f"{row.source} -> {row.target}"
        for row in imports()
        if row.ours
        and not row.typing_only
        and row.source
        and row.target
        and folder(row.source) == folder(row.target)
        and within_folder(row.target) not in ARROWS.get(row.source, "").split()
    ]
    assert not wrong, "arrows that the table does not have; are they wanted?\n" + "\n".join(sorted(set(wrong)))


def test_the_table_of_arrows_is_of_this_house() -> None:
    assert sorted(set(ARROWS) - set(sources())) == []
    for source, targets in ARROWS.items():
        prefix = folder(source)
        gone = [t for t in targets.split() if (f"{prefix}.{t}" if prefix else t) not in sources()]
        assert gone == [], source


def test_the_page_of_the_house_names_every_module() -> None:
    page = (PROJECT / "docs/architecture.md").read_text(encoding="utf-8").split("```")[1]
    parts = re.split(r"^(?:\d|  ?)? ?(\w+)/ ", page, flags=re.MULTILINE)
    told = {name: set(re.findall(r"\w+", text)) for name, text in zip(parts[1::2], parts[2::2], strict=True)}
    missing = [
        name
        for name in sources()
        if "." in name and not name.endswith("__") and not name.startswith("backend.kernels.")
        if name.rpartition(".")[2] not in told[name.split(".")[0]]
    ]
    assert not missing, "docs/architecture.md does not say where they belong"


def test_no_circles() -> None:
    below = {
        name: {row.target for row in imports() if row.ours and row.source == name and not row.typing_only}
        for name in sources()
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for target in sorted(below.get(name, ())):
                if target != name and target:
                    visit(target, (*path, name))
            done.add(name)

    for name in sources():
        visit(name, ())


def test_who_may_import_what() -> None:
    wrong = []
    for row in imports():
        allowed = ONLY.get(row.target) if not row.ours else None
        if allowed is None:
            continue
        fits = row.source.startswith(allowed) if allowed.endswith(".") else allowed and row.source == allowed
        if not fits:
            wrong.append(f"{row.source}:{row.line} imports {row.target}")
    assert not wrong, "\n".join(wrong)


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    wrong = [
        f"{row.source}:{row.line} imports {row.target} at its top"
        for row in imports()
        if row.top and row.source not in LAZY_MODULES and row.target in (*LAZY, *LAZY_MODULES)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_print_and_no_global() -> None:
    wrong = []
    for name, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Global):
                wrong.append(f"{name}:{node.lineno} global")
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Name) and called.id == "print" and folder(name) != "apps":
                wrong.append(f"{name}:{node.lineno} print")
    assert not wrong, "\n".join(wrong)


def test_no_work_at_import() -> None:
    """The top of a module declares; it runs no loop, opens nothing, and calls nothing for its effect."""
    wrong = []
    for name, tree in sources().items():
        for node in tree.body:
            effect = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
            running = isinstance(node, ast.For | ast.While | ast.With | ast.Try | ast.Delete)
            branch = isinstance(node, ast.If) and not _checks_types(node) and name != "__main__"
            if effect or running or branch:
                wrong.append(f"{name}:{node.lineno} {type(node).__name__}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", LIGHT, ids=lambda name: name or "package")
def test_light_modules_load_no_torch(module: str) -> None:
    full = f"lightweight_engine.{module}".rstrip(".")
    assert _loaded(f"import {full}") == []


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--help"], ["generate", "--help"], ["--version"], ["config", "show"]),
        *(["upscale", "--list"], ["detail", "--list"], ["models", "ls"], ["lora", "ls"]),
    ],
    ids=" ".join,
)
def test_help_loads_no_torch(arguments: list[str]) -> None:
    code = (
        f"from lightweight_engine.apps.cli import main\ntry: main({arguments!r})\nexcept SystemExit as e: code = e.code"
    )
    assert _loaded(code + "\nassert not code") == []


def test_the_driver_waits_for_no_import_of_what_reads_files() -> None:
    read = tuple(f"lightweight_engine.{name}" for name in ("config", "flux", "core.models", "core.choice"))
    assert _loaded("import lightweight_engine.core.head_start", read) == []


def test_a_request_without_pictures_is_checked_before_any_are_imported() -> None:
    code = (
        "from lightweight_engine.apps.session import check_request\n"
        "from lightweight_engine import Config, GenerationRequest\n"
        "from lightweight_engine.core.models import TINY\n"
        "check_request(GenerationRequest(prompt='a'), Config(models_dir=TINY, offline=True))"
    )
    assert _loaded(code) == []


# What most jobs do without: a start waits for no import of it, and the first job that needs it imports it.
LATE = (
    *("backend.gguf_file", "backend.pickles", "backend.legacy_pickles"),  # files that are no safetensors
    *("backend.lora_algorithms", "flux.lora_files", "flux.lora_keys"),
    *("core.download", "core.transfer", "core.file_cache"),
    *("upscalers.networks", "core.upscaling"),
    *("extensions.detailer_args", "extensions.detailer_infotext", "extensions.adetailer", "extensions.detection"),
    *("extensions.detector_networks", "core.named_passes", "core.detailing"),
)


def test_a_plain_job_imports_nothing_of_what_others_ask_for(tmp_path: Path) -> None:
    assert set(LATE) <= set(sources())
    late = ("tomllib", *(f"lightweight_engine.{name}" for name in LATE))
    code = (
        "from lightweight_engine import Config, LightweightEngine\n"
        "from lightweight_engine.core.models import TINY\n"
        f"config = Config(models_dir=TINY, cache_dir={str(tmp_path)!r}, device='cpu', offline=True)\n"
        "engine = LightweightEngine(config); engine.setup()\n"
        "engine.run(engine.request(prompt='a', width=64, height=64, steps=1))"
    )
    assert _loaded(code, late) == []


HEAVY = ("torch", "numpy", "scipy", "transformers", "diffusers", "tokenizers", "PIL")


def _loaded(code: str, names: tuple[str, ...] = HEAVY) -> list[str]:
    """Which of these are loaded after some code ran in a fresh process."""
    code += f"\nimport sys; print('LOADED', *(name for name in {names} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, check=False)
    assert done.returncode == 0, done.stderr
    return next(line for line in reversed(done.stdout.splitlines()) if line.startswith("LOADED")).split()[1:]


def test_public_names() -> None:
    package = import_module("lightweight_engine")
    assert package.__all__ == sorted(package.__all__, key=package.__all__.index)
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = package.no_such_name


def test_every_module_says_what_it_is() -> None:
    assert [name for name, tree in sources().items() if not ast.get_docstring(tree)] == []


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [*project["dependencies"], *(row for extra in project["optional-dependencies"].values() for row in extra)]
    text = (PROJECT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    names = {re.split(r"[<>=\[ ;]", row)[0] for row in listed} - {"lightweight-engine"}
    assert [name for name in sorted(names) if f"`{name}`" not in text] == []
    assert project["license"] == "Apache-2.0"
    assert "Apache License" in (PROJECT / "LICENSE").read_text(encoding="utf-8")


# Written so that no pattern matches itself.
PRIVATE = re.compile(r"/[r]oot/|/[w]ork/|/[h]ome/\w|/[o]pt/(pypi|wheels)|python[h]osted|index-[u]rl|/[s]imple/")


def test_no_place_of_one_machine_is_committed() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, cwd=PROJECT, check=False)
    if listed.returncode:
        pytest.skip("this is no git checkout, so there is no list of committed files")
    wrong = []
    for name in filter(None, listed.stdout.split("\0")):
        path = PROJECT / name
        if name.startswith("tests/golden/data/"):
            continue
        data = path.read_bytes() if path.is_file() else b"\0"
        if b"\0" not in data[:8192] and (match := PRIVATE.search(data.decode("utf-8", "replace"))):
            wrong.append(f"{name}: {match[0]}")
    assert not wrong, "\n".join(wrong)


def test_public_names_can_be_had() -> None:
    import lightweight_engine

    assert set(lightweight_engine.__all__) == {*lightweight_engine._HOMES, "__version__"}
    assert all(getattr(lightweight_engine, name) for name in lightweight_engine.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        lightweight_engine.Nothing  # noqa: B018
