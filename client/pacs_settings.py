"""What ``site.yaml`` says about the PACS: where it is, how to log in, which studies to fetch, how fast."""

from __future__ import annotations

import datetime
import ipaddress
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from common.value import Positive, Seconds, Value

Pattern = Annotated[str, Field(min_length=1, max_length=200)]
Modality = Annotated[str, Field(pattern=r"^[A-Z0-9_]{1,16}$")]
Secret = Annotated[str, Field(pattern=r"^private/[\w.-]+$")]


class NoAuthentication(Value):
    """The PACS asks for nothing."""

    kind: Literal["none"]


class Basic(Value):
    """User and password (HTTP basic authentication); the password is a file in ``private``."""

    kind: Literal["basic"]
    user: Annotated[str, Field(pattern=r"^[^:\x00-\x1f\x7f]{1,200}$")]
    password_file: Secret


class Token(Value):
    """A bearer token; it is a file in ``private``."""

    kind: Literal["token"]
    token_file: Secret


Authentication = Annotated[NoAuthentication | Basic | Token, Field(discriminator="kind")]


class Query(Value):
    """Which series to fetch; ``null`` or ``[]`` takes all; ``*`` and ``?`` stand for any text, any letter."""

    modalities: tuple[Modality, ...]
    body_part: Pattern | None
    study_description: Pattern | None
    series_description: Pattern | None
    date_from: datetime.date | None
    date_to: datetime.date | None

    @model_validator(mode="after")
    def _dates_are_in_order(self) -> Self:
        if self.date_from is not None and self.date_to is not None and self.date_to < self.date_from:
            raise ValueError(f"expected date_to after date_from, found {self.date_to}")
        return self


class Pacs(Value):
    """The hospital's PACS as a DICOMweb server; every key is explained in ``docs/pacs.md``."""

    url: Annotated[str, Field(max_length=1000)]
    query: Query
    authentication: Authentication
    ca_certificate: Annotated[str, Field(min_length=1, max_length=1000)] | None
    unsafe_allow_plain_http: bool
    max_requests_per_second: Annotated[Positive, Field(le=1000)]
    connections: Annotated[int, Field(ge=1, le=16)]
    timeout_seconds: Seconds
    patience_seconds: Seconds

    @model_validator(mode="after")
    def _address_is_one_of_a_server(self) -> Self:
        # Here and not at the field: the message of a field would repeat what is in it, a password too.
        try:
            parts = urlsplit(self.url)
            has_host = bool(parts.hostname) and (parts.port is None or parts.port > 0)
        except ValueError:
            has_host = False
        if not has_host or parts.scheme not in ("http", "https") or not self.url.isascii():
            raise ValueError(
                "expected url as in https://pacs.hospital.example/dicom-web, found something else"
            )
        if parts.username is not None or parts.query or parts.fragment:
            raise ValueError(
                "expected url without user, password, '?' and '#'; the user goes under authentication"
            )
        return self

    @model_validator(mode="after")
    def _plain_http_stays_on_this_machine(self) -> Self:
        parts = urlsplit(self.url)
        if parts.scheme == "https" or self.unsafe_allow_plain_http or is_loopback(parts.hostname or ""):
            return self
        raise ValueError(
            "expected https in url: over http anybody on the way to the PACS can read images and password; "
            "where the hospital accepts that, say unsafe_allow_plain_http: true"
        )


def is_loopback(host: str) -> bool:
    """Returns whether an address never leaves this machine.

    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("localhost"), is_loopback("10.0.0.1")
    (True, True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
