"""The coordinator's server key and certificate: made, renewed from the same authority, watched for their end.

Key and certificate are two files. A renewal writes both beside them, then moves the key and the certificate
into place; what is killed in between is completed by whoever reads them next.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from filelock import FileLock

from common import certificates, durable, keys
from common.certificates import Certificate
from common.errors import ConfigError, UserError
from server.home import LOOPBACK, Home

USERS: Final = ("superlink", "gateway")
"""The processes that read the server certificate when they start."""


def renew(home: Home, *, days: float = certificates.SERVER_DAYS) -> Certificate:
    """Makes a new server key and certificate; both are there, or neither, whatever is killed when.

    Raises:
        UserError: the authority's key is missing or readable by others.
    """
    key = keys.generate()
    certificate = certificates.make_server_certificate(
        key.public_key(),
        hosts=[home.settings.host, "localhost", LOOPBACK],
        authority=certificates.from_pem(home.authority_certificate.read_text(encoding="ascii")),
        authority_key=keys.read_private(home.authority_key),
        days=days,
    )
    with FileLock(home.state / "renewal.lock", mode=0o600):
        _settle(home)
        _fresh(home.server_key).unlink(missing_ok=True)
        durable.write(_fresh(home.server_certificate), certificates.to_pem(certificate).encode())
        keys.write_private(_fresh(home.server_key), key)
        _settle(home)
    return certificate


def current(home: Home) -> Certificate:
    """Returns the server certificate, after completing a renewal that was cut off."""
    with FileLock(home.state / "renewal.lock", mode=0o600):
        _settle(home)
    return certificates.from_pem(home.server_certificate.read_text(encoding="ascii"))


def require_valid(home: Home) -> None:
    """Checks that sites will take the server certificate.

    Raises:
        UserError: it has expired.
    """
    found = current(home)
    if certificates.days_left(found) < 0:
        raise UserError(
            f"Expected a valid server certificate, found one that expired on "
            f"{found.not_valid_after_utc:%Y-%m-%d}; run: feverfew-server renew {home.directory}"
        )


class Watch:
    """Says whether the server certificate is another than when it was looked at last."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._known = current(home)

    def has_changed(self) -> bool:
        """Looks at the file; one that cannot be read has not changed."""
        try:
            found = certificates.from_pem(self._home.server_certificate.read_text(encoding="ascii"))
        except (OSError, ValueError, ConfigError):
            return False
        changed, self._known = found != self._known, found
        return changed


def _settle(home: Home) -> None:
    """Moves a new pair into place, if it is complete; forgets it if it is not."""
    key, certificate = _fresh(home.server_key), _fresh(home.server_certificate)
    if not certificate.exists():
        key.unlink(missing_ok=True)
        return
    wanted = certificates.from_pem(certificate.read_text(encoding="ascii")).public_key()
    if key.exists() and _is_of(key, wanted):
        _move(key, home.server_key)
    if _is_of(home.server_key, wanted):
        _move(certificate, home.server_certificate)
    else:
        certificate.unlink()


def _is_of(path: Path, wanted: object) -> bool:
    try:
        return keys.read_private(path).public_key() == wanted
    except UserError:
        return False


def _move(fresh: Path, place: Path) -> None:
    os.replace(fresh, place)
    durable.sync_directory(place.parent)


def _fresh(place: Path) -> Path:
    return place.with_name(f"{place.name}.new")
