"""``import torch`` without what only its compilers ask for, which is a quarter of the time that it takes.

The last modules that torch loads are those of ``torch.export``, and one that tells compilers what shape each operator
gives, for tensors without numbers, and brings torch's decompositions with it. Computing asks for none of that. They are
loaded by whoever does: ``torch.compile``, ``torch.export``, fake tensors, and libraries that register operators. Only
who runs operators on the meta device has to say so before (``finish``): some are found nowhere else. Importing this
module loads no torch.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module, metadata
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

LATER = ("torch._meta_registrations", "torch.export")
"""In the order in which torch itself can load them."""

TRIED = ("2.11.", "2.14.")
"""Versions of torch that all tests were run on without those modules; any other is imported whole."""

COMPANIONS = frozenset(
    (
        *("torch._decomp", "torch._dynamo", "torch._export", "torch._inductor", "torch._prims", "torch._refs"),
        "torch.utils._content_store",
    )
)
"""Modules that do not find one another when they are loaded in another order than by those, or before them."""

_changing = threading.RLock()


def import_torch() -> None:
    """Import torch, without those modules where this version can do without; nothing where torch is here already."""
    if "torch" in sys.modules:
        return
    if _version().startswith(TRIED):
        sys.modules.update({name: _Later(name) for name in LATER})
    try:
        import torch
    except BaseException:
        for name in LATER:
            sys.modules.pop(name, None)
        raise
    if _missing():
        if _makes_generators(torch):
            sys.meta_path.insert(0, _Companions())
        else:
            finish()


def _missing() -> list[str]:
    return [name for name in LATER if isinstance(sys.modules.get(name), _Later)]


def _version() -> str:
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:  # told by whoever imports it
        return ""


def _makes_generators(torch: Any) -> bool:
    """Whether there are random generators, for which newer versions load one of the companions."""
    with suppress(RuntimeError):
        return bool(torch.Generator("cpu"))
    with suppress(ImportError, RuntimeError):
        import_module("torch._prims.rng_prims")
        return bool(torch.Generator("cpu"))
    return False


def finish() -> None:
    """Load those modules now: torch is as it is when it is imported plainly."""
    with _changing:
        for name in _missing():
            del sys.modules[name]
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Companions)]
    for name in LATER:
        import_module(name)


class _Later(ModuleType):
    """Stands for one of those modules until somebody asks it for anything."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__path__", "__all__"):  # asked by whoever looks through all modules
            raise AttributeError(name)
        finish()
        return getattr(sys.modules[self.__name__], name)

    def __dir__(self) -> list[str]:
        finish()
        return dir(sys.modules[self.__name__])


class _Companions(MetaPathFinder):
    """Has those modules loaded before any of their companions is."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        if fullname not in COMPANIONS:
            return None
        finish()
        loaded = sys.modules.get(fullname)
        return None if loaded is None else ModuleSpec(fullname, _Loaded(loaded))


class _Loaded(Loader):
    """Gives a module that is there by now: it would be loaded twice."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__
        module.__spec__ = None  # else Python would go by that, and not by the one that names this loader

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec
