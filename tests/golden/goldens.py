"""Golden data: where it lies, which cases it lists, and the tensors of a case.

The folder is the one that LWE_GOLDEN_DIR names, else ``../shared/golden`` beside the project, else the slim copy in
``tests/golden/data``. Cases are discovered from the manifests; nothing here knows their number, sizes or seeds.
"""

from __future__ import annotations

import atexit
import json
import lzma
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from lightweight_engine.backend.checkpoint import open_checkpoint

PROJECT = Path(__file__).resolve().parents[2]


@cache
def golden_dir() -> Path:
    named = os.environ.get("LWE_GOLDEN_DIR")
    if named:
        if not Path(named).is_dir():
            raise FileNotFoundError(f"LWE_GOLDEN_DIR names {named}, which is not a folder")
        return Path(named)
    shared = PROJECT.parent / "shared" / "golden"
    return shared if shared.is_dir() else PROJECT / "tests" / "golden" / "data"


@cache
def tokenizer_dir() -> Path | None:
    """The folder with the real tokenizers: LWE_TOKENIZER_DIR, or beside the goldens, or beside the project."""
    named = os.environ.get("LWE_TOKENIZER_DIR")
    candidates = [Path(named)] if named else []
    candidates += [golden_dir().parent / "tokenizers", PROJECT.parent / "shared" / "tokenizers"]
    return next((folder for folder in candidates if (folder / "clip_l").is_dir()), None)


@dataclass(frozen=True)
class Case:
    """One row of a manifest. ``data`` is the row; ``tensor`` reads ``<id>.<name>`` of the file beside the manifest."""

    family: str
    id: str
    data: dict[str, Any]
    folder: Path = field(repr=False)

    def __getitem__(self, key: str) -> Any:
        return self.data[key]

    def get(self, key: str, default: Any = None) -> Any:
        return self.data.get(key, default)

    def tensor(self, name: str) -> Any:
        return _tensors(self.folder / f"{self.family}.safetensors")[self._key(name)]

    def common(self, name: str) -> Any:
        return _tensors(self.folder / f"{self.family}.safetensors")[f"common.{name}"]

    def has(self, name: str) -> bool:
        path = self.folder / f"{self.family}.safetensors"
        return path.exists() and self._key(name) in _tensors(path)

    def _key(self, name: str) -> str:
        return f"{self.id}.{name}" if self.id else name

    def array(self, name: str) -> Any:
        """The array ``name`` of the family's npz (pipelines)."""
        return self.arrays()[name]

    def arrays(self) -> dict[str, Any]:
        """All arrays of the family's npz."""
        return _arrays(self.folder / f"{self.family}.npz")


@cache
def _tensors(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(path)


@cache
def _arrays(path: Path) -> dict[str, Any]:
    import numpy as np

    with np.load(path, allow_pickle=False) as data:
        return dict(data)


def core_families() -> list[str]:
    return sorted(path.stem for path in (golden_dir() / "core").glob("*.json"))


def core_cases(family: str) -> list[Case]:
    folder = golden_dir() / "core"
    manifest = json.loads((folder / f"{family}.json").read_text(encoding="utf-8"))
    return [Case(family, row["id"], row, folder) for row in manifest["cases"]]


def pipeline_families() -> list[str]:
    return sorted(path.stem for path in (golden_dir() / "pipelines").glob("*.json") if path.stem != "MANIFEST")


def pipeline_cases(family: str) -> list[Case]:
    folder = golden_dir() / "pipelines"
    rows = json.loads((folder / f"{family}.json").read_text(encoding="utf-8"))
    return [Case(family, str(row.get("id", i)), row, folder) for i, row in enumerate(rows)]


def quant_cases() -> list[Case]:
    """``quant/`` has no manifests: its tensors are named ``<id>.<tensor>``, or have no id where a file is one case.

    ``names`` of a case lists its tensors.
    """
    cases = []
    for path in sorted((golden_dir() / "quant").glob("*.safetensors")):
        names: dict[str, list[str]] = {}
        for key in open_checkpoint(path).tensors:
            case, _, name = key.partition(".") if "." in key else ("", "", key)
            names.setdefault(case, []).append(name)
        cases += [Case(path.stem, case, {"names": names[case]}, path.parent) for case in sorted(names)]
    return cases


def ckpt_cases() -> list[Case]:
    """The files of ``ckpt/``; the slim copy has some."""
    manifest = golden_dir() / "ckpt" / "manifest.json"
    rows = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else []
    return [Case("ckpt", row["name"], row, manifest.parent) for row in rows]


def lora_cases() -> list[Case]:
    """The files of ``lora/`` at their strengths."""
    manifest = golden_dir() / "lora" / "manifest.json"
    rows = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else []
    return [Case("lora", row["name"], row, manifest.parent) for row in rows]


@cache
def model_config(name: str) -> dict[str, Any]:
    """What ``models.json`` says of a golden model: the sizes that tensor shapes do not tell."""
    return json.loads((golden_dir() / "models" / "models.json").read_text(encoding="utf-8"))[name]["config"]


@cache
def model_path(name: str) -> Path:
    """The file of a golden model."""
    return unpacked(golden_dir() / "models" / f"{name}.safetensors")


@cache
def unpacked(path: Path) -> Path:
    """A golden file, or what its compressed twin of the slim copy holds."""
    packed = path.with_name(f"{path.name}.xz")
    if path.exists() or not packed.exists():
        return path
    target = _scratch() / path.name
    target.write_bytes(lzma.decompress(packed.read_bytes()))
    return target


@cache
def _scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="goldens-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
