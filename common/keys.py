"""Keys and certificates of sites and coordinator. Private keys are made where they are used and stay there.

All keys are P-384: Flower takes NIST curves only, and one key serves as Flower key and certificate key.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import hashlib
import ipaddress
import os
import ssl
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import ConfigError, UserError

PrivateKey = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey

AUTHORITY_DAYS = 3650
SERVER_DAYS = 825  # the longest that current TLS libraries accept from a private authority
CLOCK_SKEW = datetime.timedelta(hours=1)


def generate() -> PrivateKey:
    """Returns a new P-384 private key."""
    return ec.generate_private_key(ec.SECP384R1())


def write_secret(path: Path, content: bytes) -> None:
    """Writes a new file with mode 0600; never overwrites.

    Raises:
        FileExistsError: the file is there already.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def read_secret(path: Path) -> bytes:
    """Returns the content of a secret file.

    Raises:
        UserError: the file is missing, or others than its owner can read it.
    """
    try:
        mode = path.stat().st_mode & 0o777
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"Expected the secret file {path}, found {error.strerror}; run the init command again."
        ) from None
    if mode & 0o077:
        raise UserError(
            f"Expected {path} to be readable by its owner only, found mode {mode:04o}; "
            f"make a new key if others may have read it, else: chmod 600 {path}"
        )
    return content


def write_private(path: Path, key: PrivateKey) -> None:
    """Writes a new private key file (PEM, PKCS 8) with mode 0600."""
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_secret(path, pem)


def read_private(path: Path) -> PrivateKey:
    """Returns the P-384 private key in a file that only its owner can read.

    Raises:
        UserError: missing, readable by others, or not a P-384 key.
    """
    try:
        key = serialization.load_pem_private_key(read_secret(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise UserError(f"Expected a P-384 private key in {path}, found something else.") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise UserError(f"Expected a P-384 private key in {path}, found another kind.")
    return key


def own(path: Path) -> PrivateKey:
    """Returns the P-384 private key in a file, which is made at the first use.

    Raises:
        UserError: readable by others, or not a P-384 key.
    """
    if not path.exists():
        with contextlib.suppress(FileExistsError):  # another process was first
            write_private(path, generate())
    return read_private(path)


def public_text(key: PublicKey) -> str:
    """Returns a public key as one OpenSSH line, which is what a site hands to the coordinator."""
    line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return line.decode() + "\n"


def public_pem(key: PublicKey) -> bytes:
    """Returns a public key as Flower registers it (PEM, SubjectPublicKeyInfo)."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def parse_public(text: str) -> PublicKey:
    """Returns the P-384 public key in OpenSSH or PEM text.

    Raises:
        ConfigError: anything else, a private key above all.
    """
    if "PRIVATE KEY" in text:
        raise ConfigError(
            "Expected a public key, found a private one, which must never leave the site; send site.pub, "
            "and make a new key if this one has already travelled."
        )
    load = (
        serialization.load_ssh_public_key if text.startswith("ecdsa-") else serialization.load_pem_public_key
    )
    try:
        key = load(text.strip().encode("ascii"))
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(
            "Expected a P-384 public key (OpenSSH or PEM text), found something else; "
            "send the file private/site.pub that feverfew-client init has made."
        ) from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ConfigError("Expected a P-384 public key, found another kind; send private/site.pub.")
    return key


def fingerprint(key: PublicKey) -> str:
    """Returns the short form of a public key that two people compare on the telephone."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return _sha256(der)


def certificate_fingerprint(pem: str) -> str:
    """Returns the same short form of a certificate (PEM)."""
    return _sha256(ssl.PEM_cert_to_DER_cert(pem))


def make_authority(key: PrivateKey, *, name: str) -> x509.Certificate:
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
    key: PublicKey, *, hosts: Sequence[str], authority: x509.Certificate, authority_key: PrivateKey
) -> x509.Certificate:
    """Returns a server certificate for the given DNS names and IP addresses.

    Raises:
        ConfigError: a host is neither.
    """
    names = [_general_name(host) for host in dict.fromkeys(hosts)]
    builder = _builder(_name(hosts[0][:64]), issuer=authority.subject, key=key, days=SERVER_DAYS)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    return (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(issuer, critical=False)
        .sign(authority_key, hashes.SHA384())
    )


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """Returns a certificate as PEM text."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def trust_only(authority_pem: str) -> ssl.SSLContext:
    """Returns a client's TLS context that trusts one authority and nothing else; TLS 1.3.

    Raises:
        ConfigError: not a certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_verify_locations(cadata=authority_pem)
    except (ssl.SSLError, ValueError):
        raise ConfigError("Expected the coordinator's certificate (PEM), found something else.") from None
    return context


def _sha256(content: bytes) -> str:
    return "SHA256:" + base64.b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(subject: x509.Name, *, issuer: x509.Name, key: PublicKey, days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
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
