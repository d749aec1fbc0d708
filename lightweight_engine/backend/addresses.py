"""Which IP addresses are of the public internet, also by what they embed: whoever lets others choose an address to
connect to must not be led into its own network. Loads no torch.

Python's ``is_global`` alone is not enough: it holds for translated forms of private addresses.
Source: the IANA registries of special-purpose addresses; RFC 6052, 3056, 4380, 5214.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

# Public by their registry, or by that of older Pythons, and still of no public server.
_NOT_PUBLIC = tuple(
    ipaddress.ip_network(block)
    for block in (
        "168.63.129.16/32",  # Azure's virtual host, which hands out secrets of the machine
        "192.0.0.0/24",
        "192.88.99.0/24",  # 6to4 relays
        "2001:db8::/32",
        "3fff::/20",
    )
)
_UNICAST = ipaddress.ip_network("2000::/3")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_ISATAP = (0x00005EFE, 0x02005EFE)  # upper half of the interface identifier


def is_public(address: str) -> bool:
    """Whether an IP address, and every one that is embedded in it, is one of the public internet."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv4Address):
        return _is_global(found)
    if not all(_is_global(inner) for inner in _embedded(found)):
        return False
    return found in _NAT64 or found.ipv4_mapped is not None or (found in _UNICAST and _is_global(found))


def _is_global(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    special = any(address in block for block in _NOT_PUBLIC)
    return address.is_global and not (address.is_multicast or address.is_reserved or special)


def _embedded(address: ipaddress.IPv6Address) -> Iterator[ipaddress.IPv4Address]:
    """The IPv4 addresses that traffic to an IPv6 address may be translated or tunnelled to."""
    lower = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if address.ipv4_mapped is not None:
        yield address.ipv4_mapped
    if address.sixtofour is not None:
        yield address.sixtofour
    yield from address.teredo or ()
    if address in _NAT64 or (int(address) >> 32) & 0xFFFFFFFF in _ISATAP:
        yield lower
