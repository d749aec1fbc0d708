"""The golden text encoders, in float32, for the checks that encode."""

from __future__ import annotations

from functools import cache

import torch
from goldens import model_config, model_path
from recorded_tokenizers import golden_tokenizers
from safetensors.torch import load_file

from lightweight_engine.flux.clip import CLIPText
from lightweight_engine.flux.params import CLIPParams, T5Params
from lightweight_engine.flux.t5 import T5Encoder
from lightweight_engine.flux.text_encoders import TextEncoders


@cache
def text_encoders() -> TextEncoders:
    """Both encoders as their files store them (fp16), computing in float32."""
    clip_file, t5_file = load_file(model_path("clip_l")), load_file(model_path("t5xxl"))
    with torch.device("meta"):
        clip = CLIPText(CLIPParams.from_shapes(_shapes(clip_file), model_config("clip_l")))
        t5 = T5Encoder(T5Params.from_shapes(_shapes(t5_file)))
    clip.load_state_dict({key: clip_file[key] for key in clip.state_dict()}, assign=True)
    t5.load_state_dict({key: t5_file[key] for key in t5.state_dict()}, assign=True)
    tokenizers = golden_tokenizers()
    return TextEncoders(clip.eval(), tokenizers.clip, t5.eval(), tokenizers.t5)


def _shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}
