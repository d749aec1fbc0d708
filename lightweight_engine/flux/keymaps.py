"""Which parts of Flux a file holds, told by its keys and shapes alone, never by its name. Loads no torch.

Prefixes are discovered: the anchor of a part is a key that every such part has, and what stands before it is the
prefix of all its keys. So ``model.diffusion_model.``, ``vae.``, ``text_encoders.t5xxl.transformer.`` and any other
spelling need no row here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..backend.checkpoint import DTYPES, Checkpoint
from ..backend.stored import Stored, find_stored
from ..errors import CorruptCheckpointError, UnsupportedCheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from ..backend.packed import Packed

Role = Literal["transformer", "t5", "clip", "autoencoder"]


@dataclass(frozen=True)
class PartRule:
    """How a part is recognised and which of its keys are not ours.

    ``renamed`` gives a parameter's other spelling; ``ignored`` are keys that the network does not read.
    """

    anchor: str
    renamed: Mapping[str, str]
    ignored: re.Pattern[str]


RULES: dict[Role, PartRule] = {
    "transformer": PartRule("double_blocks.0.img_attn.norm.key_norm.scale", {}, re.compile(r"^$")),
    "t5": PartRule(
        "encoder.block.0.layer.0.SelfAttention.k.weight",
        {"encoder.embed_tokens.weight": "shared.weight"},
        re.compile(r"^(decoder\.|lm_head\.|logit_scale$)"),
    ),
    "clip": PartRule(
        "text_model.encoder.layers.0.layer_norm1.bias",
        {},
        re.compile(r"^(text_projection|visual_projection|vision_model\.|visual\.|logit_scale$)|position_ids$"),
    ),
    "autoencoder": PartRule(
        "decoder.up.0.block.0.norm1.weight", {}, re.compile(r"^(loss\.|quant_conv\.|post_quant_conv\.)")
    ),
}

# A key or part of one -> what the file is. Checked where no part of Flux.1 is found, most telling first.
FOREIGN: tuple[tuple[str, str], ...] = (
    ("single_stream_modulation.lin.", "a Flux.2 checkpoint, which is another model"),
    ("double_stream_modulation_img.lin.", "a Flux.2 checkpoint, which is another model"),
    ("distilled_guidance_layer.", "a Chroma checkpoint, which is another model"),
    ("txt_in.individual_token_refiner", "a HunyuanVideo checkpoint, which is another model"),
    (".qweight", "an SVDQuant, AWQ or GPTQ checkpoint; use the bf16 file of the same model"),
    ("redux_up.weight", "a Flux Redux adapter, not a checkpoint"),
    ("controlnet_", "a ControlNet, not a checkpoint"),
    ("ip_adapter", "an IP-Adapter, not a checkpoint"),
    (
        "single_transformer_blocks.",
        "a Flux checkpoint in the diffusers layout, which this version does not read; use the single BFL file",
    ),
    ("transformer_blocks.0.attn.norm_added_k", "a diffusers checkpoint, which this version does not read"),
    ("joint_blocks.", "a Stable Diffusion 3 checkpoint, which is another model"),
    ("input_blocks.", "a Stable Diffusion 1, 2 or XL checkpoint, which is another model"),
    ("down_blocks.", "a Stable Diffusion checkpoint or VAE in the diffusers layout, which is not read"),
    ("transformer.resblocks.", "an OpenCLIP text encoder; use clip_l.safetensors"),
)

# A LoRA may hold whole tensors too, so it is told apart before any part is looked for.
LORA_MARKERS = (".lora_A.", ".lora_B.", ".lora_up.", ".lora_down.", "lora_unet_")

@dataclass(frozen=True, eq=False)
class Source:
    """Where a parameter of ours comes from: rows of one stored tensor or several, one below another.

    Attributes:
        pieces: (tensor, rows of it), all rows where that is None.
        swapped: the two halves of the rows change places (diffusers has scale before shift).
        shape: of the parameter; that of the rows joined, or one with as many elements (1 x 1 convolutions).
    """

    pieces: tuple[tuple[Stored, tuple[int, int] | None], ...]
    shape: tuple[int, ...]
    swapped: bool = False

    @property
    def format(self) -> str:
        """The one format of all pieces, else ``mixed``."""
        formats = {stored.format for stored, _ in self.pieces}
        return formats.pop() if len(formats) == 1 else "mixed"

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return sum(
            stored.nbytes if rows is None else stored.nbytes * (rows[1] - rows[0]) // stored.shape[0]
            for stored, rows in self.pieces
        )

    def read(self) -> Tensor | Packed:
        """The parameter: a view of the mapped file where one plain tensor holds it as it is; packed where all pieces are
        and can be joined without a change of any number; else put together in float32 or the pieces' own dtype.
        """
        stored, rows = self.pieces[0]
        if len(self.pieces) > 1 or rows is not None or self.swapped:
            raise NotImplementedError
        return stored.read()


@dataclass(frozen=True, eq=False)
class Part:
    """One network inside a file: parameter name -> where it comes from.

    Attributes:
        layout: whose key names the file has: ``bfl``, ``diffusers``, ``gguf`` …
        ignored: keys that the network does not read.
        given: sizes that a caller adds, where neither shapes nor the file's metadata tell them.
    """

    role: Role
    checkpoint: Checkpoint
    sources: Mapping[str, Source]
    ignored: tuple[str, ...] = ()
    given: Mapping[str, Any] = field(default_factory=dict)
    layout: str = "bfl"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: source.shape for name, source in self.sources.items()}

    @property
    def hints(self) -> dict[str, Any]:
        """Sizes that shapes do not tell: the metadata's ``config`` (a JSON object), then those ``given``."""
        text = self.checkpoint.metadata.get("config", "{}")
        try:
            hints = json.loads(text)
        except ValueError:
            hints = None
        if not isinstance(hints, dict):
            raise CorruptCheckpointError(
                f"{self.checkpoint.path.name}: its metadata 'config' is not a JSON object; save it again"
            )
        return {**hints, **self.given}

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return sum(source.nbytes for source in self.sources.values())

    @property
    def formats(self) -> dict[str, int]:
        """Bytes in each format; a plain tensor counts under its dtype (``BF16``)."""
        sizes: dict[str, int] = {}
        for source in self.sources.values():
            for stored, _ in source.pieces:
                name = stored.dtype if stored.format == "plain" else stored.format
                sizes[name] = sizes.get(name, 0) + stored.nbytes
        return sizes

    @property
    def storage(self) -> str:
        """The format that most bytes are in: a quantised one, or ``plain``."""
        name = max(self.formats, key=lambda name: self.formats[name])
        return "plain" if name in DTYPES else name

    @property
    def dtype(self) -> str:
        """The dtype that most bytes are in, in safetensors' spelling."""
        sizes: dict[str, int] = {}
        for source in self.sources.values():
            for stored, _ in source.pieces:
                sizes[stored.dtype] = sizes.get(stored.dtype, 0) + stored.nbytes
        return max(sizes, key=lambda name: sizes[name])


def find_parts(checkpoint: Checkpoint) -> dict[Role, Part]:
    """The parts of Flux in a file.

    Raises:
        UnsupportedCheckpointError: there is none; the message says what the file is, where that is known.
    """
    if any(marker in key for key in checkpoint.tensors for marker in LORA_MARKERS):
        raise UnsupportedCheckpointError(f"{checkpoint.path.name} is a LoRA; it belongs in models/Lora")
    prefixes: dict[Role, str] = {}
    for role, rule in RULES.items():
        prefix = _prefix(checkpoint, rule.anchor)
        if prefix is not None:
            prefixes[role] = prefix
    if not prefixes:
        raise UnsupportedCheckpointError(f"{checkpoint.path.name} is {_foreign_name(checkpoint)}")
    return {role: _part(role, checkpoint, prefix, prefixes) for role, prefix in prefixes.items()}


def _prefix(checkpoint: Checkpoint, anchor: str) -> str | None:
    found = [key[: -len(anchor)] for key in checkpoint.tensors if key == anchor or key.endswith("." + anchor)]
    return min(found, key=len) if found else None


def _part(role: Role, checkpoint: Checkpoint, prefix: str, prefixes: Mapping[Role, str]) -> Part:
    rule = RULES[role]
    others = tuple(other for other in prefixes.values() if other != prefix and other.startswith(prefix))
    sources: dict[str, Source] = {}
    ignored = []
    for key, stored in find_stored(checkpoint).items():
        if not key.startswith(prefix) or (others and key.startswith(others)):
            continue
        name = key[len(prefix) :]
        name = rule.renamed.get(name, name)
        if rule.ignored.search(name) or name in sources:
            ignored.append(key)
        else:
            sources[name] = Source(((stored, None),), stored.shape)
    return Part(role, checkpoint, sources, tuple(ignored))


def _foreign_name(checkpoint: Checkpoint) -> str:
    for marker, name in FOREIGN:
        if any(marker in key for key in checkpoint.tensors):
            return name
    first = ", ".join(list(checkpoint.tensors)[:3]) or "none"
    return f"no part of Flux.1 that this engine knows (first keys: {first}); use a Flux.1 file"
