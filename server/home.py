"""The coordinator's directory: settings, keys, state, logs and runs."""

from __future__ import annotations

import ipaddress
import os
import secrets
import shutil
import ssl
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common import certificates, keys
from common.certificates import SERVER_DAYS
from common.errors import ConfigError, SchemaError, UserError
from common.invitation import Invitation
from common.settings import current, tree_of
from common.value import first_problem
from server.control import Control
from server.denied import HEADER

Port = Annotated[int, Field(ge=1, le=65535)]
LOOPBACK = "127.0.0.1"
SETTINGS = "coordinator.yaml"


class CoordinatorSettings(BaseModel):
    """Settings of a coordinator, read from ``coordinator.yaml``; every key is explained there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: Annotated[str, Field(min_length=1, max_length=253)]
    port: Port
    bind: str
    internal_port: Port
    monitor_port: Port | None
    certificate_days: Annotated[float, Field(gt=0, le=SERVER_DAYS)]


@dataclass(frozen=True, kw_only=True)
class Home:
    """The coordinator's directory; mode 0700."""

    directory: Path
    settings: CoordinatorSettings

    @property
    def authority_certificate(self) -> Path:
        return self.directory / "authority.crt"

    @property
    def authority_key(self) -> Path:
        return self.directory / "private" / "authority.key"

    @property
    def server_certificate(self) -> Path:
        return self.directory / "server.crt"

    @property
    def server_key(self) -> Path:
        return self.directory / "private" / "server.key"

    @property
    def trail_key(self) -> Path:
        """Signs trails and nothing else; made at the first use."""
        return self.directory / "private" / "trail.key"

    @property
    def superexec_secret(self) -> Path:
        return self.directory / "private" / "superexec.secret"

    @property
    def sites(self) -> Path:
        """The certificates of enrolled sites, ``NAME.NUMBER.crt``."""
        return self.directory / "sites"

    @property
    def denied(self) -> Path:
        """The keys that the gateway refuses."""
        return self.directory / "denied.txt"

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
    def traffic(self) -> Path:
        """What the gateway has passed and refused."""
        return self.state / "gateway.traffic"

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
    text = _template().format(host=host, port=port, bind=bind, internal_port=internal_port)
    settings = _settings(tree_of(text))
    building = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}")
    building.mkdir(mode=0o700, parents=True)
    try:
        _fill(Home(directory=building, settings=settings), text=text)
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
    settings = _settings(tree_of(path.read_bytes()))
    # Absolute, since the coordinator's processes run in a directory of their own.
    return Home(directory=directory.resolve(), settings=settings)


def _template() -> str:
    return resources.files("conf").joinpath("coordinator.yaml").read_text(encoding="utf-8")


def _settings(tree: object) -> CoordinatorSettings:
    try:
        given = {"host": "", "port": 8443, "bind": "", "internal_port": 8444}
        return CoordinatorSettings.model_validate(current(tree, template="coordinator.yaml", **given))
    except SchemaError as error:
        raise SchemaError(f"{SETTINGS}: {error}") from None
    except ValidationError as error:
        raise ConfigError(f"{SETTINGS}: {first_problem(error)}") from None


def _fill(home: Home, *, text: str) -> None:
    for directory in (home.server_key.parent, home.sites, home.runs, home.logs, home.state):
        directory.mkdir(mode=0o700)
    authority_key, server_key = keys.generate(), keys.generate()
    name = f"Feverfew coordinator {home.settings.host}"[:64]
    authority = certificates.make_authority(authority_key, name=name)
    certificate = certificates.make_server_certificate(
        server_key.public_key(),
        hosts=[home.settings.host, "localhost", LOOPBACK],
        authority=authority,
        authority_key=authority_key,
    )
    keys.write_private(home.authority_key, authority_key)
    keys.write_private(home.server_key, server_key)
    keys.write_secret(home.superexec_secret, secrets.token_hex(32).encode())
    home.authority_certificate.write_text(certificates.to_pem(authority), encoding="ascii")
    home.server_certificate.write_text(certificates.to_pem(certificate), encoding="ascii")
    home.denied.write_text(HEADER, encoding="utf-8")
    (home.directory / SETTINGS).write_text(text, encoding="utf-8")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
