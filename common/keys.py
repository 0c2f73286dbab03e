"""Keys of sites and coordinator. Private keys are made where they are used and stay there.

All keys are P-384: Flower takes NIST curves only, and a site's key for connections serves Flower and TLS.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import ssl
from functools import lru_cache
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from common.errors import ConfigError, UserError

PrivateKey = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey


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
        key = _parsed(read_secret(path))
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise UserError(f"Expected a P-384 private key in {path}, found something else.") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise UserError(f"Expected a P-384 private key in {path}, found another kind.")
    return key


@lru_cache(maxsize=4)  # a task signs and verifies several times; to parse a key takes as long as to sign
def _parsed(pem: bytes) -> object:
    return serialization.load_pem_private_key(pem, password=None)


def own(path: Path) -> PrivateKey:
    """Returns the P-384 private key in a file, which is made at the first use.

    Raises:
        UserError: readable by others, or not a P-384 key.
    """
    if not path.exists():
        with contextlib.suppress(FileExistsError):  # another process was first
            write_private(path, generate())
    return read_private(path)


def public_pem(key: PublicKey) -> bytes:
    """Returns a public key as Flower registers it (PEM, SubjectPublicKeyInfo)."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def from_pem(pem: bytes) -> PublicKey:
    """Returns the P-384 public key in a PEM text.

    Raises:
        ConfigError: anything else.
    """
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ConfigError("Expected a P-384 public key (PEM), found something else.")
    return key


def fingerprint(key: PublicKey) -> str:
    """Returns the short form of a public key that two people compare on the telephone."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return short_form(der)


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


def pem_fingerprint(pem: bytes) -> str:
    """Returns the same of a public key as Flower registers it (PEM)."""
    return short_form(base64.b64decode(b"".join(pem.split(b"\n")[1:-2])))


def short_form(content: bytes) -> str:
    """Returns the SHA-256 of a key or certificate (DER) as people and our lists write it."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
