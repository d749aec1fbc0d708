"""The detailer: what a detector finds on a picture is painted anew, one mask after another, by image-to-image.

The order of things is the reference's: each pass detects on the picture that the last one left; what is found is
filtered by its share of the picture, cut to the top k, sorted; masks are moved, grown or shrunk, and merged; each is
painted on the picture that the mask before it left, with a seed and a prompt of its own. Painting comes in as a
function. Source: pipelines.md §d.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Literal, Protocol

from PIL import Image

from ..labels import Compat
from ..upscalers.picture import Picture
from .detailer_args import ADetailerArgs, Passes, check_supported, of_pass
from .detailer_masks import Order, Size, dynamic_strength, matching_sdxl_size, matching_size, meet
from .detailer_prompts import is_skipped, prompts_of
from .detailer_targets import Target, targets_of
from .detection import Detection, Detector

log = logging.getLogger(__name__)

FORGE_DISTILLED_CFG = 3.5  # which the reference takes whatever the job has

MatchSize = Literal["Off", "Strict (SDXL only)", "Free"]


class Detectors(Protocol):
    """Where detectors come from; ``DetectorLibrary`` is one."""

    def find(self, name: str) -> Detector: ...


@dataclass(frozen=True)
class DetailerOptions:
    """What the reference has as settings of the whole program.

    Attributes:
        order: in which masks are painted; "None" is surest first.
        dynamic_denoise_power: above 0, large boxes are changed less.
        match_size: whether a box is drawn at a size of its own aspect. "Strict (SDXL only)" takes the sizes of SDXL,
            and with "forge" nothing, as the model is another.
        same_seed: every mask has the seed of the picture.
    """

    order: Order = "None"
    dynamic_denoise_power: float = 0.0
    match_size: MatchSize = "Off"
    same_seed: bool = False
    compat: Compat = "fixed"


@dataclass(frozen=True)
class Outer:
    """The job whose picture is detailed, and which picture of it that is.

    Attributes:
        prompts, negative_prompts, seeds, subseeds: of all pictures of the job.
        index: of the picture among them.
        size: that of the first pass, also where a hires pass followed.
        mask: of an inpainting job that painted the whole picture: only what meets it is detailed.
    """

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    subseeds: tuple[int, ...]
    size: Size
    steps: int
    cfg_scale: float
    distilled_cfg_scale: float
    sampler: str
    scheduler: str
    index: int = 0
    mask: Image.Image | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Repaint:
    """A mask to paint: inpainting that starts from the picture itself, one picture, not saved.

    What is not here is that of the outer job. ``None`` is so too.

    Attributes:
        size: that the masked part, or the whole picture, is drawn at.
    """

    picture: Picture = field(repr=False)
    mask: Image.Image = field(repr=False)
    prompt: str
    negative_prompt: str
    seed: int
    subseed: int
    denoising_strength: float
    size: Size
    steps: int
    cfg_scale: float
    distilled_cfg_scale: float
    sampler: str
    scheduler: str
    mask_blur: int
    only_masked: bool
    padding: int
    noise_multiplier: float | None = None

    @property
    def image(self) -> Image.Image:
        return self.picture.image


# The picture with a mask painted anew; None where painting was interrupted.
Painter = Callable[[Repaint], Picture | Image.Image | None]


@dataclass(frozen=True, eq=False)
class PassReport:
    """What came of a pass: what was found at all, what was left to paint, how many masks were painted, the picture."""

    args: ADetailerArgs
    picture: Picture = field(repr=False)
    found: tuple[Detection, ...] = ()
    targets: tuple[Target, ...] = ()
    painted: int = 0

    @property
    def image(self) -> Image.Image:
        return self.picture.image


class ADetailer:
    """Details pictures with detectors that are loaded once."""

    def __init__(self, detectors: Detectors, options: DetailerOptions | None = None) -> None:
        self.detectors = detectors
        self.options = options or DetailerOptions()

    def check(self, passes: Passes) -> None:
        """Whether all passes can run: their detectors are there and know the classes, and nothing is asked in vain.

        Raises:
            RequestError: an unknown detector or class, or a feature that this engine does not have.
            ModelError, MissingDependencyError: a detector's file cannot be used.
        """
        check_supported(passes)
        for place, args in passes.placed:
            with of_pass(place):
                detector = self.detectors.find(args.ad_model)
                detector.check_classes(wanted_classes(args, self.options.compat))

    def detail(self, given: Picture | Image.Image, passes: Passes, outer: Outer, paint: Painter) -> Detailed:
        """Run all passes on a picture.

        Raises:
            RequestError, ModelError, MissingDependencyError: see ``check``, which tells before anything is painted.
        """
        picture, reports = Picture.of(given), []
        for args in passes.active:
            picture, report = self._run(picture, args, outer, paint)
            reports.append(report)
        return Detailed(picture, tuple(reports))

    def find_targets(
        self, given: Picture | Image.Image, args: ADetailerArgs, mask: Image.Image | None = None
    ) -> tuple[list[Detection], list[Target]]:
        """What a pass finds on a picture, and what of it is painted, in order."""
        detector = self.detectors.find(args.ad_model)
        classes = wanted_classes(args, self.options.compat)
        picture = Picture.of(given)
        found = detector.detect(picture, args.ad_confidence, classes)
        targets = targets_of(found, args, picture.size, self.options.order, self.options.compat)
        return found, [target for target in targets if mask is None or meet(target.mask, mask)]

    def _run(self, picture: Picture, args: ADetailerArgs, outer: Outer, paint: Painter) -> tuple[Picture, PassReport]:
        """One pass. Interrupted, it leaves the picture as it was."""
        found, targets = self.find_targets(picture, args, outer.mask)
        if not targets:
            log.info("%s: nothing to detail among %d detections", args.ad_model, len(found))
        prompts = prompts_of(args.ad_prompt, outer.prompts, outer.index, "")
        negatives = prompts_of(args.ad_negative_prompt, outer.negative_prompts, outer.index, "")
        current, painted = picture, 0
        for number, target in enumerate(targets):
            prompt = prompts[min(number, len(prompts) - 1)]
            if is_skipped(prompt):
                continue
            negative = negatives[min(number, len(negatives) - 1)]
            job = self._job(current, target, args, outer, prompt, negative, number)
            result = paint(job)
            if result is None:
                return picture, PassReport(args, picture, tuple(found), tuple(targets))
            current, painted = Picture.of(result), painted + 1
        return current, PassReport(args, current, tuple(found), tuple(targets), painted)

    def _job(
        self,
        picture: Picture,
        target: Target,
        args: ADetailerArgs,
        outer: Outer,
        prompt: str,
        negative_prompt: str,
        number: int,
    ) -> Repaint:
        forge = self.options.compat == "forge"
        further = 0 if self.options.same_seed else number
        return Repaint(
            picture=picture,
            mask=target.mask,
            prompt=prompt,
            negative_prompt=negative_prompt,
            seed=_of(outer.seeds, outer.index) + further,
            subseed=_of(outer.subseeds, outer.index) + further,
            denoising_strength=dynamic_strength(
                self.options.dynamic_denoise_power, args.ad_denoising_strength, target.box, picture.size
            ),
            size=self._size(target, args, outer),
            steps=args.ad_steps if args.ad_use_steps else outer.steps,
            cfg_scale=args.ad_cfg_scale if args.ad_use_cfg_scale else outer.cfg_scale,
            distilled_cfg_scale=FORGE_DISTILLED_CFG if forge else outer.distilled_cfg_scale,
            sampler=args.own_sampler or outer.sampler,
            scheduler=args.own_scheduler or outer.scheduler,
            mask_blur=args.ad_mask_blur,
            only_masked=args.ad_inpaint_only_masked,
            padding=args.ad_inpaint_only_masked_padding,
            noise_multiplier=args.ad_noise_multiplier if args.ad_use_noise_multiplier else None,
        )

    def _size(self, target: Target, args: ADetailerArgs, outer: Outer) -> Size:
        if args.ad_use_inpaint_width_height:
            return args.ad_inpaint_width, args.ad_inpaint_height
        if self.options.match_size == "Free":
            return matching_size(outer.size, target.box)
        if self.options.match_size != "Off" and self.options.compat != "forge":
            return matching_sdxl_size(target.box)
        return outer.size


@dataclass(frozen=True, eq=False)
class Detailed:
    """A picture after all passes, and what came of each."""

    picture: Picture
    reports: tuple[PassReport, ...]

    @property
    def image(self) -> Image.Image:
        return self.picture.image

    @property
    def is_changed(self) -> bool:
        return any(report.painted for report in self.reports)


def wanted_classes(args: ADetailerArgs, compat: Compat) -> tuple[str, ...]:
    """The classes that a pass looks for; none is all. With "forge" only a model called "-world" is asked for some."""
    if compat == "forge" and "-world" not in PurePath(args.ad_model).stem:
        return ()
    return args.classes


def _of(values: Sequence[int], index: int) -> int:
    """That of the picture; where there are fewer, around and around."""
    return values[index % len(values)]
