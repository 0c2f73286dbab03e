"""Invitation: the small text that a coordinator hands to a hospital, on paper if need be."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common import certificates, keys
from common.errors import ConfigError
from common.settings import tree_of


class Invitation(BaseModel):
    """Where a gateway is (``host:port``), and two certificates (PEM): of its authority, and of the site.

    The site's is "" in what a site keeps of it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: Annotated[str, Field(pattern=r"^[^\s/@]{1,253}:\d{1,5}$")]
    certificate: str
    site_certificate: str = ""

    def to_text(self) -> str:
        """Returns the invitation as YAML; the inverse of ``from_text``."""
        return (
            "# For: feverfew-client init DIR --invitation FILE. Nothing in here is secret, but make sure\n"
            "# that it comes from the coordinator: compare the fingerprint that both commands show.\n"
            f"address: {self.address}\n{_block('certificate', self.certificate)}"
            f"{_block('site_certificate', self.site_certificate)}"
        )

    @classmethod
    def from_text(cls, text: str) -> Invitation:
        """Reads an invitation.

        Raises:
            ConfigError: not an invitation, or without usable certificates.
        """
        invitation = cls.settings(text)
        keys.trust_only(invitation.certificate)
        certificates.from_pem(invitation.site_certificate)
        return invitation

    @classmethod
    def settings(cls, text: str) -> Invitation:
        """Reads the same keys where ``certificate`` is the name of a file.

        Raises:
            ConfigError: not these keys.
        """
        try:
            return cls.model_validate(tree_of(text))
        except (ConfigError, ValidationError):
            raise ConfigError(
                "Expected an invitation with the keys address (host:port), certificate and site_certificate, "
                "found other text; ask the coordinator for the file that feverfew-server enroll has written."
            ) from None

    @property
    def fingerprint(self) -> str:
        """What coordinator and hospital compare on the telephone."""
        return certificates.fingerprint(self.certificate)


def _block(name: str, pem: str) -> str:
    return f"{name}: |\n" + "".join(f"  {line}\n" for line in pem.strip().splitlines())
