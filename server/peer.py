"""Who is at the other end of a connection: what the certificate says that TLS has verified."""

from __future__ import annotations

import base64
import datetime
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

from common import certificates, keys
from common.certificates import Certificate
from common.keys import PublicKey


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A site, as its certificate names it.

    Attributes:
        fingerprint: of its public key, as it stands in the deny list.
        pem: its public key as Flower registers it.
        header: the same as Flower's node header has to say it.
    """

    name: str
    certificate: Certificate
    key: PublicKey
    fingerprint: str
    pem: bytes
    header: bytes

    @classmethod
    def of(cls, certificate: Certificate) -> Self:
        """Returns whom a certificate is about, with all that is asked of it at each request."""
        key = certificates.public_key(certificate)
        pem = keys.public_pem(key)
        return cls(
            name=certificates.site_name(certificate),
            certificate=certificate,
            key=key,
            fingerprint=keys.fingerprint(key),
            pem=pem,
            header=base64.b64encode(pem),
        )

    def is_valid(self) -> bool:
        """Says whether the certificate is valid now: connections may live longer than certificates."""
        return certificates.is_valid_at(self.certificate, datetime.datetime.now(datetime.UTC))


@lru_cache(maxsize=512)
def peer_of(der: bytes) -> Peer:
    """Returns whom a certificate that came over TLS is about."""
    return Peer.of(certificates.from_der(der))
