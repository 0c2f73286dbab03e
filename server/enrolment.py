"""Which sites take part: their names and certificates, recorded here and registered with the SuperLink.

A site whose key is renewed has two certificates, and two nodes of one name, until the older key is retired.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import httpx

from common import certificates, keys
from common.certificates import Certificate
from common.errors import ConfigError, UserError
from common.invitation import Invitation
from server import trail
from server.control import Control
from server.denied import denied, deny
from server.home import Home

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")


@dataclass(frozen=True, kw_only=True)
class Enrolled:
    """A certificate that the coordinator has signed for a site; ``path`` is ``NAME.NUMBER.crt``."""

    path: Path
    certificate: Certificate

    @property
    def name(self) -> str:
        return self.path.name.partition(".")[0]

    @property
    def number(self) -> int:
        return _number(self.path)

    @property
    def public_key(self) -> keys.PublicKey:
        return certificates.public_key(self.certificate)

    @property
    def pem(self) -> bytes:
        return keys.public_pem(self.public_key)

    @property
    def fingerprint(self) -> str:
        return keys.fingerprint(self.public_key)


def enrolled(home: Home) -> list[Enrolled]:
    """Returns the certificates that count, by name of the site; of one site the newest last."""
    found = [
        Enrolled(path=path, certificate=certificates.from_pem(path.read_text(encoding="ascii")))
        for path in home.sites.glob("*.crt")
    ]
    return sorted(found, key=lambda one: (one.name, one.number))


def newest(home: Home) -> list[Enrolled]:
    """Returns the newest certificate of each site, by name."""
    return [[*of_one_site][-1] for _, of_one_site in groupby(enrolled(home), key=lambda one: one.name)]


def admit(home: Home, name: str, *, request: str, renewed: bool) -> Enrolled:
    """Signs a site's request, and records the certificate under its name; the same again changes nothing.

    Args:
        renewed: the site has a key already, which this one replaces.

    Raises:
        ConfigError: the name or the request is not usable.
        UserError: the name has another key and this is no renewal, or none and it is one; the key has another
            name or was revoked.
    """
    if not NAME.fullmatch(name):
        raise ConfigError(f"Expected a name of a-z, 0-9 and '-' (40 at most), found {name!r}.")
    key = certificates.read_request(request, name=name)
    known = [site for site in enrolled(home) if site.name == name]
    for site in enrolled(home):
        if site.fingerprint == keys.fingerprint(key):
            if site.name != name:
                raise UserError(f"Expected a new key, found that it is enrolled as {site.name}.")
            return site
    if keys.fingerprint(key) in denied(home.denied):
        raise UserError("Expected a new key, found one that was revoked; let the site make another one.")
    if known and not renewed:
        raise UserError(
            f"Expected a new name, found that {name} is enrolled with another key; if the site has renewed "
            "its key: --renew"
        )
    if renewed and not known:
        raise UserError(f"Expected an enrolled site to renew, found none of the name {name}.")
    return _sign(home, name, key)


def _sign(home: Home, name: str, key: keys.PublicKey) -> Enrolled:
    certificate = certificates.make_site_certificate(
        key,
        name=name,
        authority=certificates.from_pem(home.authority_certificate.read_text(encoding="ascii")),
        authority_key=keys.read_private(home.authority_key),
        days=home.settings.certificate_days,
    )
    number = max((_number(path) for path in home.sites.glob(f"{name}.*")), default=0) + 1
    path = home.sites / f"{name}.{number}.crt"
    with path.open("x", encoding="ascii") as file:
        file.write(certificates.to_pem(certificate))
    trail.record(home, "enrolled", site=name, key=keys.fingerprint(key))
    trail.sign(home)
    return Enrolled(path=path, certificate=certificate)


def _number(path: Path) -> int:
    return int(path.name.split(".")[1])


def invitation(home: Home, site: Enrolled) -> Invitation:
    """Returns what a site needs to find, to trust and to reach this coordinator."""
    return home.invitation.model_copy(update={"site_certificate": certificates.to_pem(site.certificate)})


def revoke(home: Home, name: str) -> list[str]:
    """Lets a site in no more: the gateway refuses its keys from now on; returns their fingerprints.

    Raises:
        UserError: there is no such site.
    """
    sites = [site for site in enrolled(home) if site.name == name]
    if not sites:
        raise UserError(f"Expected an enrolled site, found none of the name {name!r}.")
    _end(home, sites, why="revoked")
    return [site.fingerprint for site in sites]


def _end(home: Home, sites: Sequence[Enrolled], *, why: Literal["revoked", "retired"]) -> None:
    for site in sites:
        deny(home.denied, [site.fingerprint], site=site.name, why=why)  # first: from here on it holds
        site.path.rename(site.path.with_suffix(f".{why}"))
        trail.record(home, why, site=site.name, key=site.fingerprint)
    trail.sign(home)


def settle(home: Home, control: Control) -> list[str]:
    """Makes the SuperLink's nodes what is recorded here; returns what was done, in words."""
    done = [f"registered {name}" for name in register_missing(home, control)]
    done += [f"retired the former key of {name}" for name in retire_replaced(home, control)]
    return done + [f"unregistered {name}" for name in unregister_denied(home, control)]


def register_missing(home: Home, control: Control) -> list[str]:
    """Registers every recorded key that the SuperLink does not know; returns the names of their sites.

    Flower never takes a key twice, so the list of its nodes decides, not a note of ours.
    """
    known = {node.public_key for node in control.nodes()}
    missing = [site for site in enrolled(home) if site.pem not in known]
    for site in missing:
        control.register(site.name, public_key=site.pem)
    return [site.name for site in missing]


def retire_replaced(home: Home, control: Control) -> list[str]:
    """Ends the former keys of each site that is online with its newest one; returns the names of the sites.

    A key that is online is left alone: the site is about to change.
    """
    online = {node.public_key for node in control.nodes() if node.status == "online"}
    retired = []
    for name, of_one_site in groupby(enrolled(home), key=lambda one: one.name):
        *former, last = of_one_site
        ended = [site for site in former if site.pem not in online]
        if ended and last.pem in online:
            _end(home, ended, why="retired")
            retired.append(name)
    return retired


def unregister_denied(home: Home, control: Control) -> list[str]:
    """Unregisters every node whose key is denied; returns the names of their sites."""
    refused = denied(home.denied)
    ended = [
        node
        for node in control.nodes()
        if node.status != "unregistered" and keys.pem_fingerprint(node.public_key) in refused
    ]
    for node in ended:
        control.unregister(node.node_id)
    return [node.name for node in ended]


def settle_now(home: Home) -> bool:
    """Settles if the SuperLink runs; else it happens at the next start. True if it ran."""
    try:
        with home.control() as control:
            settle(home, control)
    except httpx.ConnectError:
        return False
    return True


def is_renewing(home: Home) -> bool:
    """Says whether a site has two keys at the moment."""
    names = [path.name.partition(".")[0] for path in home.sites.glob("*.crt")]
    return len(set(names)) < len(names)
