"""Parameters in the query of an address that the address does not take: refused by our own API, told by Forge's."""

from __future__ import annotations

from fastapi import Request

from ...errors import RequestError, closest


async def refuse_unknown(request: Request) -> None:
    """What a route of our own API depends on: a slip in a name would be without effect, and unnoticed.

    Raises:
        RequestError: names the first parameter, and what is close to it.
    """
    taken = _taken(request)
    for name in _unknown(request):
        meant = closest(name, taken)
        others = f"it takes {', '.join(taken)}" if taken else "it takes none; fields of a request go into its body"
        hint = f"did you mean {meant!r}?" if meant else others
        raise RequestError(f"{name:.80}: this address takes no such parameter in its query; {hint}", field=name[:80])


def without_effect(request: Request) -> list[str]:
    """A sentence for a person about such parameters, where there are any."""
    unknown = _unknown(request)
    return [f"parameters of the query had no effect: {', '.join(unknown)[:400]}"] if unknown else []


def _unknown(request: Request) -> list[str]:
    taken = _taken(request)
    return [name for name in request.query_params if name not in taken]


def _taken(request: Request) -> list[str]:
    return [parameter.alias for parameter in request.scope["route"].dependant.query_params]
