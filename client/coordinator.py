"""Where a site finds its coordinator, and the one certificate authority that it trusts."""

from __future__ import annotations

import os
from pathlib import Path

from common import keys
from common.errors import UserError
from common.invitation import Invitation

SETTINGS = "coordinator.yaml"
CERTIFICATE = "coordinator.crt"

TEMPLATE = """\
# Where the coordinator's gateway is (host:port). This site connects to it, never the other way round.
address: {address}
# The coordinator's certificate authority; nothing else is trusted. Relative to this directory.
certificate: {certificate}
"""


def open_coordinator(directory: Path) -> Invitation:
    """Reads ``coordinator.yaml`` of a site directory and the certificate that it names.

    Raises:
        UserError: the site has not been invited yet.
        ConfigError: a file is not what it should be.
    """
    path = directory / SETTINGS
    if not path.is_file():
        raise UserError(
            f"Expected {path}, found none; ask the coordinator for an invitation, "
            f"then: feverfew-client init {directory} --invitation FILE"
        )
    settings = Invitation.settings(path.read_text(encoding="utf-8"))
    certificate = directory / settings.certificate
    if not certificate.is_file():
        raise UserError(f"Expected the coordinator's certificate at {certificate}, found none.")
    pem = certificate.read_text(encoding="utf-8")
    keys.trust_only(pem)
    return Invitation(address=settings.address, certificate=pem)


def accept(invitation: Invitation, *, directory: Path) -> None:
    """Writes whom to reach and to trust into a site directory; the same again changes nothing.

    Raises:
        UserError: the site has another coordinator already.
    """
    if (directory / SETTINGS).exists():
        known = open_coordinator(directory)
        if known.address == invitation.address and known.fingerprint == invitation.fingerprint:
            return
        raise UserError(
            f"Expected no coordinator in {directory}, found {known.address}; to change it, remove "
            f"{SETTINGS} and {CERTIFICATE} yourself first."
        )
    (directory / CERTIFICATE).write_text(invitation.certificate, encoding="utf-8")
    fresh = directory / f"{SETTINGS}.new"
    fresh.write_text(TEMPLATE.format(address=invitation.address, certificate=CERTIFICATE), encoding="utf-8")
    os.replace(fresh, directory / SETTINGS)  # last, so that a half-written invitation is none
