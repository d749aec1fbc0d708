"""LoRAs of a request: found or fetched, read once, and put together into the set that acts.

What is asked for comes from three places: addresses (``lora_urls``), ``LoraSpec`` by name or address (``loras``), and
tags in a prompt. Names are looked up in the list of files that are there, never as paths.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..backend.checkpoint import open_checkpoint
from ..backend.kept_files import FileVersion
from ..errors import AdapterChangedError, AdapterError, RequestError, about, placed
from ..flux.keymaps import Role
from ..flux.lora_set import LoraSet, LoraUse
from ..flux.params import Shapes
from ..flux.prompt import NetworkTag, parse_networks, read_lora_tag
from ..labels import Compat
from ..lora_spec import MAX_LORA_SCALE, LoraSpec
from ..request import MAX_LORAS, GenerationRequest
from ..results import AppliedLora, OnBytes
from .lora_library import LoraLibrary

if TYPE_CHECKING:
    from ..flux.lora_files import LoraFile

# LoRA files that stay open, those used last: their pages are given back, and they need not be read and checked again.
FILES_KEPT = 8


class Fetch(Protocol):
    """Gets the LoRA file of a URL, which stays in its place inside the context."""

    def __call__(self, url: str, *, sha256: str | None, progress: OnBytes) -> AbstractContextManager[Any]: ...


def specs_of(request: GenerationRequest, prompt: str, warnings: list[str]) -> list[LoraSpec]:
    """Every LoRA that a request asks for with one of its prompts: those of its fields, then those of the prompt's tags.

    One that is asked for twice at the same strengths counts once, as in the reference.

    Raises:
        RequestError: a tag cannot be read, its strength is out of bounds, or there are too many.
    """
    asked = [*of_urls(request), *request.loras, *_tagged(prompt, warnings)]
    once = list(dict.fromkeys(asked))
    if len(once) < len(asked):
        warnings.append("a LoRA that is asked for twice at the same strength counts once, as in Forge")
    warnings += [
        f"{field_of(spec, request)}: {spec.name or 'a LoRA'} had no effect at strength 0; give another, or leave it out"
        for spec in once
        if spec.scale == 0 and not spec.text_scale
    ]
    if len(once) > MAX_LORAS:
        raise RequestError(f"loras: {len(once)} are asked for; at most {MAX_LORAS} can act at once", field="loras")
    return once


def field_of(spec: LoraSpec, request: GenerationRequest) -> str:
    """The field that asks for a LoRA, and its place there; what stands in none of its own is a tag of the prompt."""
    for field, specs in (("loras", request.loras), ("lora_urls", of_urls(request))):
        if spec in specs:
            return placed(field, specs.index(spec))
    return "prompt"


def of_urls(request: GenerationRequest) -> list[LoraSpec]:
    """``lora_urls``, each with its scale of ``lora_scales``."""
    scales = request.lora_scales or (1.0,)
    scales = scales * len(request.lora_urls) if len(scales) == 1 else scales
    return [LoraSpec(url=url, scale=scale) for url, scale in zip(request.lora_urls, scales, strict=True)]


def _tagged(prompt: str, warnings: list[str]) -> list[LoraSpec]:
    tags = parse_networks(prompt)[1]
    warnings += [
        f"the tag {tag} has no effect: only <lora:NAME:STRENGTH> is known" for tag in tags if tag.kind != "lora"
    ]
    return [_spec_of(tag, warnings) for tag in tags if tag.kind == "lora"]


def _spec_of(tag: NetworkTag, warnings: list[str]) -> LoraSpec:
    read = read_lora_tag(tag)
    if max(abs(read.te), abs(read.unet)) > MAX_LORA_SCALE:
        raise RequestError(
            f"prompt: the tag {str(tag)[:200]} has a strength beyond {MAX_LORA_SCALE:g}; give a smaller one",
            field="prompt",
        )
    if read.dyn is not None:
        warnings.append(f"the rank in the tag {tag} has no effect, as in Forge")
    return LoraSpec(name=read.name, scale=read.unet, text_scale=read.te)


class LoRAManager:
    """Turns what requests ask for into sets of LoRAs for one model.

    Args:
        shapes: of the networks that LoRAs may change.
        library: the files that are looked up by name.
        fetch: gets those that are given by URL.
        sha256_of: of a file, in hex.
        shown: a URL without what is secret in it.
        exact_dora: DoRA measures the changed weight, as in training; the reference measures the weight.
    """

    def __init__(
        self,
        shapes: Mapping[Role, Shapes],
        library: LoraLibrary,
        fetch: Fetch,
        *,
        sha256_of: Callable[[Path], str],
        shown: Callable[[str], str],
        exact_dora: bool = False,
    ) -> None:
        self.library = library
        self._shapes = shapes
        self._fetch, self._sha256_of, self._shown = fetch, sha256_of, shown
        self._exact_dora = exact_dora
        self._open: OrderedDict[tuple[str, Compat], LoraFile] = OrderedDict()

    def use(
        self,
        specs: Sequence[LoraSpec],
        compat: Compat = "fixed",
        progress: OnBytes = lambda *_: None,
        field_of: Callable[[LoraSpec], str | None] = lambda _: None,
    ) -> LoraSet:
        """The LoRAs that are asked for, ready to act.

        Args:
            progress: told of every piece that is fetched; what it raises ends the fetch.
            field_of: the field of the request that asks for one, which errors name.

        Raises:
            ModelNotFoundError: there is none of that name.
            DownloadError: one cannot be fetched.
            AdapterError: one is of another model, broken, or needs more than this model has.
        """
        used = []
        for spec in specs:
            with about(field_of(spec)):
                used.append(self._use(spec, compat, progress))
        return LoraSet(tuple(used))

    def read(self, path: Path, name: str, compat: Compat = "fixed") -> LoraUse:
        """The file at a path at strength 1, wherever it lies: for who checks it before it may be used.

        Raises:
            AdapterError: as ``use``.
        """
        return self._from_folder(LoraSpec(name=name), path, name, compat)

    def clear(self) -> None:
        """Close every file."""
        self._open.clear()

    def _use(self, spec: LoraSpec, compat: Compat, progress: OnBytes) -> LoraUse:
        if spec.url is not None:
            with self._fetch(spec.url, sha256=spec.sha256, progress=progress) as held:
                return self._made(spec, held.path, held.name, self._shown(spec.url), held.sha256, compat)
        entry = self.library.find(spec.name or "")
        return self._from_folder(spec, entry.path, entry.name, compat)

    def _from_folder(self, spec: LoraSpec, path: Path, name: str, compat: Compat) -> LoraUse:
        """A file that anybody may replace meanwhile; fetched ones are held."""
        try:
            version = FileVersion.of(path)
            sha256 = self._sha256_of(path)
            if spec.sha256 not in (None, sha256):
                raise AdapterError(f"{name} is another file: its sha256 is {sha256}; correct it, or the name")
            return self._made(spec, path, name, name, sha256, compat, version)
        except OSError as error:
            reason = error.strerror or "it was replaced just now"
            if isinstance(error, PermissionError):
                raise AdapterError(f"{name} cannot be read ({reason}); mend its permissions") from None
            raise AdapterChangedError(f"{name} cannot be read ({reason}); ask again") from None

    def _made(
        self,
        spec: LoraSpec,
        path: Path,
        name: str,
        given: str,
        sha256: str,
        compat: Compat,
        version: FileVersion | None = None,
    ) -> LoraUse:
        key = (sha256, compat)
        if key not in self._open:
            file = self._read(path, name, compat)
            if version not in (None, file.checkpoint.version_of(path)):  # it would be known by another's hash
                raise AdapterChangedError(f"{name} was replaced as it was read; ask again")
            self._open[key] = file
        self._open.move_to_end(key)
        while len(self._open) > FILES_KEPT:
            self._open.popitem(last=False)
        text = spec.scale if spec.text_scale is None else spec.text_scale
        return LoraUse(self._open[key], key, name, given, sha256, spec.scale, text)

    def _read(self, path: Path, name: str, compat: Compat) -> LoraFile:
        from ..flux.lora_files import read_lora  # all dialects, which a start without LoRAs does not need

        file = read_lora(
            open_checkpoint(path), self._shapes, compat=compat, exact_dora=self._exact_dora, name=f"{name}.safetensors"
        )
        has = self._shapes["transformer"]["img_in.weight"][1]
        if (file.input_channels or 0) > has:
            raise AdapterError(
                f"{name} is a control LoRA: it reads {file.input_channels} channels, the latent's {has} and those of a "
                "control picture, which this engine does not take; leave it out"
            )
        file.give_back()
        return file


def reports(sets: Iterable[LoraSet]) -> tuple[AppliedLora, ...]:
    """What became of each file, once for each pair of strengths."""
    uses = {(use.content, use.transformer, use.text): use for each in sets for use in each.uses}
    return tuple(_told(use) for use in uses.values())


def _told(use: LoraUse) -> AppliedLora:
    report = use.file.report
    ignored: dict[str, tuple[str, ...]] = {}
    for row in report.ignored:
        ignored[row.reason] = (*ignored.get(row.reason, ()), *row.names)
    return AppliedLora(
        name=use.name,
        given=use.given,
        sha256=use.sha256,
        scale=use.transformer,
        text_scale=use.text,
        found=report.found,
        applied=report.applied,
        patches={str(role): count for role, count in report.patches.items()},
        ignored=ignored,
        notes=report.notes,
    )
