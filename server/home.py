"""The coordinator's directory: settings, keys, state, logs and runs."""

from __future__ import annotations

import ipaddress
import os
import secrets
import shutil
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common import keys
from common.errors import ConfigError, UserError
from common.invitation import Invitation
from common.settings import tree_of
from common.value import first_problem
from server.control import Control

Port = Annotated[int, Field(ge=1, le=65535)]
LOOPBACK = "127.0.0.1"
SETTINGS = "coordinator.yaml"

TEMPLATE = """\
# The name or address under which hospitals reach the gateway; it stands in the server certificate.
host: {host}
# The port of the gateway, the only one that hospitals need.
port: {port}
# The local address that the gateway listens on.
bind: {bind}
# The port of the SuperLink. It listens on 127.0.0.1 only; whoever reaches it controls the federation, so this
# computer must have no other users.
internal_port: {internal_port}
"""


class CoordinatorSettings(BaseModel):
    """Settings of a coordinator, read from ``coordinator.yaml``; every key is explained there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: Annotated[str, Field(min_length=1, max_length=253)]
    port: Port
    bind: str
    internal_port: Port


@dataclass(frozen=True, kw_only=True)
class Home:
    """The coordinator's directory; mode 0700."""

    directory: Path
    settings: CoordinatorSettings

    @property
    def authority_certificate(self) -> Path:
        return self.directory / "authority.crt"

    @property
    def server_certificate(self) -> Path:
        return self.directory / "server.crt"

    @property
    def server_key(self) -> Path:
        return self.directory / "private" / "server.key"

    @property
    def superexec_secret(self) -> Path:
        return self.directory / "private" / "superexec.secret"

    @property
    def sites(self) -> Path:
        """One ``NAME.pub`` for each enrolled site."""
        return self.directory / "sites"

    @property
    def runs(self) -> Path:
        return self.directory / "runs"

    @property
    def heads(self) -> Path:
        """The last row of each site's ledger that the site has sent."""
        return self.directory / "heads"

    @property
    def logs(self) -> Path:
        return self.directory / "logs"

    @property
    def state(self) -> Path:
        """Flower's data base, bundles and pid files."""
        return self.directory / "state"

    @property
    def internal_address(self) -> str:
        """``host:port`` of the SuperLink."""
        return f"{LOOPBACK}:{self.settings.internal_port}"

    @property
    def tls(self) -> ssl.SSLContext:
        """A client's TLS context that trusts this coordinator's authority only."""
        return keys.trust_only(self.authority_certificate.read_text(encoding="ascii"))

    @property
    def invitation(self) -> Invitation:
        """What hospitals need to find and to trust this coordinator."""
        pem = self.authority_certificate.read_text(encoding="ascii")
        return Invitation(address=f"{self.settings.host}:{self.settings.port}", certificate=pem)

    def control(self) -> Control:
        """Returns a connection to the SuperLink's Control API."""
        return Control(self.internal_address, tls=self.tls)

    def check_secrets(self) -> None:
        """Makes sure that nobody else can read the keys.

        Raises:
            UserError: a key file is missing or readable by others.
        """
        for path in (self.server_key, self.superexec_secret):
            keys.read_secret(path)


def create_home(directory: Path, *, host: str, port: int, internal_port: int) -> Home:
    """Makes a coordinator's directory with an authority, a server certificate and a secret of its own.

    Raises:
        UserError: the directory exists.
        ConfigError: the host is neither a DNS name nor an address, or a port is out of range.
    """
    if directory.exists():
        raise UserError(f"Expected no {directory}, found one; a coordinator's keys are never overwritten.")
    bind = host if _is_loopback(host) else "0.0.0.0"
    settings = _settings({"host": host, "port": port, "bind": bind, "internal_port": internal_port})
    building = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}")
    building.mkdir(mode=0o700, parents=True)
    try:
        _fill(Home(directory=building, settings=settings))
        os.rename(building, directory)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return Home(directory=directory, settings=settings)


def open_home(directory: Path) -> Home:
    """Reads the settings of a coordinator's directory.

    Raises:
        UserError: not such a directory.
        ConfigError: a key of ``coordinator.yaml`` is unknown, missing or wrong.
    """
    path = directory / SETTINGS
    if not path.is_file():
        raise UserError(
            f"Expected a coordinator's directory at {directory}, found none; make one with "
            f"feverfew-server init {directory} --host NAME"
        )
    tree = tree_of(path.read_bytes())
    # Absolute, since the coordinator's processes run in a directory of their own.
    return Home(directory=directory.resolve(), settings=_settings(tree))


def _settings(tree: object) -> CoordinatorSettings:
    try:
        return CoordinatorSettings.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{SETTINGS}: {first_problem(error)}") from None


def _fill(home: Home) -> None:
    for directory in (home.server_key.parent, home.sites, home.runs, home.logs, home.state):
        directory.mkdir(mode=0o700)
    authority_key, server_key = keys.generate(), keys.generate()
    authority = keys.make_authority(authority_key, name=f"Feverfew coordinator {home.settings.host}"[:64])
    certificate = keys.make_server_certificate(
        server_key.public_key(),
        hosts=[home.settings.host, "localhost", LOOPBACK],
        authority=authority,
        authority_key=authority_key,
    )
    keys.write_private(home.server_key.with_name("authority.key"), authority_key)
    keys.write_private(home.server_key, server_key)
    keys.write_secret(home.superexec_secret, secrets.token_hex(32).encode())
    home.authority_certificate.write_bytes(keys.certificate_pem(authority))
    home.server_certificate.write_bytes(keys.certificate_pem(certificate))
    settings = home.directory / SETTINGS
    settings.write_text(TEMPLATE.format(**home.settings.model_dump()), encoding="utf-8")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
