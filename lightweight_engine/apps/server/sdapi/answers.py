"""What became of a request, as Forge's API tells it: pictures in base64, the request as it was read, and ``info``."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from .... import __version__
from ....core.infotext_parse import parse_infotext
from ..jobs import Job
from ..schemas import as_base64
from .models import ImageToImageRequest
from .translate import Body, Translation, retold

# Keys of the text that ``info`` tells in fields of its own; all others are its extra_generation_params.
_OWN_KEYS = frozenset(
    (
        *("Prompt", "Negative prompt", "Steps", "Sampler", "Schedule type", "CFG scale", "Seed", "Size-1", "Size-2"),
        *("Model", "Model hash", "Variation seed", "Variation seed strength", "Seed resize from-1", "Clip skip"),
        *("Seed resize from-2", "Denoising strength", "Version"),
    )
)
_SHORT_HASH = 10


def generation_answer(body: Body, translation: Translation, job: Job) -> dict[str, Any]:
    """The answer to a body of txt2img or img2img whose job is done.

    ``warnings`` and the names of ``saved`` pictures are additions of ours, which clients leave unread.
    """
    outcome = job.result()
    images = [as_base64(image) for image in outcome.images] if body.send_images else []
    info = info_of(body, translation, outcome.told, job.started)
    warnings = list(dict.fromkeys([*translation.warnings, *retold(outcome.told["warnings"], body)]))
    answer = {"images": images, "parameters": _parameters(body), "info": json.dumps(info), "warnings": warnings}
    return answer | ({"saved": outcome.told["saved"]} if body.save_images else {})


def _parameters(body: Body) -> dict[str, Any]:
    """The request as it was read, without the pictures that it brought unless they are asked for."""
    parameters = body.model_dump(mode="json")
    if isinstance(body, ImageToImageRequest) and not body.include_init_images:
        parameters |= {"init_images": None, "mask": None}
    return parameters


def info_of(body: Body, translation: Translation, told: Mapping[str, Any], started: float | None) -> dict[str, Any]:
    """The keys of Forge's ``info``: lists have an entry for each picture, numbers are of the first."""
    request, count = translation.request, len(told["sizes"])
    seeds, subseeds, texts = told["seeds"], told["subseeds"], told["infotexts"]
    keys = parse_infotext(texts[0], defaults=False) if texts else {}
    size = [int(keys[f"Size-{n}"]) for n in (1, 2)] if "Size-1" in keys else [request.width, request.height]
    model, autoencoder = (_file(told["models"], role) for role in ("transformer", "autoencoder"))
    return {
        "prompt": request.prompt,
        "all_prompts": [request.prompt] * count,
        "negative_prompt": request.negative_prompt,
        "all_negative_prompts": [request.negative_prompt] * count,
        "seed": seeds[0] if seeds else request.seed,
        "all_seeds": seeds,
        "subseed": subseeds[0] if subseeds else request.subseed,
        "all_subseeds": subseeds,
        "subseed_strength": request.subseed_strength,
        "width": size[0],
        "height": size[1],
        "sampler_name": keys.get("Sampler", request.sampler),
        "cfg_scale": request.cfg_scale,
        "steps": request.steps,
        "batch_size": request.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": model.get("name"),
        "sd_model_hash": (model.get("sha256") or "")[:_SHORT_HASH] or None,
        "sd_vae_name": autoencoder.get("name"),
        "sd_vae_hash": (autoencoder.get("sha256") or "")[:_SHORT_HASH] or None,
        "seed_resize_from_w": request.seed_resize_from_w,
        "seed_resize_from_h": request.seed_resize_from_h,
        "denoising_strength": body.denoising_strength,
        "extra_generation_params": {**_extra(keys), **translation.told},
        "index_of_first_image": 0,
        "infotexts": texts,
        "styles": [],
        "job_timestamp": timestamp(started),
        "clip_skip": 1,
        "is_using_inpainting_conditioning": False,
        "version": f"lightweight-engine {__version__}",
    }


def timestamp(moment: float | None) -> str:
    """A moment as Forge writes it, in local time; "0" for none."""
    return "0" if moment is None else time.strftime("%Y%m%d%H%M%S", time.localtime(moment))


def _file(models: Sequence[Mapping[str, Any]], role: str) -> Mapping[str, Any]:
    """The file of a role; what holds several has a row for each."""
    return next((row for row in models if row["role"] == role), {})


def _extra(keys: Mapping[str, Any]) -> dict[str, Any]:
    """All that the text tells beside ``_OWN_KEYS``, sizes in one piece again."""
    extra = {}
    for key, value in keys.items():
        if key in _OWN_KEYS or (key.endswith("-2") and f"{key[:-2]}-1" in keys):
            continue
        pair = keys.get(f"{key[:-2]}-2") if key.endswith("-1") else None
        extra[key if pair is None else key[:-2]] = value if pair is None else f"{value}x{pair}"
    return extra
