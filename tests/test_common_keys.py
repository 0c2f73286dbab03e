from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from common import certificates, keys
from common.errors import ConfigError, UserError
from common.invitation import Invitation


def test_a_private_key_comes_back_from_its_file_which_is_for_the_owner_only(tmp_path: Path) -> None:
    path, key = tmp_path / "site.key", keys.generate()
    keys.write_private(path, key)
    assert path.stat().st_mode & 0o777 == 0o600
    assert keys.read_private(path).private_numbers() == key.private_numbers()


def test_a_key_file_is_never_overwritten(tmp_path: Path) -> None:
    keys.write_private(tmp_path / "site.key", keys.generate())
    with pytest.raises(FileExistsError):
        keys.write_private(tmp_path / "site.key", keys.generate())


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620])
def test_a_key_that_others_can_read_is_refused_with_the_remedy(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "site.key"
    keys.write_private(path, keys.generate())
    path.chmod(mode)
    with pytest.raises(UserError, match="chmod 600"):
        keys.read_private(path)


def test_a_missing_key_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="init"):
        keys.read_private(tmp_path / "site.key")


def test_other_kinds_of_private_keys_are_refused(tmp_path: Path) -> None:
    pem = ed25519.Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    keys.write_secret(tmp_path / "ed25519", pem)
    keys.write_private(tmp_path / "p256", ec.generate_private_key(ec.SECP256R1()))
    keys.write_secret(tmp_path / "noise", b"noise")
    for name in ("ed25519", "p256", "noise"):
        with pytest.raises(UserError, match="P-384"):
            keys.read_private(tmp_path / name)


def test_a_public_key_is_read_from_openssh_and_from_pem_text() -> None:
    key = keys.generate().public_key()
    text = keys.public_text(key)
    assert text.startswith("ecdsa-sha2-nistp384 ") and text.count("\n") == 1
    for written in (text, keys.public_pem(key).decode(), text.strip() + " someone@hospital\n"):
        assert keys.parse_public(written).public_numbers() == key.public_numbers()


def test_a_private_key_sent_as_a_public_one_is_refused_with_a_warning(tmp_path: Path) -> None:
    keys.write_private(tmp_path / "site.key", keys.generate())
    with pytest.raises(ConfigError, match="must never leave"):
        keys.parse_public((tmp_path / "site.key").read_text())


@pytest.mark.parametrize("text", ["", "noise", "ecdsa-sha2-nistp384 AAAA", "ssh-ed25519 AAAA", "é"])
def test_text_that_is_no_public_key_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="public key"):
        keys.parse_public(text)


def test_a_public_key_of_another_curve_is_refused() -> None:
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    with pytest.raises(ConfigError, match="P-384"):
        keys.parse_public(keys.public_text(other))


def test_fingerprints_tell_keys_apart_and_stay_the_same() -> None:
    first, second = keys.generate().public_key(), keys.generate().public_key()
    assert keys.fingerprint(first) == keys.fingerprint(keys.parse_public(keys.public_text(first)))
    assert keys.fingerprint(first) != keys.fingerprint(second)


def _server(tmp_path: Path, *, hosts: list[str]) -> tuple[ssl.SSLContext, str, x509.Certificate]:
    authority_key, server_key = keys.generate(), keys.generate()
    authority = certificates.make_authority(authority_key, name="test")
    certificate = certificates.make_server_certificate(
        server_key.public_key(), hosts=hosts, authority=authority, authority_key=authority_key
    )
    keys.write_private(tmp_path / "server.key", server_key)
    (tmp_path / "server.crt").write_text(certificates.to_pem(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.crt", tmp_path / "server.key")
    return context, certificates.to_pem(authority), certificate


def _handshake(server: ssl.SSLContext, client: ssl.SSLContext, *, host: str) -> str | None:
    """Returns the TLS version on which both ends agree; raises what the client raises."""
    ours, theirs = socket.socketpair()

    def answer() -> None:
        try:
            server.wrap_socket(theirs, server_side=True).close()
        except OSError:
            theirs.close()  # the client's error is what the test is about

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        with client.wrap_socket(ours, server_hostname=host) as tls:
            return tls.version()
    finally:
        ours.close()
        thread.join(5)


@pytest.mark.parametrize("host", ["fl.example.org", "localhost", "127.0.0.1", "::1"])
def test_a_client_that_trusts_the_authority_connects_under_every_name_of_the_server(
    tmp_path: Path, host: str
) -> None:
    server, authority, _ = _server(tmp_path, hosts=["fl.example.org", "localhost", "127.0.0.1", "::1"])
    assert _handshake(server, keys.trust_only(authority), host=host) == "TLSv1.3"


def test_another_name_another_authority_and_an_old_protocol_are_refused(tmp_path: Path) -> None:
    server, authority, _ = _server(tmp_path, hosts=["fl.example.org"])
    (tmp_path / "other").mkdir()
    _, stranger, _ = _server(tmp_path / "other", hosts=["fl.example.org"])
    with pytest.raises(ssl.SSLCertVerificationError):
        _handshake(server, keys.trust_only(authority), host="fl.example.com")
    with pytest.raises(ssl.SSLCertVerificationError):
        _handshake(server, keys.trust_only(stranger), host="fl.example.org")
    server.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        _handshake(server, keys.trust_only(authority), host="fl.example.org")


def test_the_server_certificate_is_what_strict_verification_wants(tmp_path: Path) -> None:
    server, authority, certificate = _server(tmp_path, hosts=["10.0.0.7", "fl.example.org"])
    client = keys.trust_only(authority)
    client.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13 on
    assert _handshake(server, client, host="10.0.0.7") == "TLSv1.3"
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address("10.0.0.7")]
    assert names.get_values_for_type(x509.DNSName) == ["fl.example.org"]
    lifetime = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    assert datetime.timedelta(days=825) <= lifetime < datetime.timedelta(days=826)


@pytest.mark.parametrize("host", ["", "a b", "http://x", "x/y", "-.-", "x..y"])
def test_a_host_that_is_no_name_is_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="DNS name"):
        _server(tmp_path, hosts=["localhost", host])


def test_trusting_something_that_is_no_certificate_is_refused() -> None:
    with pytest.raises(ConfigError, match="certificate"):
        keys.trust_only("no certificate")


def test_an_invitation_is_read_back_from_its_text(tmp_path: Path) -> None:
    _, authority, _ = _server(tmp_path, hosts=["localhost"])
    invitation = Invitation(address="fl.example.org:8443", certificate=authority)
    read = Invitation.from_text(invitation.to_text())
    assert (read.address, read.fingerprint) == (invitation.address, invitation.fingerprint)


@pytest.mark.parametrize(
    "text", ["", "a: [", "address: x:1", "address: x:1\ncertificate: no", "address: x\ncertificate: y"]
)
def test_text_that_is_no_invitation_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="Expected"):
        Invitation.from_text(text)
