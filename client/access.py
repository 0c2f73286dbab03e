"""The way from a site to its coordinator: whom to reach, whom to trust, and with which key."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

from client import credential
from client.coordinator import open_coordinator
from client.credential import Credential
from client.fleet import Fleet
from client.proxy import Setting, proxy_to
from client.route import Route

AGAIN_SECONDS: Final = 30.0
"""A renewed key that is not admitted yet is tried again after this."""


class Access:
    """Opens connections with the newest key that has a certificate.

    Args:
        site: the directory of the site.
        proxy: what ``site.yaml`` says about a proxy.

    Raises:
        UserError: the site has no coordinator yet, its certificate has expired, its key is missing or open
            to others, or its proxy cannot be used.
    """

    def __init__(self, site: Path, *, proxy: Setting) -> None:
        self._site = site
        self._coordinator = open_coordinator(site)
        self._proxy = proxy_to(self._coordinator.address, proxy, directory=site)
        self._used = self._tried = credential.require(site)
        self._due = 0.0

    def fleet(self) -> Fleet:
        """Returns a connection with the key that is in use."""
        return self._open(self._used)

    def renewed(self) -> Fleet | None:
        """Returns a connection with a newer key, if there is one; it is in use from ``keep`` on."""
        newest = credential.current(self._site / "private")
        if newest is None or newest.number <= self._used.number or time.monotonic() < self._due:
            return None
        self._tried, self._due = newest, time.monotonic() + AGAIN_SECONDS
        return self._open(newest)

    def keep(self) -> None:
        """Takes the renewed key into use, and removes the ones before."""
        self._used = self._tried
        credential.forget_former(self._used)

    def _open(self, used: Credential) -> Fleet:
        tls = used.tls(self._coordinator.certificate)
        known = self._coordinator
        route = Route(known.address, authority=known.certificate, tls=tls, proxy=self._proxy)
        return Fleet(route, key=used.key)
