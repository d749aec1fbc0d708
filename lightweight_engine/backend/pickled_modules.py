"""Whole objects that ``torch.save`` has pickled, a network with its layers, read without knowing their classes.

Where a state dict would have done, some training programs save the network itself. The machine of ``pickles`` reads
such a file too if it is told which classes may be named: an object becomes a record, the name of its class beside its
attributes, and a class is never imported, made or called. Loads no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .checkpoint import MAX_NAME, MAX_TENSORS, Checkpoint
from .pickles import (
    BUILDERS,
    STEPS,
    Global,
    Machine,
    Opaque,
    Refused,
    Tensor,
    entries_of,
    opaque,
    read_entry,
    refusals,
    tensor_info,
)
from .zip_entries import Entry

MAX_DEPTH = 32  # of modules in modules


@dataclass(eq=False)
class Record:
    """An object of a file: the name of its class, and its attributes."""

    kind: str
    state: dict[str, Any] = field(default_factory=dict)


def _method(owner: Any, name: Any) -> Opaque:
    """A method of an object, as a layer has it whose forward was replaced; it is not looked up."""
    if not isinstance(owner, Record) or not isinstance(name, str):
        raise Refused("it asks for an attribute of what is no object of a network")
    return Opaque()


# Values that stand beside weights. A set is the list that it was made of.
OBJECT_BUILDERS: Mapping[str, Callable[..., Any]] = {
    **BUILDERS,
    "builtins.set": lambda members=(): members,
    "__builtin__.set": lambda members=(): members,
    "pathlib.PosixPath": opaque,
    "pathlib.WindowsPath": opaque,
    "pathlib._local.PosixPath": opaque,
    "pathlib._local.WindowsPath": opaque,
    "torch.device": opaque,
    "builtins.getattr": _method,
    "__builtin__.getattr": _method,
}


class _ObjectMachine(Machine):
    """Also makes records, of the classes whose full names match ``classes``."""

    def __init__(self, program: bytes, classes: re.Pattern[str]) -> None:
        super().__init__(program)
        self.classes = classes

    @property
    def steps(self) -> Mapping[bytes, Callable[[Any], Any]]:
        return OBJECT_STEPS

    @property
    def builders(self) -> Mapping[str, Callable[..., Any]]:
        return OBJECT_BUILDERS

    def name(self, module: Any, name: Any) -> None:
        found = Global(str(module)[:MAX_NAME], str(name)[:MAX_NAME])
        if self.classes.fullmatch(str(found)):
            self.push(found)
        else:
            super().name(module, name)

    def make(self) -> None:
        """NEWOBJ: an object of a class, without arguments and without attributes yet."""
        arguments, made = self.stack.pop(), self.stack.pop()
        if not isinstance(made, Global) or not self.classes.fullmatch(str(made)) or arguments != ():
            raise Refused(f"it makes an object of {made if isinstance(made, Global) else 'what is no class'}")
        self.push(Record(str(made)))

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Record):
            if target.state or not isinstance(state, dict):
                raise Refused(f"it gives an object of {target.kind} attributes that torch does not write")
            target.state = state


OBJECT_STEPS: Mapping[bytes, Callable[[Any], Any]] = {
    **STEPS,
    b"\x81": _ObjectMachine.make,
    b"b": _ObjectMachine.build,
}


@dataclass(frozen=True, eq=False)
class SavedObject:
    """What a file holds: dictionaries, lists, plain values, records, and descriptions of tensors."""

    path: Path
    value: Any
    entries: Mapping[str, Entry]

    def checkpoint(self, module: Record, attributes: Sequence[str] = ()) -> Checkpoint:
        """The parameters and buffers of a saved module, under the names of its state dict.

        Args:
            attributes: mere attributes of the module that count too, if they are tensors.

        Raises:
            UnsupportedCheckpointError: the module holds itself, or more than makes sense.
            CorruptCheckpointError: a tensor does not fit its storage.
        """
        with refusals(self.path):
            tensors = dict(module_tensors(module))
            tensors |= {name: found for name in attributes if isinstance(found := module.state.get(name), Tensor)}
            infos = {name: tensor_info(name, tensor, self.entries) for name, tensor in tensors.items()}
        return Checkpoint(self.path, infos, container="pickle")


def open_object(path: Path, classes: re.Pattern[str]) -> SavedObject:
    """
    Args:
        classes: which classes a file may name, by module and name.

    Raises:
        UnsupportedCheckpointError: it asks for something else; says for what.
        CorruptCheckpointError: the archive or its program does not add up.
    """
    with refusals(path):
        entries = entries_of(path)
        value = _ObjectMachine(read_entry(path, entries["data.pkl"]), classes).run()
    return SavedObject(path, value, entries)


def module_tensors(module: Record) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a module and those below it, as its state dict has them."""
    waiting, seen = [("", module, 0)], 0
    while waiting:
        prefix, module, depth = waiting.pop()
        seen += 1
        # A module that stands in several places is walked in each; one that stands in itself would be for ever.
        if seen > MAX_TENSORS or depth > MAX_DEPTH or len(prefix) > MAX_NAME:
            raise Refused("its modules are nested too deeply")
        hidden = module.state.get("_non_persistent_buffers_set")
        for name, value in (*_entries(module, "_parameters"), *_entries(module, "_buffers")):
            if isinstance(value, Tensor) and not (isinstance(hidden, list) and name in hidden):
                yield f"{prefix}{name}", value
        for name, inner in _entries(module, "_modules"):
            if isinstance(inner, Record):
                waiting.append((f"{prefix}{name}.", inner, depth + 1))


def _entries(module: Record, attribute: str) -> list[tuple[str, Any]]:
    entries = module.state.get(attribute, {})
    if not isinstance(entries, dict):
        raise Refused(f"the {attribute} of {module.kind} are no dictionary")
    return [(str(name)[:MAX_NAME], value) for name, value in entries.items()]
