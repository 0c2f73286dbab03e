"""Certificates of coordinator and sites, and the signing request with which a site asks for its own.

A coordinator is its own authority: nobody else can admit a site, and nobody else can claim to be it.
"""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from collections.abc import Sequence
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import ConfigError
from common.keys import PrivateKey, PublicKey, short_form

Certificate = x509.Certificate

AUTHORITY_DAYS: Final = 3650
SERVER_DAYS: Final = 825  # the longest that current TLS libraries accept from a private authority
NOTICE_DAYS: Final = 30
"""So long before its end a certificate's expiry is announced."""
CLOCK_SKEW: Final = datetime.timedelta(hours=1)


def make_authority(key: PrivateKey, *, name: str) -> Certificate:
    """Returns the self-signed certificate of a coordinator's own authority; it signs no sub-authorities."""
    subject = _name(name)
    usage = _key_usage(key_cert_sign=True, crl_sign=True)
    return (
        _builder(subject, issuer=subject, key=key.public_key(), days=AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA384())
    )


def make_server_certificate(
    key: PublicKey,
    *,
    hosts: Sequence[str],
    authority: Certificate,
    authority_key: PrivateKey,
    days: float = SERVER_DAYS,
) -> Certificate:
    """Returns a server certificate for the given DNS names and IP addresses.

    Raises:
        ConfigError: a host is neither.
    """
    names = x509.SubjectAlternativeName([_general_name(host) for host in dict.fromkeys(hosts)])
    builder = _builder(_name(hosts[0][:64]), issuer=authority.subject, key=key, days=days)
    builder = builder.add_extension(names, critical=False)
    return _signed(builder, use=ExtendedKeyUsageOID.SERVER_AUTH, authority_key=authority_key)


def make_request(key: PrivateKey, *, name: str) -> str:
    """Returns a site's signing request (PEM text): its name and public key, signed with the private one."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(_name(name))
    request = builder.sign(key, hashes.SHA384())
    return request.public_bytes(serialization.Encoding.PEM).decode("ascii")


def read_request(text: str, *, name: str) -> PublicKey:
    """Returns the public key in the signing request of the site of this name.

    Raises:
        ConfigError: anything else, a private key above all; another site's request; not signed with its key.
    """
    if "PRIVATE KEY" in text:
        raise ConfigError(
            "Expected a signing request, found a private key, which must never leave the site; send the .csr "
            "file, and make a new key if this one has already travelled."
        )
    try:
        request = x509.load_pem_x509_csr(text.encode("ascii"))
        key, is_signed = request.public_key(), request.is_signature_valid
        names = [str(one.value) for one in request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    except ValueError:
        raise ConfigError(
            "Expected a signing request (PEM text), found something else; send the .csr file that "
            "feverfew-client init has made."
        ) from None
    if not is_p384(key) or not is_signed:
        raise ConfigError("Expected a request for a P-384 key, signed with that key, found another kind.")
    if names != [name]:
        raise ConfigError(f"Expected the signing request of {name}, found that of {', '.join(names)!r}.")
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return key


def make_site_certificate(
    key: PublicKey, *, name: str, authority: Certificate, authority_key: PrivateKey, days: float
) -> Certificate:
    """Returns the certificate with which a site proves to the gateway that it is the one of this name."""
    builder = _builder(_name(name), issuer=authority.subject, key=key, days=days)
    return _signed(builder, use=ExtendedKeyUsageOID.CLIENT_AUTH, authority_key=authority_key)


def to_pem(certificate: Certificate) -> str:
    """Returns a certificate as PEM text."""
    return certificate.public_bytes(serialization.Encoding.PEM).decode("ascii")


def from_pem(text: str) -> Certificate:
    """Returns the certificate in PEM text.

    Raises:
        ConfigError: something else.
    """
    try:
        return x509.load_pem_x509_certificate(text.encode("ascii"))
    except ValueError:
        raise ConfigError("Expected a certificate (PEM text), found something else.") from None


def from_der(content: bytes) -> Certificate:
    """Returns the certificate that came over TLS."""
    return x509.load_der_x509_certificate(content)


def fingerprint(pem: str) -> str:
    """Returns the short form of a certificate (PEM) that two people compare on the telephone."""
    return short_form(ssl.PEM_cert_to_DER_cert(pem))


def site_name(certificate: Certificate) -> str:
    """Returns the name that a certificate gives to a site."""
    (attribute,) = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(attribute.value)


def public_key(certificate: Certificate) -> PublicKey:
    """Returns the P-384 key that a certificate is about.

    Raises:
        ConfigError: it is about another kind of key.
    """
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not is_p384(key):
        raise ConfigError("Expected a certificate of a P-384 key, found one of another kind.")
    return key


def is_p384(key: object) -> bool:
    """Says whether a key is of the one kind that is used here."""
    return isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP384R1)


def is_issued_by(certificate: Certificate, authority: Certificate) -> bool:
    """Says whether an authority has signed a certificate."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def is_valid_at(certificate: Certificate, when: datetime.datetime) -> bool:
    """Says whether a time is within a certificate's validity."""
    return certificate.not_valid_before_utc <= when <= certificate.not_valid_after_utc


def days_left(certificate: Certificate, *, now: datetime.datetime | None = None) -> float:
    """Returns the days until a certificate expires; negative afterwards."""
    left = certificate.not_valid_after_utc - (now or datetime.datetime.now(datetime.UTC))
    return left / datetime.timedelta(days=1)


def _signed(
    builder: x509.CertificateBuilder, *, use: x509.ObjectIdentifier, authority_key: PrivateKey
) -> Certificate:
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    return (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
        .add_extension(issuer, critical=False)
        .sign(authority_key, hashes.SHA384())
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(
    subject: x509.Name, *, issuer: x509.Name, key: PublicKey, days: float
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    end = now + datetime.timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, end) - CLOCK_SKEW)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        ascii_host = host.encode("idna").decode("ascii")
    except UnicodeError:
        ascii_host = ""
    labels = ascii_host.split(".")
    if not all(label and label.replace("-", "").isalnum() for label in labels):
        raise ConfigError(f"Expected a DNS name or an IP address as host, found {host!r}.")
    return x509.DNSName(ascii_host)
