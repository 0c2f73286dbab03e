"""The proxy through which a site reaches its coordinator, where its network lets nobody out otherwise.

It only tunnels (HTTP, CONNECT): TLS is spoken with the coordinator's gateway through it.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal, Self
from urllib.parse import unquote
from urllib.request import getproxies_environment, proxy_bypass

from pydantic import Discriminator, Field, Tag, model_validator

from client import login
from client.pacs_settings import Basic, NoAuthentication
from common.errors import ConfigError
from common.value import Value

if TYPE_CHECKING:  # takes long to import, and every command reads the settings that this module is of
    import httpx

ADDRESS: Final = re.compile(r"https?://([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]+\]):[1-9]\d{0,4}")
"""An address without user and password. The port has to be said: programs differ in what they take for it."""
ENVIRONMENT: Final = "HTTPS_PROXY"
SITE: Final = "site.yaml"


class NamedProxy(Value):
    """A proxy that ``site.yaml`` names; ``docs/operation.md`` explains each key."""

    url: Annotated[str, Field(max_length=300)]
    authentication: Annotated[NoAuthentication | Basic, Field(discriminator="kind")]
    ca_certificate: Annotated[str, Field(min_length=1, max_length=1000)] | None

    @model_validator(mode="after")
    def _url_is_an_address(self) -> Self:
        # Here and not at the field: the message of a field would repeat what is in it, a password too.
        if not ADDRESS.fullmatch(self.url):
            raise ValueError(
                "expected url as in http://proxy.hospital.example:3128, with its port and without a user, "
                "found something else"
            )
        if self.ca_certificate is not None and not self.url.startswith("https:"):
            raise ValueError("ca_certificate goes with a proxy that is itself reached over https only")
        return self


def _kind(value: object) -> str:
    return "environment" if isinstance(value, str) else "named"


Setting = (
    Annotated[
        Annotated[Literal["environment"], Tag("environment")] | Annotated[NamedProxy, Tag("named")],
        Discriminator(_kind),
    ]
    | None
)
"""The key ``proxy`` of ``site.yaml``; None is straight to the coordinator."""


@dataclass(frozen=True, kw_only=True)
class Proxy:
    """A proxy with what it takes to use it. ``source``: what names it, for people."""

    url: str
    source: str
    login: tuple[str, str] | None = field(default=None, repr=False)
    tls: ssl.SSLContext | None = field(default=None, repr=False)

    def __str__(self) -> str:
        """Returns address and source; never the password."""
        return f"{self.url} ({self.source})"

    @property
    def client(self) -> httpx.Proxy:
        """The same for a client of HTTP."""
        import httpx

        return httpx.Proxy(self.url, auth=self.login, ssl_context=self.tls)


def proxy_to(
    address: str, setting: Setting, *, directory: Path, environment: Mapping[str, str] | None = None
) -> Proxy | None:
    """Returns the proxy on the way to an address, or None where the way is straight.

    What ``site.yaml`` says wins; it may leave it to HTTPS_PROXY and NO_PROXY.

    Args:
        address: ``host:port`` of the gateway.
        directory: the site, to which the paths of secrets and certificates are relative.
        environment: of a process; None for this one.

    Raises:
        UserError: a proxy, password file or certificate that cannot be used.
    """
    if setting is None:
        return None
    if isinstance(setting, NamedProxy):
        return _named(setting, directory=directory)
    return _of_environment(address, os.environ if environment is None else environment)


def _named(setting: NamedProxy, *, directory: Path) -> Proxy:
    user = None
    if isinstance(setting.authentication, Basic):
        user = (setting.authentication.user, login.password(setting.authentication, directory=directory))
    return Proxy(
        url=setting.url,
        source=SITE,
        login=user,
        tls=login.trust(setting.ca_certificate, directory=directory) if _is_tls(setting.url) else None,
    )


def _of_environment(address: str, environment: Mapping[str, str]) -> Proxy | None:
    """Reads the variables as other programs do: in small letters they win, and ALL_PROXY comes last."""
    known = {
        name.lower().removesuffix("_proxy"): value.strip()
        for name, value in sorted(environment.items(), key=lambda item: item[0].islower())
        if name.lower() in ("https_proxy", "all_proxy", "no_proxy")
    }
    told = known.get("https") or known.get("all") or ""
    if not told or proxy_bypass(address, known):
        return None
    scheme, _, rest = (told if "://" in told else f"http://{told}").partition("://")
    who, at, host = rest.rstrip("/").rpartition("@")
    url = f"{scheme.lower()}://{host}"
    if not ADDRESS.fullmatch(url):
        raise ConfigError(
            "Expected HTTPS_PROXY as in http://proxy.hospital.example:3128, with its port, found something "
            "else; or name the proxy in site.yaml (proxy)."
        )
    user, _, secret = who.partition(":")
    return Proxy(
        url=url,
        source=ENVIRONMENT,
        login=(unquote(user), unquote(secret)) if at else None,
        tls=ssl.create_default_context() if _is_tls(url) else None,
    )


def is_overruled(setting: Setting) -> bool:
    """Says whether this process was told a proxy by its environment that ``site.yaml`` overrules."""
    return setting != "environment" and bool(getproxies_environment().get("https"))


def _is_tls(url: str) -> bool:
    return url.startswith("https:")
