"""What is told of a finished picture: its text, and the sidecar from which it can be made again."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..extensions.lora import of_urls
from ..flux.conditioner import resolve_guidance
from ..flux.prompt import parse_networks
from ..labels import SAMPLERS
from ..request import AppliedLora, GenerationRequest, GenerationResult, LoraSpec, ModelFile
from .infotext import GenerationFacts, ImageFacts, infotext, sampler_parameters
from .infotext_parse import has_weights
from .lora_sources import shown_url

if TYPE_CHECKING:
    import torch

    from .processing import Batch, Job

PACKAGES = ("torch", "tokenizers", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Of this engine and of the packages that decide what a picture looks like."""
    return {
        "lightweight-engine": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
    }


def device_name(device: torch.device) -> str:
    """The device as a person knows it: the GPU's name, or the machine's architecture."""
    import torch

    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()})"


def describe(job: Job, batch: Batch, size: tuple[int, int], seed: int, subseed: int, files: Sequence[ModelFile]) -> str:
    """The text of one picture of ``size`` (width, height), as Forge writes it."""
    request = job.request
    weights = has_weights(request.prompt) or has_weights(request.negative_prompt)
    shown = request.emphasis != "Original" and weights
    image = None
    if job.strength is not None:
        image = ImageFacts(denoising_strength=job.strength, noise_multiplier=request.initial_noise_multiplier)
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
        width=size[0],
        height=size[1],
        model_name=model.name,
        model_hash=(model.sha256 or "")[:10] or None,
        subseed=subseed,
        subseed_strength=request.subseed_strength,
        seed_resize_from=(max(request.seed_resize_from_w, 0), max(request.seed_resize_from_h, 0)),
        ensd=request.eta_noise_seed_delta if SAMPLERS[job.sampler].uses_ensd else 0,
        rng=job.noise_source,
        image=image,
        loras={use.name: use.sha256[:10] for use in batch.loras.uses},
        emphasis=request.emphasis if shown else "Original",
        sampler_options=sampler_parameters(request, job.scheduler),
        version=f"lightweight-engine {__version__}",
    )
    return infotext(facts)


def sidecar(result: GenerationResult, index: int) -> dict[str, Any]:
    """Everything needed to make picture ``index`` again, and to know how it came about. Plain JSON data."""
    return {
        "index": index,
        "seed": result.seeds[index],
        "subseed": result.subseeds[index],
        "infotext": result.infotexts[index],
        "request": plain_request(result.request, result.loras),
        "pixels_sha256": pixels_sha256(result.images[index]),
        "models": [file.model_dump() for file in result.models],
        "loras": [row.model_dump(mode="json") for row in result.loras],
        "device": result.device,
        "versions": result.versions,
        "timings": result.timings,
        "peak_memory": result.peak_memory,
        "warnings": list(result.warnings),
    }


def plain_request(request: GenerationRequest, loras: Sequence[AppliedLora] = ()) -> dict[str, Any]:
    """The fields of a request that were set, as JSON data; a start picture by its path, or by its hash.

    LoRAs are told by name, or by their address without what is secret in it, and by the hash of the file that acted.
    """
    fields = request.model_dump(exclude_defaults=True, exclude={"lora_urls", "lora_scales", "loras"})
    if asked := (*of_urls(request), *request.loras):
        fields["loras"] = [_pinned(spec, loras).model_dump(exclude_defaults=True) for spec in asked]
    if request.image is not None:
        path = isinstance(request.image, str) or hasattr(request.image, "__fspath__")
        fields["image"] = str(request.image) if path else f"sha256:{pixels_sha256(request.image)}"
    return fields


def _pinned(spec: LoraSpec, loras: Sequence[AppliedLora]) -> LoraSpec:
    """A LoRA as it may be written down, and so that only the same file will do."""
    given = spec.name if spec.url is None else shown_url(spec.url)
    hashes = {row.sha256 for row in loras if row.given == given}
    sha256 = hashes.pop() if len(hashes) == 1 else spec.sha256
    return spec.model_copy(update={"url": None if spec.url is None else given, "sha256": sha256})


def pixels_sha256(image: Any) -> str:
    """SHA-256 of a picture's RGB bytes."""
    import hashlib

    return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()
