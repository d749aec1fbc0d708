"""``alwayson_scripts``: the detailer in the form of ADetailer's API; other scripts do not exist here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ....errors import RequestError, closest
from ....extensions.detailer_args import NONE, NONE_RUNS, read_passes

ADETAILER = "ADetailer"
SCRIPTS = (ADETAILER.lower(),)
"""Names as ``GET /scripts`` lists them."""

_ALIASES = {"ad_mask_k_largest": "ad_mask_k"}  # of versions that clients still speak


def detailer_fields(scripts: Mapping[str, Any], warnings: list[str], *, img2img: bool) -> dict[str, Any]:
    """The fields of ``GenerationRequest`` for the scripts of a request, whose names may be in any case.

    Raises:
        RequestError: a script does not exist here, or its arguments are wrong; names both.
    """
    fields: dict[str, Any] = {}
    for name, given in scripts.items():
        if name.strip().lower() != ADETAILER.lower():
            raise RequestError(
                f"alwayson_scripts: always on script {name!r:.80} not found; there is {ADETAILER}",
                field=f"alwayson_scripts.{name[:80]}",
            )
        fields = _passes(_arguments(given, warnings), warnings, img2img, _place(name, given))
    return fields


def _arguments(given: Any, warnings: list[str]) -> Sequence[Any]:
    if isinstance(given, Mapping):
        _check_keys(given, warnings)
    args = given.get("args", []) if isinstance(given, Mapping) else given
    if not isinstance(args, Sequence) or isinstance(args, str):
        field = f"alwayson_scripts.{ADETAILER}.args"
        raise RequestError(f"{field}: give a list of two booleans at most, then objects of ad_… arguments", field=field)
    return [_renamed(each) if isinstance(each, Mapping) else each for each in args]


def _check_keys(given: Mapping[str, Any], warnings: list[str]) -> None:
    """A slip in ``args`` would leave the picture undetailed; keys beside them do nothing."""
    unknown = [str(name) for name in given if name != "args"]
    if unknown and "args" not in given:
        field = f"alwayson_scripts.{ADETAILER}"
        hint = "did you mean 'args'?" if closest(unknown[0], ["args"]) else "its arguments are a list, 'args'"
        raise RequestError(f"{field}: there is no {unknown[0]!r:.80}; {hint}", field=field)
    if unknown:
        warnings.append(f"alwayson_scripts.{ADETAILER}: {', '.join(unknown)[:400]} had no effect: args holds arguments")


def _renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a pass by the names of today. One without a detector is skipped, as there."""
    renamed = {_ALIASES.get(name, name) if _ALIASES.get(name) not in values else name: values[name] for name in values}
    return {"ad_model": NONE, **renamed}


def places_of(scripts: Mapping[str, Any]) -> dict[str, str]:
    """Where the caller has each pass, by its place among our fields."""
    places: dict[str, str] = {}
    for name, given in scripts.items():
        args = given.get("args") if isinstance(given, Mapping) else given
        if isinstance(args, list):
            objects = (place for place, each in enumerate(args) if isinstance(each, Mapping))
            places = {f"adetailer_passes[{n}]": f"{_place(name, given)}[{place}]" for n, place in enumerate(objects)}
    return places


def _place(name: str, given: Any) -> str:
    return f"alwayson_scripts.{name:.80}" + (".args" if isinstance(given, Mapping) else "")


def _passes(args: Sequence[Any], warnings: list[str], img2img: bool, place: str) -> dict[str, Any]:
    passes = read_passes(args, field=place)
    if passes.skip_img2img and not img2img:
        warnings.append("ADetailer: skip_img2img has no effect on txt2img")
    if not passes.active:
        warnings += _idle(args, place)
        return {}
    objects = tuple(each for each in args if isinstance(each, Mapping))
    return {"adetailer_passes": objects, "skip_img2img": passes.skip_img2img and img2img}


def _idle(args: Sequence[Any], place: str) -> list[str]:
    """What is told where no pass runs: nothing, if the first boolean says so and there is none that would."""
    if not args or args[0] is not False:
        return [f"ADetailer: {NONE_RUNS}"]
    objects = (each for each in args if isinstance(each, Mapping))
    given = sum(1 for each in objects if each["ad_model"] != NONE and each.get("ad_tab_enable", True))
    lost = "the pass that is given" if given == 1 else f"the {given} passes that are given"
    told = f"{place}[0]: it is false, which switches ADetailer off, so that {lost} did not run; give true for that"
    return [told] if given else []
