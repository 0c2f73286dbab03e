"""Sites and strangers that call at a gateway: each with a key, a certificate, and the bytes that it sends."""

from __future__ import annotations

import base64
import datetime
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.message_pb2 import Message as MessageProto

from common import certificates, flower, keys
from common.certificates import Certificate
from server import enrolment
from server.home import Home

ECDSA = ec.ECDSA(hashes.SHA256())
TYPE = {"content-type": "application/x-protobuf", "accept": "application/x-protobuf"}


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Somebody with a key and a certificate; ``node_id`` is what the SuperLink would give a site."""

    key: keys.PrivateKey
    certificate: Certificate
    node_id: int

    @property
    def pem(self) -> bytes:
        return keys.public_pem(self.key.public_key())

    def tls(self, home: Home) -> ssl.SSLContext:
        """Returns a context that trusts the coordinator and shows the certificate."""
        place = home.directory.parent / keys.fingerprint(self.key.public_key()).replace("/", "_")
        if not place.exists():
            place.mkdir()
            keys.write_private(place / "key", self.key)
        (place / "crt").write_text(certificates.to_pem(self.certificate))
        context = home.tls
        context.load_cert_chain(place / "crt", place / "key")
        return context

    def client(self, home: Home) -> httpx.Client:
        """Returns a client that keeps its connections."""
        url = f"https://127.0.0.1:{home.settings.port}"
        return httpx.Client(base_url=url, verify=self.tls(home), trust_env=False, timeout=20)

    def signed(
        self, stamp: str | None = None, *, late_seconds: float = 0.0, signer: keys.PrivateKey | None = None
    ) -> dict[str, str]:
        """Returns the headers of a request that is signed now, or so long ago."""
        now = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=late_seconds)
        stamp = stamp or now.isoformat()
        signature = (signer or self.key).sign(stamp.encode(), ECDSA)
        found = (base64.b64encode(self.pem), stamp.encode(), base64.b64encode(signature))
        return dict(zip(flower.SIGNATURE_HEADERS, (one.decode() for one in found), strict=True)) | TYPE

    def body(self, path: str, *, node: int | None = None, sender: int | None = None) -> bytes:
        """Returns a small request in the form of a path, for a node, its own if none is named."""
        form = flower.FLEET_REQUESTS[path.rpartition("/")[2]]
        node_id = self.node_id if node is None else node
        message = MessageProto()
        message.metadata.src_node_id = node_id if sender is None else sender
        fields: Mapping[str, Any] = {
            "public_key": self.pem,
            "node_id": node_id,
            "node": flower.NodeProto(node_id=node_id),
            "messages_list": [message],
            "object_content": b"abc",
        }
        known = {field.name for field in form.DESCRIPTOR.fields}
        return bytes(
            form(**{name: value for name, value in fields.items() if name in known}).SerializeToString()
        )


def enrol(home: Home, name: str, *, node_id: int) -> Caller:
    """Enrols a new site and returns it as a caller."""
    key = keys.generate()
    request = certificates.make_request(key, name=name)
    renewed = any(site.name == name for site in enrolment.enrolled(home))
    site = enrolment.admit(home, name, request=request, renewed=renewed)
    return Caller(key=key, certificate=site.certificate, node_id=node_id)


def certified(home: Home, key: keys.PrivateKey, *, name: str, seconds: float) -> Certificate:
    """Returns a certificate by the coordinator's authority that ends in so many seconds, whole ones."""
    return certificates.make_site_certificate(
        key.public_key(),
        name=name,
        authority=certificates.from_pem(home.authority_certificate.read_text()),
        authority_key=keys.read_private(home.authority_key),
        days=seconds / 86400,
    )
