"""What is told of a finished picture: its text, and the sidecar from which it can be made again."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..backend.checkpoint import file_sha256
from ..extensions.lora import of_urls
from ..flux.conditioner import resolve_guidance
from ..flux.prompt import parse_networks
from ..labels import SAMPLERS
from ..lora_spec import LoraSpec
from ..request import GenerationRequest
from ..results import AppliedLora, GenerationResult, ModelFile
from .infotext import GenerationFacts, HiresFacts, ImageFacts, infotext, sampler_parameters
from .infotext_parse import has_weights
from .lora_sources import shown_url
from .pictures import is_path, is_url, pictures_in

if TYPE_CHECKING:
    import torch

    from .processing import Batch, Hires, Job

PACKAGES = ("torch", "tokenizers", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Of this engine and of the packages that decide what a picture looks like."""
    return {"lightweight-engine": __version__, "python": platform.python_version(), **_packages()}


@cache
def _packages() -> dict[str, str]:
    """Versions of the packages; reading what tells them takes milliseconds."""
    return {name: metadata.version(name) for name in PACKAGES}


def device_name(device: torch.device) -> str:
    """The device as a person knows it: the GPU's name, or the machine's architecture."""
    import torch

    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()})"


def describe(job: Job, batch: Batch, seed: int, subseed: int, files: Sequence[ModelFile]) -> str:
    """The text of one picture, as Forge writes it."""
    request = job.request
    weights = has_weights(request.prompt) or has_weights(request.negative_prompt)
    shown = request.emphasis != "Original" and weights
    # The reference names sampler and scheduler as asked, and the prompt without its tags. Ours names what ran, and
    # keeps the tags, so that the text alone can make the picture again.
    asked = request.compat == "forge"
    model = next(file for file in files if file.role == "transformer")
    facts = GenerationFacts(
        prompt=parse_networks(request.prompt)[0] if asked else request.prompt,
        negative_prompt=request.negative_prompt,
        steps=request.steps,
        sampler=request.sampler if asked else job.sampler,
        scheduler=request.scheduler if asked else job.scheduler,
        cfg_scale=request.cfg_scale,
        distilled_cfg_scale=resolve_guidance(
            request.distilled_cfg_scale, job.networks.params.guidance_embed, request.compat
        ),
        seed=seed,
        width=job.size[1],
        height=job.size[0],
        model_name=model.name,
        model_hash=(model.sha256 or "")[:10] or None,
        subseed=subseed,
        subseed_strength=request.subseed_strength,
        seed_resize_from=(max(request.seed_resize_from_w, 0), max(request.seed_resize_from_h, 0)),
        ensd=request.eta_noise_seed_delta if SAMPLERS[job.sampler].uses_ensd else 0,
        rng=job.noise_source,
        extra=_detailer_facts(job),
        hires=_hires_facts(job.hires) if job.hires else None,
        image=_image_facts(job, batch.seeds.index(seed) + batch.first) if job.begin else None,
        loras={use.name: use.sha256[:10] for use in batch.loras.uses},
        emphasis=request.emphasis if shown else "Original",
        sampler_options=sampler_parameters(request, job.scheduler),
        version=f"lightweight-engine {__version__}",
    )
    return infotext(facts)


def _detailer_facts(job: Job) -> dict[str, Any]:
    """What the detailer adds, imported by jobs that have one."""
    if job.detailing is None:
        return {}
    from ..extensions.detailer_infotext import detailer_infotext

    return detailer_infotext(job.detailing.passes)


def _hires_facts(hires: Hires) -> HiresFacts:
    """How the second pass ran; sampler and scheduler are told where they are not those of the first."""
    asked, ran = hires.job.request, hires.job
    forge = asked.compat == "forge"
    return HiresFacts(
        denoising_strength=asked.denoising_strength or 0.0,
        scale=asked.hr_scale,
        resize=(asked.hr_resize_x, asked.hr_resize_y),
        steps=asked.hr_steps,
        upscaler=asked.hr_upscaler,
        cfg_scale=asked.cfg_scale,
        distilled_cfg_scale=resolve_guidance(
            asked.distilled_cfg_scale, ran.networks.params.guidance_embed, asked.compat
        ),
        sampler=asked.sampler if forge else ran.sampler,
        scheduler=asked.scheduler if forge else ran.scheduler,
        prompt=parse_networks(asked.prompt)[0] if forge else asked.prompt,
        negative_prompt=asked.negative_prompt,
    )


def _image_facts(job: Job, index: int) -> ImageFacts:
    """How image-to-image ran for output ``index``."""
    assert job.begin is not None and job.strength is not None
    prepared, masking = job.begin.of(index), job.begin.masking
    return ImageFacts(
        denoising_strength=job.strength,
        masked=prepared.mask is not None,
        mask_inverted=masking.invert,
        mask_blur=masking.blur[0],
        only_masked=prepared.paste_to is not None,
        masked_padding=masking.padding,
        masked_content=masking.content,
        noise_multiplier=job.request.initial_noise_multiplier,
    )


def sidecar(result: GenerationResult, index: int) -> dict[str, Any]:
    """Everything needed to make picture ``index`` again, and to know how it came about. Plain JSON data."""
    return {
        "index": index,
        "seed": result.seeds[index],
        "subseed": result.subseeds[index],
        "infotext": result.infotexts[index],
        "request": plain_request(result.request, result.loras),
        "pictures": picture_hashes(result.request),
        "pixels_sha256": pixels_sha256(result.images[index]),
        "models": [{**file.model_dump(), "path": os.path.abspath(file.path)} for file in result.models],
        "loras": [row.model_dump(mode="json") for row in result.loras],
        "detailer": result.details[index].model_dump(mode="json") if result.details else None,
        "device": result.device,
        "versions": result.versions,
        "settings": result.settings,
        "timings": result.timings,
        "peak_memory": result.peak_memory,
        "interrupted": result.interrupted,
        "warnings": list(result.warnings),
    }


def plain_request(request: GenerationRequest, loras: Sequence[AppliedLora] = ()) -> dict[str, Any]:
    """The fields of a request that were set, as JSON data; a start picture by its whole path, or by its hash.

    LoRAs are told by name, or by their address without what is secret in it, and by the hash of the file that acted.
    """
    fields = request.model_dump(exclude_defaults=True, exclude={"lora_urls", "lora_scales", "loras"})
    if asked := (*of_urls(request), *request.loras):
        fields["loras"] = [_pinned(spec, loras).model_dump(exclude_defaults=True) for spec in asked]
    for name in ("image", "mask"):
        given = getattr(request, name)
        if given is not None:
            several = isinstance(given, (list, tuple))
            fields[name] = [_plain_picture(each) for each in given] if several else _plain_picture(given)
    return fields


def picture_hashes(request: GenerationRequest) -> dict[str, list[str | None]]:
    """SHA-256 of the files that a request starts from, by its field; None for what is no path, or not there."""
    found = {}
    for name in ("image", "mask"):
        hashes = [_file_hash(each) for each in pictures_in(getattr(request, name))]
        if any(hashes):
            found[name] = hashes
    return found


def _file_hash(given: Any) -> str | None:
    if not isinstance(given, (str, os.PathLike)) or not is_path(given) or not os.path.isfile(given):
        return None
    try:
        return file_sha256(Path(given))
    except OSError:  # it may be gone by now: the picture is saved all the same
        return None


def _plain_picture(given: Any) -> str:
    """A picture of a request as it may be written down: its path from anywhere, its address without secrets, else its
    hash."""
    if isinstance(given, str) and is_url(given):
        return shown_url(given)
    if isinstance(given, os.PathLike) or (isinstance(given, str) and is_path(given)):
        return os.path.abspath(given)
    if isinstance(given, (str, bytes, bytearray, memoryview)):
        data = given.encode() if isinstance(given, str) else bytes(given)
        return f"sha256:{hashlib.sha256(data).hexdigest()}"
    return f"sha256:{pixels_sha256(given)}"


def _pinned(spec: LoraSpec, loras: Sequence[AppliedLora]) -> LoraSpec:
    """A LoRA as it may be written down, and so that only the same file will do."""
    given = spec.name if spec.url is None else shown_url(spec.url)
    hashes = {row.sha256 for row in loras if row.given == given}
    sha256 = hashes.pop() if len(hashes) == 1 else spec.sha256
    return spec.model_copy(update={"url": None if spec.url is None else given, "sha256": sha256})


def pixels_sha256(image: Any) -> str:
    """SHA-256 of a picture's RGB bytes."""
    picture = image if image.mode == "RGB" else image.convert("RGB")  # Pillow would copy it
    return hashlib.sha256(picture.tobytes()).hexdigest()
