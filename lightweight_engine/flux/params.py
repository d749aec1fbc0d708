"""Sizes of the four networks, read from the shapes of a file's tensors.

A ``Shapes`` maps the published parameter names to shapes. What shapes do not tell comes from ``hints``: a file's
own metadata or the caller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import UnsupportedCheckpointError

Shapes = Mapping[str, tuple[int, ...]]
Hints = Mapping[str, Any]

# Variant -> the time shift of its noise schedule, the same at any size.
TIME_SHIFTS = {"dev": 1.15, "schnell": 1.0}


def count_blocks(shapes: Shapes, prefix: str) -> int:
    """How many consecutively numbered children ``prefix`` has: ``prefix.0.…``, ``prefix.1.…``, …"""
    start = len(prefix) + 1
    numbers = {
        key[start:].split(".", 1)[0]
        for key in shapes
        if key.startswith(prefix + ".") and key[start : start + 1].isdigit()
    }
    return len(numbers)


def _shape(shapes: Shapes, key: str) -> tuple[int, ...]:
    if key not in shapes:
        raise UnsupportedCheckpointError(f"the tensor {key!r} is missing; use the complete file")
    return tuple(shapes[key])


@dataclass(frozen=True)
class FluxParams:
    """Sizes of a Flux transformer; the defaults are those of the published 12 B model.

    ``schedule_of`` names the variant whose noise schedule is used, where that does not follow from ``guidance_embed``.

    Source: the configuration of the Black Forest Labs reference (``flux-dev`` and ``flux-schnell``).
    """

    in_channels: int = 64
    vec_in_dim: int = 768
    context_in_dim: int = 4096
    hidden_size: int = 3072
    mlp_hidden: int = 12288
    num_heads: int = 24
    depth: int = 19
    depth_single_blocks: int = 38
    axes_dim: tuple[int, ...] = (16, 56, 56)
    theta: int = 10_000
    qkv_bias: bool = True
    guidance_embed: bool = True
    schedule_of: str | None = None

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mu(self) -> float:
        """The time shift of the noise schedule."""
        return TIME_SHIFTS[self.schedule_of or ("dev" if self.guidance_embed else "schnell")]

    def scheduled_as(self, variant: str) -> FluxParams:
        """The same sizes with the noise schedule of ``dev`` or ``schnell``; with that of the file for ``auto``."""
        return self if variant == "auto" else replace(self, schedule_of=variant)

    @classmethod
    def from_shapes(cls, shapes: Shapes, hints: Hints | None = None) -> FluxParams:
        """Read the sizes from tensor shapes.

        Args:
            hints: may hold ``axes_dim`` and ``theta``, needed where the head size is not 128.

        Raises:
            UnsupportedCheckpointError: a tensor is missing, or the RoPE axes are unknown.
        """
        hints = hints or {}
        hidden, in_channels = _shape(shapes, "img_in.weight")
        head_dim = _shape(shapes, "double_blocks.0.img_attn.norm.key_norm.scale")[0]
        axes = tuple(hints.get("axes_dim", (16, 56, 56) if head_dim == 128 else ()))
        if sum(axes) != head_dim:
            raise UnsupportedCheckpointError(
                f"the RoPE axes {axes or '(not given)'} do not add up to the head size {head_dim}; "
                "give axes_dim in the file's metadata or in the call"
            )
        return cls(
            in_channels=in_channels,
            vec_in_dim=_shape(shapes, "vector_in.in_layer.weight")[1],
            context_in_dim=_shape(shapes, "txt_in.weight")[1],
            hidden_size=hidden,
            mlp_hidden=_shape(shapes, "double_blocks.0.img_mlp.0.weight")[0],
            num_heads=hidden // head_dim,
            depth=count_blocks(shapes, "double_blocks"),
            depth_single_blocks=count_blocks(shapes, "single_blocks"),
            axes_dim=axes,
            theta=int(hints.get("theta", 10_000)),
            qkv_bias="double_blocks.0.img_attn.qkv.bias" in shapes,
            guidance_embed="guidance_in.in_layer.weight" in shapes,
        )


@dataclass(frozen=True)
class T5Params:
    """Sizes of a T5 v1.1 encoder; the defaults are those of T5-XXL."""

    vocab_size: int = 32128
    hidden_size: int = 4096
    num_layers: int = 24
    num_heads: int = 64
    head_dim: int = 64
    mlp_hidden: int = 10240
    num_buckets: int = 32
    max_distance: int = 128

    @classmethod
    def from_shapes(cls, shapes: Shapes, hints: Hints | None = None) -> T5Params:
        """Read the sizes from tensor shapes; ``hints`` may hold ``max_distance``."""
        vocab, hidden = _shape(shapes, "shared.weight")
        first = "encoder.block.0.layer.0.SelfAttention."
        buckets, heads = _shape(shapes, first + "relative_attention_bias.weight")
        return cls(
            vocab_size=vocab,
            hidden_size=hidden,
            num_layers=count_blocks(shapes, "encoder.block"),
            num_heads=heads,
            head_dim=_shape(shapes, first + "q.weight")[0] // heads,
            mlp_hidden=_shape(shapes, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight")[0],
            num_buckets=buckets,
            max_distance=int((hints or {}).get("max_distance", 128)),
        )


@dataclass(frozen=True)
class CLIPParams:
    """Sizes of a CLIP text model; the defaults are those of CLIP-L."""

    vocab_size: int = 49408
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_hidden: int = 3072
    max_positions: int = 77

    @classmethod
    def from_shapes(cls, shapes: Shapes, hints: Hints | None = None) -> CLIPParams:
        """Read the sizes from tensor shapes.

        Args:
            hints: may hold ``num_attention_heads``; otherwise a head is 64 wide.
        """
        vocab, hidden = _shape(shapes, "text_model.embeddings.token_embedding.weight")
        heads = int((hints or {}).get("num_attention_heads", max(hidden // 64, 1)))
        if hidden % heads:
            raise UnsupportedCheckpointError(
                f"{heads} CLIP heads do not divide the width {hidden}; correct num_attention_heads"
            )
        return cls(
            vocab_size=vocab,
            hidden_size=hidden,
            num_layers=count_blocks(shapes, "text_model.encoder.layers"),
            num_heads=heads,
            mlp_hidden=_shape(shapes, "text_model.encoder.layers.0.mlp.fc1.weight")[0],
            max_positions=_shape(shapes, "text_model.embeddings.position_embedding.weight")[0],
        )


@dataclass(frozen=True)
class AutoencoderParams:
    """Sizes of the autoencoder; the defaults are those of the published ``ae``.

    ``widths`` holds the channels at each resolution, finest first. ``scale`` and ``shift`` map a latent of the
    autoencoder to the one that the transformer sees: (z - shift) * scale.
    """

    widths: tuple[int, ...] = (128, 256, 512, 512)
    num_res_blocks: int = 2
    z_channels: int = 16
    scale: float = 0.3611
    shift: float = 0.1159

    @property
    def factor(self) -> int:
        """Pixels per latent cell along one side."""
        return 2 ** (len(self.widths) - 1)

    @classmethod
    def from_shapes(cls, shapes: Shapes, hints: Hints | None = None) -> AutoencoderParams:
        """Read the sizes from tensor shapes; ``hints`` may hold ``scale`` and ``shift``."""
        hints = hints or {}
        levels = count_blocks(shapes, "encoder.down")
        if not levels or not count_blocks(shapes, "encoder.down.0.block"):
            raise UnsupportedCheckpointError("its autoencoder has no levels; use the complete file (ae.safetensors)")
        widths = tuple(_shape(shapes, f"encoder.down.{i}.block.0.conv2.weight")[0] for i in range(levels))
        return cls(
            widths=widths,
            num_res_blocks=count_blocks(shapes, "encoder.down.0.block"),
            z_channels=_shape(shapes, "decoder.conv_in.weight")[1],
            scale=float(hints.get("scale", 0.3611)),
            shift=float(hints.get("shift", 0.1159)),
        )


PARAMS: dict[str, Any] = {
    "transformer": FluxParams,
    "t5": T5Params,
    "clip": CLIPParams,
    "autoencoder": AutoencoderParams,
}
"""Role of a network -> what reads its sizes."""
