"""The LoRAs that act together: files at strengths, and what they change in each network."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..backend.lora import Change
from .layouts import Role

if TYPE_CHECKING:
    from .lora_files import LoraFile


@dataclass(frozen=True, eq=False)
class LoraUse:
    """A file at its strengths.

    Attributes:
        name: what people call it, and a tag names.
        content: tells the file's content from any other's, with how it was read.
        given: what was asked for, fit to be shown: a name, or a URL without what is secret in it.
        sha256: of the file, in hex.
    """

    file: LoraFile
    content: Hashable
    name: str
    given: str
    sha256: str
    transformer: float
    text: float

    def strength(self, role: Role) -> float:
        return self.transformer if role == "transformer" else self.text

    def acts_on(self, role: Role) -> bool:
        return self.strength(role) != 0 and bool(self.file.changes.get(role))


@dataclass(frozen=True, eq=False)
class LoraSet:
    """Files that act together, in their order."""

    uses: tuple[LoraUse, ...] = ()

    def key(self, role: Role) -> Hashable:
        """What a network of this role is changed by: content and strengths. Equal keys, equal networks."""
        return tuple((use.content, use.strength(role)) for use in self.uses if use.acts_on(role))

    @property
    def full_key(self) -> Hashable:
        """What all networks are changed by."""
        return self.key("transformer"), self.text_key

    @property
    def text_key(self) -> Hashable:
        """What the text encoders are changed by."""
        return self.key("clip"), self.key("t5")

    def changes(self, role: Role) -> Mapping[str, list[tuple[Change, float]]]:
        """Parameter -> its changes at their strengths, in the order of the files."""
        found: dict[str, list[tuple[Change, float]]] = {}
        for use in self.uses:
            if use.acts_on(role):
                for parameter, changes in use.file.changes[role].items():
                    found.setdefault(parameter, []).extend((change, use.strength(role)) for change in changes)
        return found


NO_LORAS = LoraSet()
