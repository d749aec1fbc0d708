"""Names in LoRA files as data: which parameter a tensor of any dialect changes, in which rows, and as what.

A tensor is called ``<alias>.<suffix>``. The suffix says what it is (``lora_A.weight`` is the factor ``down``), the
alias names a module in one of several spellings; a single table, built from the names and shapes of the models at hand,
has them all: each with its dots, and with underscores in their place, as kohya writes them. A mixture of both stands
for nothing, as other models have names that differ in no more (``img_attn_qkv`` of HunyuanVideo).

Source: the key names of files by kohya sd-scripts, diffusers and peft, ai-toolkit, OneTrainer, LyCORIS, SimpleTuner,
XLabs, fal, ComfyUI and Black Forest Labs. Loads no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ..labels import Compat
from .layouts import BARE_CLIP, DIFFUSERS_TRANSFORMER, Role, Row
from .params import Shapes
from .sources import Rows


@dataclass(frozen=True)
class Place:
    """What an alias stands for.

    Attributes:
        parameter: the module's weight, or the one parameter that it consists of (``….query_norm.scale``).
        rows: which rows of it, where that is not all.
        swapped: the file has the two halves of the rows in the other order.
    """

    role: Role
    parameter: str
    rows: Rows = None
    swapped: bool = False

    @property
    def bias(self) -> str:
        return f"{self.parameter.removesuffix('.weight')}.bias"


class Named(NamedTuple):
    """A tensor's name, read: ``kind`` is None for an unknown suffix, ``place`` for a module that no model has."""

    alias: str
    kind: str | None
    place: Place | None


class _Alias(NamedTuple):
    """A spelling of a module; ``start`` and ``stop`` are rows in units of the matrix's width, None being its end."""

    theirs: str
    ours: str
    start: int = 0
    stop: int | None = None
    swapped: bool = False


def _aliases(rows: tuple[Row, ...]) -> Iterator[_Alias]:
    """Rows of a layout as spellings. Of joined tensors, all but the last are squares: queries, keys, values."""
    last: dict[str, int] = {}
    for row in rows:
        last[row.ours] = max(last.get(row.ours, 0), row.at)
    for row in rows:
        stop = None if row.at == last[row.ours] else row.at + 1
        yield _Alias(row.theirs, row.ours, row.at, stop, row.swapped)


# XLabs numbers its processors: 1 is the image's, 2 the text's. Those of single blocks (USO) see the attention alone.
_XLABS = (
    *(
        _Alias(f"double_blocks.{{n}}.processor.{kind}_lora{number}.", f"double_blocks.{{n}}.{stream}_attn.{kind}.")
        for number, stream in ((1, "img"), (2, "txt"))
        for kind in ("qkv", "proj")
    ),
    _Alias("single_blocks.{n}.processor.qkv_lora.", "single_blocks.{n}.linear1.", 0, 3),
    _Alias("single_blocks.{n}.processor.proj_lora.", "single_blocks.{n}.linear2."),
)

_SPELLINGS: dict[Role, tuple[_Alias, ...]] = {
    "transformer": (*_aliases(DIFFUSERS_TRANSFORMER), *_XLABS),
    "clip": tuple(_aliases(BARE_CLIP)),
    "t5": (),
}

# What may stand before a module's name, several times over -> the network that it then belongs to, where it tells.
_PREFIXES: tuple[tuple[str, Role | None], ...] = (
    ("lora_unet_", "transformer"),
    ("lora_transformer_", "transformer"),
    ("lora_transformer.", "transformer"),
    ("lycoris_", "transformer"),
    ("lora_te1_", "clip"),
    ("lora_te2_", "t5"),
    ("lora_te3_", "t5"),
    ("text_encoders.clip_l.transformer.", "clip"),
    ("text_encoders.t5xxl.transformer.", "t5"),
    ("clip_l.transformer.", "clip"),
    ("t5xxl.transformer.", "t5"),
    ("text_encoder.", "clip"),
    ("text_encoder_2.", "t5"),
    ("base_model.model.", None),
    ("model.diffusion_model.", None),
    ("diffusion_model.", None),
    ("transformer.", None),
    ("model.", None),
    ("net.", None),
)

# Prefixes that the reference does not know: its goldens leave those tensors out.
_NOT_IN_FORGE = ("text_encoder_2.",)

# Endings of an alias that belong to its module's name in no table: old diffusers, and TheLastBen's trainer.
_ENDINGS = ("", "_lora", "_")

_ADAPTER = r"(?:\.(?!weight$|bias$)\w+)?"  # the adapter's name, which peft puts in (``default``)
_WEIGHT = r"(?:\.weight)?"

# Kind of a tensor -> the suffixes that say so.
_SUFFIXES: tuple[tuple[str, str], ...] = (
    ("down", rf"(?:lora_A{_ADAPTER}|lora_down|lora\.down|lora_linear_layer\.down|down){_WEIGHT}"),
    ("up", rf"(?:lora_B{_ADAPTER}|lora_up|lora\.up|lora_linear_layer\.up|up){_WEIGHT}"),
    ("mid", r"lora_mid\.weight"),
    ("alpha", r"alpha"),
    ("magnitude", rf"(?:dora_scale|lora_magnitude_vector{_ADAPTER}{_WEIGHT})"),
    ("diff", r"(?:diff|w_norm)"),
    ("diff_b", rf"(?:lora_B{_ADAPTER}\.bias|lora_up\.bias|diff_b|b_norm)"),
    *((name, rf"{name}\.weight") for name in ("a1", "a2", "b1", "b2")),
    *((f"hada_{name}", f"hada_{name}") for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *((f"lokr_{name}", f"lokr_{name}") for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
    *((name, name) for name in ("oft_blocks", "rescale", "set_weight", "reshape_weight")),
)
_KIND = re.compile(r"\.(?:" + "|".join(f"(?P<{kind}>{pattern})" for kind, pattern in _SUFFIXES) + r")$")

# Parameters that control LoRAs of Black Forest Labs bring under their own name, to be put in place of the model's.
_REPLACED = re.compile(r"_norm\.scale$|\.norm_(?:added_)?[qk]\.weight$")


@dataclass(frozen=True)
class LoraNames:
    """Every spelling of every module of the models at hand: network -> alias without prefixes -> place."""

    tables: Mapping[Role, Mapping[str, Place]]
    compat: Compat = "fixed"

    @classmethod
    def of(cls, shapes: Mapping[Role, Shapes], compat: Compat = "fixed") -> LoraNames:
        """The names for networks of these shapes; ``forge`` knows none that the reference does not know."""
        tables: dict[Role, dict[str, Place]] = {}
        for role in _SPELLINGS:
            for alias, place in _spelled(role, shapes.get(role, {})):
                tables.setdefault(role, {}).update({alias: place, alias.replace(".", "_"): place})
        return cls(tables, compat)

    def read(self, key: str) -> Named:
        """What the tensor ``key`` of a LoRA file is."""
        match = _KIND.search(key)
        if match:
            alias = key[: match.start()]
            return Named(alias, match.lastgroup, self.place(alias))
        if _REPLACED.search(key) and (place := self.place(key.removesuffix(".weight"))):
            return Named(key, "set_weight", place)
        return Named(key, None, self._place_above(key))

    def _place_above(self, key: str) -> Place | None:
        """The module that a tensor of an unknown kind hangs on."""
        above = key.rpartition(".")[0]
        return self.place(above) or self._place_above(above) if above else None

    def place(self, alias: str) -> Place | None:
        """The module that an alias stands for, or None where no model has it."""
        rest, role = self._stripped(alias)
        for table in (self.tables.get(role, {}),) if role else self.tables.values():
            for ending in _ENDINGS:
                if rest.endswith(ending) and (found := table.get(rest.removesuffix(ending))):
                    return found
        return None

    def _stripped(self, alias: str) -> tuple[str, Role | None]:
        """The alias without what stands before the module's name, and the network that this tells."""
        role: Role | None = None
        while found := next((row for row in _PREFIXES if alias.startswith(row[0])), None):
            if self.compat == "forge" and found[0] in _NOT_IN_FORGE:
                break
            alias, role = alias[len(found[0]) :], role or found[1]
        return alias, role


def _spelled(role: Role, shapes: Shapes) -> Iterator[tuple[str, Place]]:
    """Aliases and places of one network: our own names, and the spellings of other layouts."""
    for name in shapes:
        for leaf in (".weight", ".scale"):
            if name.endswith(leaf):
                yield name.removesuffix(leaf), Place(role, name)
        if not name.endswith((".weight", ".bias")):
            yield name, Place(role, name)
    for spelling in _SPELLINGS[role]:
        leaf = "weight" if spelling.ours.endswith(".") else ""
        pattern = re.compile(re.escape(spelling.ours + leaf).replace(r"\{n\}", r"(\d+)"))
        theirs = spelling.theirs.removesuffix(".").removesuffix(".weight")
        for name in shapes:
            if match := pattern.fullmatch(name):
                alias = theirs.replace("{n}", "{}").format(*match.groups())
                place = Place(role, name, _rows(spelling, shapes[name]), spelling.swapped)
                yield alias, place


def _rows(spelling: _Alias, shape: tuple[int, ...]) -> Rows:
    if spelling.start == 0 and spelling.stop is None:
        return None
    rows, width = shape
    return spelling.start * width, rows if spelling.stop is None else spelling.stop * width
