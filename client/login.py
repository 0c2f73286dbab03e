"""Who we are to the PACS, and whom we take for it: credentials and certificates."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import TYPE_CHECKING

from client.pacs_settings import Authentication, Basic, Token
from common import keys
from common.errors import ConfigError

if TYPE_CHECKING:  # takes long to import, and every command reads the settings that this module is of
    from collections.abc import Callable

    import httpx

    Auth = httpx.Auth | Callable[[httpx.Request], httpx.Request]


def trust(path: str | None, *, directory: Path) -> ssl.SSLContext:
    """Returns whom to trust: the certificates in a file, or those of this machine.

    Raises:
        ConfigError: no certificates in the file.
    """
    if path is None:
        return ssl.create_default_context()
    try:
        return ssl.create_default_context(cafile=directory / path)
    except (OSError, ssl.SSLError):
        raise ConfigError(
            "Expected certificates (PEM) in the file that ca_certificate names, found none; see site.yaml."
        ) from None


def auth(authentication: Authentication, *, directory: Path) -> Auth | None:
    """Returns what adds the credentials to each request; they are read from the files that hold them.

    Raises:
        UserError: a file that is missing, that others can read, or that holds something else.
    """
    if isinstance(authentication, Basic):
        secret = _password(authentication, directory=directory)
        import httpx

        return httpx.BasicAuth(authentication.user.encode(), secret)
    if isinstance(authentication, Token):
        return _bearer(_token(directory / authentication.token_file))
    return None


def password(authentication: Basic, *, directory: Path) -> str:
    """Returns the password in the file that holds it.

    Raises:
        UserError: the file is missing, others can read it, or it holds no text.
    """
    try:
        return _password(authentication, directory=directory).decode()
    except UnicodeDecodeError:
        raise ConfigError("Expected text in the file that password_file names, found other bytes.") from None


def _password(authentication: Basic, *, directory: Path) -> bytes:
    return _secret(directory / authentication.password_file).rstrip(b"\r\n")


def _token(path: Path) -> str:
    token = _secret(path).strip()
    if not token or not all(33 <= byte < 127 for byte in token):
        raise ConfigError("Expected one token in the file that token_file names, found other text.")
    return token.decode("ascii")


def _secret(path: Path) -> bytes:
    if not path.is_file():
        raise ConfigError(f"Expected the file {path} that site.yaml names, found none; write it, mode 0600.")
    return keys.read_secret(path)


def _bearer(token: str) -> Callable[[httpx.Request], httpx.Request]:
    def with_token(request: httpx.Request) -> httpx.Request:
        request.headers["Authorization"] = f"Bearer {token}"
        return request

    return with_token
