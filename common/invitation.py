"""Invitation: the small text that a coordinator hands to a hospital, on paper if need be."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common import keys
from common.errors import ConfigError
from common.settings import tree_of


class Invitation(BaseModel):
    """Where a coordinator's gateway is (``host:port``), and the certificate of its authority (PEM)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: Annotated[str, Field(pattern=r"^[^\s/@]{1,253}:\d{1,5}$")]
    certificate: str

    def to_text(self) -> str:
        """Returns the invitation as YAML; the inverse of ``from_text``."""
        return (
            "# For: feverfew-client init DIR --invitation FILE. Nothing in here is secret, but make sure\n"
            "# that it comes from the coordinator: compare the fingerprint that both commands show.\n"
            f"address: {self.address}\ncertificate: |\n"
            + "".join(f"  {line}\n" for line in self.certificate.strip().splitlines())
        )

    @classmethod
    def from_text(cls, text: str) -> Invitation:
        """Reads an invitation.

        Raises:
            ConfigError: not an invitation, or without a usable certificate.
        """
        invitation = cls.settings(text)
        keys.trust_only(invitation.certificate)
        return invitation

    @classmethod
    def settings(cls, text: str) -> Invitation:
        """Reads the same two keys where ``certificate`` is the name of a file.

        Raises:
            ConfigError: not these two keys.
        """
        try:
            return cls.model_validate(tree_of(text))
        except (ConfigError, ValidationError):
            raise ConfigError(
                "Expected an invitation with the keys address (host:port) and certificate, found other "
                "text; ask the coordinator for the file that feverfew-server enroll has written."
            ) from None

    @property
    def fingerprint(self) -> str:
        """What coordinator and hospital compare on the telephone."""
        return keys.certificate_fingerprint(self.certificate)
