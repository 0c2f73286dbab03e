"""A coordinator's authority without a coordinator: signs what sites ask for."""

from __future__ import annotations

from pathlib import Path

from common import certificates, keys
from common.invitation import Invitation


class Authority:
    """Signs requests with a key of its own. ``pem``: its certificate."""

    def __init__(self) -> None:
        self._key = keys.generate()
        self._certificate = certificates.make_authority(self._key, name="test")
        self.pem = certificates.to_pem(self._certificate)

    def invitation(self, request: Path, *, name: str, days: float = 365.0) -> Invitation:
        """Returns the invitation for the site whose signing request is in a file."""
        signed = certificates.make_site_certificate(
            certificates.read_request(request.read_text(), name=name),
            name=name,
            authority=self._certificate,
            authority_key=self._key,
            days=days,
        )
        pem = certificates.to_pem(signed)
        return Invitation(address="fl.example.org:8443", certificate=self.pem, site_certificate=pem)
