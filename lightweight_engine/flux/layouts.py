"""The key names that files have for the four networks, as data: which layout a file is in, and whose key becomes which.

Ours are the published single-file names. A name that no row mentions is ours already, so layouts with our names have
no rows. Prefixes (``model.diffusion_model.``, ``vae.``, ``text_encoders.t5xxl.transformer.`` …) need none either: what
stands before a layout's anchor is the prefix of all its keys.

Source: the published files and the diffusers and transformers packages (names only). Loads no torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

Role = Literal["transformer", "t5", "clip", "autoencoder"]


@dataclass(frozen=True)
class Row:
    """One spelling of a parameter.

    ``{n}`` stands for a number, the same on both sides. A name that ends in a dot stands for a module: its weight and
    its bias.

    Attributes:
        theirs: name in the file, after the prefix.
        ours: name of the parameter.
        at: place of the tensor among those that are joined, one below another, to our parameter.
        third: which third of the tensor's rows becomes our parameter, where that is not all of them.
        swapped: the halves of the rows change places.
        conv: a matrix [c, c] becomes the weight [c, c, 1, 1] of a convolution.
        reversed: the first number counts from the other end.
    """

    theirs: str
    ours: str
    at: int = 0
    third: int | None = None
    swapped: bool = False
    conv: bool = False
    reversed: bool = False


@dataclass(frozen=True)
class Layout:
    """How a part is recognised in this layout, and what becomes of its keys.

    Attributes:
        anchor: a key that every such part has, after the prefix.
        beside: keys, or beginnings of keys, that it has too.
        ignored: keys that the network does not read.
    """

    role: Role
    name: str
    anchor: str
    beside: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()
    ignored: re.Pattern[str] = field(default=re.compile(r"(?!)"))


# Of any part: the marker of scaled fp8 files, and a constant that old text encoders saved.
IGNORED_ANYWHERE = re.compile(r"(^|\.)(scaled_fp8|position_ids)$")

# Keys of whole checkpoints that stand outside the prefixes of their parts.
IGNORED_BETWEEN = re.compile(r"(^|\.)(logit_scale|text_projection|text_projection\.weight|scaled_fp8|position_ids)$")


def _modules(table: str, prefix: str = "", target: str = "") -> tuple[Row, ...]:
    """Rows for modules: a line is ``theirs ours``."""
    pairs = (line.split() for line in table.strip().splitlines())
    return tuple(Row(f"{prefix}{theirs}.", f"{target}{ours}.") for theirs, ours in pairs)


def _joined(theirs: tuple[str, ...], ours: str) -> tuple[Row, ...]:
    return tuple(Row(f"{name}.", f"{ours}.", at=at) for at, name in enumerate(theirs))


def _norms(prefix: str, target: str, *names: str) -> tuple[Row, ...]:
    """Norms of queries and keys, whose weight is our scale."""
    kinds = zip(names, ("query_norm", "key_norm"), strict=True)
    return tuple(Row(f"{prefix}.{name}.weight", f"{target}.{kind}.scale") for name, kind in kinds)


_DOUBLE, _SINGLE = "transformer_blocks.{n}.", "single_transformer_blocks.{n}."

DIFFUSERS_TRANSFORMER = (
    *_modules(
        """
        x_embedder                                  img_in
        context_embedder                            txt_in
        time_text_embed.timestep_embedder.linear_1  time_in.in_layer
        time_text_embed.timestep_embedder.linear_2  time_in.out_layer
        time_text_embed.text_embedder.linear_1      vector_in.in_layer
        time_text_embed.text_embedder.linear_2      vector_in.out_layer
        time_text_embed.guidance_embedder.linear_1  guidance_in.in_layer
        time_text_embed.guidance_embedder.linear_2  guidance_in.out_layer
        proj_out                                    final_layer.linear
        """
    ),
    *_modules(
        """
        attn.to_out.0          img_attn.proj
        attn.to_add_out        txt_attn.proj
        ff.net.0.proj          img_mlp.0
        ff.net.2               img_mlp.2
        ff_context.net.0.proj  txt_mlp.0
        ff_context.net.2       txt_mlp.2
        norm1.linear           img_mod.lin
        norm1_context.linear   txt_mod.lin
        """,
        _DOUBLE,
        "double_blocks.{n}.",
    ),
    *_joined(tuple(f"{_DOUBLE}attn.to_{x}" for x in "qkv"), "double_blocks.{n}.img_attn.qkv"),
    *_joined(tuple(f"{_DOUBLE}attn.add_{x}_proj" for x in "qkv"), "double_blocks.{n}.txt_attn.qkv"),
    *_norms(f"{_DOUBLE}attn", "double_blocks.{n}.img_attn.norm", "norm_q", "norm_k"),
    *_norms(f"{_DOUBLE}attn", "double_blocks.{n}.txt_attn.norm", "norm_added_q", "norm_added_k"),
    *_joined(
        (*(f"{_SINGLE}attn.to_{x}" for x in "qkv"), f"{_SINGLE}proj_mlp"),
        "single_blocks.{n}.linear1",
    ),
    *_modules("proj_out linear2 \n norm.linear modulation.lin", _SINGLE, "single_blocks.{n}."),
    *_norms(f"{_SINGLE}attn", "single_blocks.{n}.norm", "norm_q", "norm_k"),
    # diffusers has scale before shift, ours is shift before scale
    Row("norm_out.linear.", "final_layer.adaLN_modulation.1.", swapped=True),
)

GGUF_T5 = (
    *_modules(
        """
        attn_q       SelfAttention.q
        attn_k       SelfAttention.k
        attn_v       SelfAttention.v
        attn_o       SelfAttention.o
        attn_rel_b   SelfAttention.relative_attention_bias
        attn_norm    layer_norm
        """,
        "enc.blk.{n}.",
        "encoder.block.{n}.layer.0.",
    ),
    *_modules(
        """
        ffn_gate     DenseReluDense.wi_0
        ffn_up       DenseReluDense.wi_1
        ffn_down     DenseReluDense.wo
        ffn_norm     layer_norm
        """,
        "enc.blk.{n}.",
        "encoder.block.{n}.layer.1.",
    ),
    *_modules("enc.output_norm encoder.final_layer_norm \n token_embd shared"),
)

_CLIP_LAYER = "text_model.encoder.layers.{n}."

OPENAI_CLIP = (
    *_modules(
        """
        ln_1           layer_norm1
        ln_2           layer_norm2
        mlp.c_fc       mlp.fc1
        mlp.c_proj     mlp.fc2
        attn.out_proj  self_attn.out_proj
        """,
        "transformer.resblocks.{n}.",
        _CLIP_LAYER,
    ),
    *(
        Row(f"transformer.resblocks.{{n}}.attn.in_proj_{leaf}", f"{_CLIP_LAYER}self_attn.{x}_proj.{leaf}", third=third)
        for leaf in ("weight", "bias")
        for third, x in enumerate("qkv")
    ),
    *_modules("token_embedding text_model.embeddings.token_embedding \n ln_final text_model.final_layer_norm"),
    Row("positional_embedding", "text_model.embeddings.position_embedding.weight"),
)

# transformers 5 saves a text model without its wrapper's name.
BARE_CLIP = (
    *_modules(
        """
        layer_norm1         layer_norm1
        layer_norm2         layer_norm2
        mlp.fc1             mlp.fc1
        mlp.fc2             mlp.fc2
        self_attn.q_proj    self_attn.q_proj
        self_attn.k_proj    self_attn.k_proj
        self_attn.v_proj    self_attn.v_proj
        self_attn.out_proj  self_attn.out_proj
        """,
        "encoder.layers.{n}.",
        _CLIP_LAYER,
    ),
    *_modules(
        """
        embeddings.token_embedding     text_model.embeddings.token_embedding
        embeddings.position_embedding  text_model.embeddings.position_embedding
        final_layer_norm               text_model.final_layer_norm
        """
    ),
)


def _vae_rows() -> tuple[Row, ...]:
    rows: list[Row] = []
    resnet = [(f"{name}.", f"{name}.") for name in ("norm1", "conv1", "norm2", "conv2")]
    resnet.append(("conv_shortcut.", "nin_shortcut."))
    # Attention in today's names, and in those of older files.
    attention = [("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")]
    attention += [("query", "q"), ("key", "k"), ("value", "v"), ("proj_attn", "proj_out")]
    for side in ("encoder", "decoder"):
        for at in (0, 1):
            theirs, ours = f"{side}.mid_block.resnets.{at}.", f"{side}.mid.block_{at + 1}."
            rows += [Row(theirs + a, ours + b) for a, b in resnet]
        theirs, ours = f"{side}.mid_block.attentions.0.", f"{side}.mid.attn_1."
        rows += [Row(f"{theirs}{a}.", f"{ours}{b}.", conv=b != "norm") for a, b in attention]
        rows.append(Row(f"{side}.conv_norm_out.", f"{side}.norm_out."))
    # Ours are numbered from the finest level, theirs in the order in which they run.
    for down in (True, False):
        theirs, ours = ("encoder.down_blocks.{n}.", "encoder.down.{n}.") if down else (
            "decoder.up_blocks.{n}.", "decoder.up.{n}.")  # fmt: skip
        rows += [
            Row(f"{theirs}resnets.{{n}}.{a}", f"{ours}block.{{n}}.{b}", reversed=not down) for a, b in resnet
        ]  # fmt: skip
        change = ("downsamplers.0.conv.", "downsample.conv.") if down else ("upsamplers.0.conv.", "upsample.conv.")
        rows.append(Row(theirs + change[0], ours + change[1], reversed=not down))
    return tuple(rows)


DIFFUSERS_VAE = _vae_rows()

_T5_IGNORED = re.compile(r"^(decoder\.|dec\.|lm_head\.|output\.weight$|logit_scale$|spiece_model$)")
_CLIP_IGNORED = re.compile(
    r"^(text_projection|visual_projection|vision_model\.|visual\.|attn_mask$)|(^|\.)(logit_scale|logit_bias)$"
)
_VAE_IGNORED = re.compile(r"^loss\.")

# In the order of detection: where two layouts of a role fit, the first counts.
LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "transformer",
        "diffusers",
        "transformer_blocks.0.attn.norm_added_k.weight",
        ("x_embedder.weight", "single_transformer_blocks."),
        DIFFUSERS_TRANSFORMER,
    ),
    Layout("transformer", "bfl", "double_blocks.0.img_attn.norm.key_norm.scale"),
    Layout(
        "t5",
        "transformers",
        "encoder.block.0.layer.0.SelfAttention.k.weight",
        rows=(Row("encoder.embed_tokens.weight", "shared.weight"),),
        ignored=_T5_IGNORED,
    ),
    Layout("t5", "gguf", "enc.blk.0.attn_k.weight", rows=GGUF_T5, ignored=_T5_IGNORED),
    Layout(
        "clip",
        "transformers",
        "text_model.encoder.layers.0.layer_norm1.bias",
        ("text_model.embeddings.",),
        ignored=_CLIP_IGNORED,
    ),
    Layout(
        "clip",
        "openai",
        "transformer.resblocks.0.ln_1.bias",
        ("token_embedding.weight",),
        OPENAI_CLIP,
        _CLIP_IGNORED,
    ),
    Layout(
        "clip",
        "transformers 5",
        "encoder.layers.0.layer_norm1.bias",
        ("embeddings.token_embedding.weight",),
        BARE_CLIP,
        _CLIP_IGNORED,
    ),
    Layout(
        "autoencoder",
        "diffusers",
        "decoder.conv_in.weight",
        ("decoder.up_blocks.",),
        DIFFUSERS_VAE,
        _VAE_IGNORED,
    ),
    Layout("autoencoder", "bfl", "decoder.conv_in.weight", ("decoder.up.",), ignored=_VAE_IGNORED),
)
