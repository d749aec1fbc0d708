"""A start imports torch without what its compilers ask for, and whoever asks for that gets it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightweight_engine.backend import torch_import
from lightweight_engine.backend.torch_import import COMPANIONS, LATER, TRIED

tried = pytest.mark.skipif(not torch.__version__.startswith(TRIED), reason="this version of torch is imported whole")

# Each case in a copy of one process that has just imported torch, which takes longer than any of them.
SHELL = f"""
import importlib, os, sys, traceback
from lightweight_engine.backend.torch_import import finish, import_torch
import_torch()
import torch
def is_late(): return "_Later" in [type(sys.modules[name]).__name__ for name in {LATER!r}]
def is_over(): return not is_late() and "_Companions" not in [type(each).__name__ for each in sys.meta_path]
torch.Generator("cpu")
assert is_late() and not {{"torch._refs", "torch._export"}} & sys.modules.keys()
for name, code in CASES.items():
    if not os.fork():
        try:
            exec(code)
        except BaseException:
            print(name, traceback.format_exc(), flush=True)
            os._exit(1)
        os._exit(0)
    assert os.wait()[1] == 0, name
"""

CASES = {
    "a picture": """
from lightweight_engine import Config, GenerationRequest, LightweightEngine
engine = LightweightEngine(Config(models_dir=FOLDER, cache_dir=FOLDER, device="cpu", offline=True))
engine.run(GenerationRequest(prompt="a red square", width=64, height=64, steps=2, seed=1))
assert is_late() and "torch._refs" not in sys.modules
""",
    "compile": """
assert torch.compile(lambda x: x * 2, backend="eager")(torch.ones(1)).item() == 2 and is_over()
""",
    "export": """
assert torch.export.export(torch.nn.Linear(3, 4), (torch.ones(2, 3),)).graph_signature.user_inputs and is_over()
""",
    "fake tensors": """
from torch._subclasses.fake_tensor import FakeTensorMode
with FakeTensorMode():
    assert (torch.empty(3, 4) @ torch.empty(4, 5)).shape == (3, 5) and is_over()
""",
    "torchvision": """
from torchvision.ops import nms
assert nms(torch.tensor([[0, 0, 1, 1.0]]), torch.tensor([0.5]), 0.5).tolist() == [0] and is_over()
""",
    "an attribute": """
late = sys.modules["torch._meta_registrations"]
assert late.meta_index_Tensor is torch._meta_registrations.meta_index_Tensor and is_over()
""",
    "what lies in one": """
from torch.export.passes import move_to_device_pass
assert torch.export.Dim("batch") is not None and is_over()
""",
    "the meta device": """
finish()
maps = torch.empty(1, 3, 8, 8, device="meta")
assert torch.nn.functional.conv2d(maps, torch.empty(4, 3, 3, 3, device="meta")).shape == (1, 4, 6, 6) and is_over()
finish()
""",
    "all of it": """
import importlib.util
assert importlib.util.find_spec("torch.export") is not None and is_late()
from torch.export import *
assert "Dim" in dir(torch.export) and is_over()
""",
    # Whichever companion comes first, all are there once, and as they are after a plain import.
    **{
        name: f"""
there = {name!r} in sys.modules  # newer versions have loaded it for generators
first = importlib.import_module({name!r})
assert is_over() != there and first is sys.modules[{name!r}] and first.__spec__.name == {name!r}
assert type(first.__spec__.loader).__name__ == "SourceFileLoader"
import torch._decomp, torch._refs
assert len(torch._decomp.decomposition_table) > 1000
"""
        for name in sorted(COMPANIONS - {"torch._dynamo", "torch._inductor"})  # those are what compiling begins with
    },
}


@tried
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not copied on this system")
def test_computing_does_without_it_and_who_asks_for_it_gets_it(tmp_path: Path) -> None:
    code = f"FOLDER, CASES = {str(tmp_path)!r}, {CASES!r}\n{SHELL}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_it_is_done_once() -> None:
    """Torch is here already: nothing changes."""
    before = [sys.modules.get(name) for name in LATER], list(sys.meta_path)
    torch_import.import_torch()
    assert ([sys.modules.get(name) for name in LATER], list(sys.meta_path)) == before


@pytest.mark.parametrize("version", ["1.0.0", "99.0", ""])
def test_a_version_that_was_not_tried_is_imported_whole(version: str) -> None:
    code = f"""
import sys
from lightweight_engine.backend import torch_import
torch_import._version = lambda: {version!r}
torch_import.import_torch()
print("torch" in sys.modules, [type(sys.modules[name]).__name__ for name in {LATER!r}])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "True ['module', 'module']"


def test_where_torch_cannot_be_imported_nothing_is_left_behind() -> None:
    code = f"""
import sys
sys.modules["torch"] = None
from lightweight_engine.backend import torch_import
del sys.modules["torch"]
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "torch": raise ImportError("a library is missing")
sys.meta_path.insert(0, Broken())
try: torch_import.import_torch()
except ImportError as error: print(error, {LATER!r}[0] in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "a library is missing False"
