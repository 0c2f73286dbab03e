"""Which sites take part: their names and public keys, recorded here and registered with the SuperLink."""

from __future__ import annotations

import re
from dataclasses import dataclass

import httpx

from common import keys
from common.errors import ConfigError, UserError
from server import trail
from server.control import Control
from server.home import Home

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")


@dataclass(frozen=True, kw_only=True)
class Enrolled:
    """A site that the coordinator has recorded."""

    name: str
    public_key: keys.PublicKey

    @property
    def pem(self) -> bytes:
        return keys.public_pem(self.public_key)


def enrolled(home: Home) -> list[Enrolled]:
    """Returns the recorded sites, by name."""
    return [
        Enrolled(name=path.stem, public_key=keys.parse_public(path.read_text(encoding="ascii")))
        for path in sorted(home.sites.glob("*.pub"))
    ]


def record(home: Home, name: str, *, public_text: str) -> Enrolled:
    """Records a site's public key under its name; the same again changes nothing.

    Raises:
        ConfigError: the name or the key is not usable.
        UserError: the name has another key, or the key another name.
    """
    if not NAME.fullmatch(name):
        raise ConfigError(f"Expected a name of a-z, 0-9 and '-' (40 at most), found {name!r}.")
    site = Enrolled(name=name, public_key=keys.parse_public(public_text))
    for known in enrolled(home):
        if known.name == name and known.pem == site.pem:
            return known
        if known.name == name:
            raise UserError(f"Expected a new name, found that {name} is enrolled with another key.")
        if known.pem == site.pem:
            raise UserError(f"Expected a new key, found that it is enrolled as {known.name}.")
    with (home.sites / f"{name}.pub").open("x", encoding="ascii") as file:
        file.write(keys.public_text(site.public_key))
    trail.record(home, "enrolled", site=name, key=keys.fingerprint(site.public_key))
    trail.sign(home)
    return site


def register_missing(home: Home, control: Control) -> list[str]:
    """Registers every recorded site that the SuperLink does not know; returns their names.

    Flower never takes a key twice, so the list of its nodes decides, not a note of ours.
    """
    known = {node.public_key for node in control.nodes()}
    missing = [site for site in enrolled(home) if site.pem not in known]
    for site in missing:
        control.register(site.name, public_key=site.pem)
    return [site.name for site in missing]


def register_now(home: Home) -> bool:
    """Registers what is missing if the SuperLink runs; else it happens at the next start. True if it ran."""
    try:
        with home.control() as control:
            register_missing(home, control)
    except httpx.ConnectError:
        return False
    return True
