"""With what a site connects: a key of its own, and the certificate that the coordinator has signed for it.

Keys are numbered: a renewal makes the next one, and the newest that has a certificate is used. The key that
signs what the site keeps (``site.key``) is another one and stays the same.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from client.files import private_directory, write_private
from common import certificates, keys
from common.certificates import Certificate
from common.errors import UserError
from common.invitation import Invitation


@dataclass(frozen=True, kw_only=True)
class Credential:
    """One key for connections; ``private/connection/NUMBER.key`` of a site, and ``.crt`` beside it."""

    directory: Path
    number: int

    @property
    def key_file(self) -> Path:
        return self.directory / f"{self.number}.key"

    @property
    def certificate_file(self) -> Path:
        return self.directory / f"{self.number}.crt"

    @property
    def key(self) -> keys.PrivateKey:
        return keys.read_private(self.key_file)

    @property
    def has_certificate(self) -> bool:
        return self.certificate_file.exists()

    @property
    def certificate(self) -> Certificate:
        return certificates.from_pem(self.certificate_file.read_text(encoding="ascii"))

    def tls(self, authority_pem: str) -> ssl.SSLContext:
        """Returns a TLS context that trusts one authority only, and shows this certificate.

        Raises:
            UserError: others can read the key.
        """
        keys.read_private(self.key_file)
        context = keys.trust_only(authority_pem)
        context.load_cert_chain(self.certificate_file, self.key_file)
        return context


def credentials(private: Path) -> list[Credential]:
    """Returns the keys for connections in a site's private directory, the newest last."""
    directory = private / "connection"
    numbers = sorted(int(path.stem) for path in directory.glob("*.key") if path.stem.isdecimal())
    return [Credential(directory=directory, number=number) for number in numbers]


def current(private: Path) -> Credential | None:
    """Returns the newest key that has a certificate; None before the first invitation."""
    admitted = [one for one in credentials(private) if one.has_certificate]
    return admitted[-1] if admitted else None


def require(site: Path) -> Credential:
    """Returns with what a site connects.

    Raises:
        UserError: it has no certificate yet, or the one that it has has expired.
    """
    credential = current(site / "private")
    if credential is None:
        raise UserError(
            f"Expected a certificate in {site / 'private' / 'connection'}, found none; send the .csr file in "
            f"{site} to the coordinator, then: feverfew-client init {site} --invitation FILE"
        )
    if certificates.days_left(credential.certificate) < 0:
        raise UserError(
            f"Expected a valid certificate in {site}, found one that has expired; "
            f"feverfew-client renew {site} makes a new request for the coordinator."
        )
    return credential


def make_first(private: Path) -> list[Path]:
    """Makes the first key for connections if there is none; returns what was made."""
    return [] if credentials(private) else [_make(private, number=1).key_file]


def _make(private: Path, *, number: int) -> Credential:
    made = Credential(directory=private_directory(private / "connection"), number=number)
    keys.write_private(made.key_file, keys.generate())
    return made


def renew(private: Path) -> Credential:
    """Makes the next key for connections; one that still waits for its certificate is that already."""
    found = credentials(private)
    if found and not found[-1].has_certificate:
        return found[-1]
    return _make(private, number=found[-1].number + 1 if found else 1)


def request_file(site: Path, *, name: str) -> Path:
    """Returns where a site's signing request is."""
    return site / f"{name}.csr"


def write_request(site: Path, credential: Credential, *, name: str) -> Path:
    """Writes the signing request for a key, which goes to the coordinator; returns its file."""
    path = request_file(site, name=name)
    path.write_text(certificates.make_request(credential.key, name=name), encoding="ascii")
    return path


def accept(private: Path, invitation: Invitation, *, name: str) -> Credential:
    """Keeps the certificate of an invitation beside its key.

    Raises:
        UserError: it is not for this site, not for a key of it, or not signed by the invitation's authority.
    """
    certificate = certificates.from_pem(invitation.site_certificate)
    if not certificates.is_issued_by(certificate, certificates.from_pem(invitation.certificate)):
        raise UserError(
            "Expected a certificate that the invitation's own authority has signed, found one of somebody "
            "else; do not use it, and ask the coordinator on the telephone."
        )
    if certificates.site_name(certificate) != name:
        found = certificates.site_name(certificate)
        raise UserError(f"Expected the invitation of {name}, found that of {found}; ask for the right file.")
    wanted = certificates.public_key(certificate)
    for credential in credentials(private):
        if credential.key.public_key() == wanted:
            write_private(credential.certificate_file, content=certificates.to_pem(certificate).encode())
            return credential
    raise UserError(
        f"Expected a certificate for the key of {name}, found one for another key; "
        "send the coordinator the .csr file as it is now."
    )


def forget_former(credential: Credential) -> None:
    """Removes the keys before this one, which is in use."""
    for path in private_directory(credential.directory).iterdir():
        if path.stem.isdecimal() and int(path.stem) < credential.number:
            path.unlink(missing_ok=True)
