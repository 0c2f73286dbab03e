from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common import certificates, keys
from common.errors import ConfigError
from common.invitation import Invitation


def test_a_request_gives_back_the_key_of_the_site_that_made_it() -> None:
    key = keys.generate()
    request = certificates.make_request(key, name="north")
    assert request.startswith("-----BEGIN CERTIFICATE REQUEST-----") and len(request) < 1000
    assert certificates.read_request(request, name="north") == key.public_key()


def test_the_request_of_another_site_is_refused() -> None:
    request = certificates.make_request(keys.generate(), name="north")
    with pytest.raises(ConfigError, match="found that of 'north'"):
        certificates.read_request(request, name="south")


def test_a_private_key_sent_as_a_request_is_refused_with_a_warning(tmp_path: Path) -> None:
    keys.write_private(tmp_path / "key", keys.generate())
    with pytest.raises(ConfigError, match="must never leave"):
        certificates.read_request((tmp_path / "key").read_text(), name="north")


def _request(key: ec.EllipticCurvePrivateKey) -> x509.CertificateSigningRequest:
    builder = x509.CertificateSigningRequestBuilder()
    return builder.subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "north")])).sign(
        key, hashes.SHA384()
    )


def test_a_request_for_a_key_that_did_not_sign_it_is_refused() -> None:
    """Else somebody could have another's key certified under a name of theirs."""
    mine, other = _request(keys.generate()), _request(keys.generate())
    key_of = [one.public_key().public_bytes(serialization.Encoding.X962, _POINT) for one in (mine, other)]
    forged = mine.public_bytes(serialization.Encoding.DER).replace(*key_of)
    text = x509.load_der_x509_csr(forged).public_bytes(serialization.Encoding.PEM).decode()
    with pytest.raises(ConfigError, match="signed with that key"):
        certificates.read_request(text, name="north")


_POINT = serialization.PublicFormat.UncompressedPoint


def test_a_request_for_another_kind_of_key_is_refused() -> None:
    request = _request(ec.generate_private_key(ec.SECP256R1())).public_bytes(serialization.Encoding.PEM)
    with pytest.raises(ConfigError, match="P-384"):
        certificates.read_request(request.decode(), name="north")


@pytest.mark.parametrize("text", ["", "noise", "-----BEGIN CERTIFICATE REQUEST-----", "\u00e9"])
def test_text_that_is_no_request_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="signing request"):
        certificates.read_request(text, name="north")


def test_the_certificate_of_a_site_is_for_clients_and_for_so_many_days() -> None:
    authority_key, key = keys.generate(), keys.generate()
    authority = certificates.make_authority(authority_key, name="test")
    made = certificates.make_site_certificate(
        key.public_key(), name="north", authority=authority, authority_key=authority_key, days=365
    )
    assert certificates.from_pem(certificates.to_pem(made)) == made
    assert certificates.site_name(made) == "north" and certificates.public_key(made) == key.public_key()
    usage = made.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert 364.99 < certificates.days_left(made) <= 365
    assert certificates.is_issued_by(made, authority)
    stranger = certificates.make_authority(keys.generate(), name="test")
    assert not certificates.is_issued_by(made, stranger)
    end = made.not_valid_after_utc
    second = datetime.timedelta(seconds=1)
    assert certificates.is_valid_at(made, end) and not certificates.is_valid_at(made, end + second)
    begin = made.not_valid_before_utc
    assert certificates.is_valid_at(made, begin) and not certificates.is_valid_at(made, begin - second)


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
    _, authority, own = _server(tmp_path, hosts=["localhost"])
    pem = certificates.to_pem(own)
    invitation = Invitation(address="fl.example.org:8443", certificate=authority, site_certificate=pem)
    read = Invitation.from_text(invitation.to_text())
    assert (read.address, read.fingerprint) == (invitation.address, invitation.fingerprint)
    assert certificates.from_pem(read.site_certificate) == own
    with pytest.raises(ConfigError, match="certificate"):
        Invitation.from_text(invitation.model_copy(update={"site_certificate": ""}).to_text())


@pytest.mark.parametrize(
    "text", ["", "a: [", "address: x:1", "address: x:1\ncertificate: no", "address: x\ncertificate: y"]
)
def test_text_that_is_no_invitation_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="Expected"):
        Invitation.from_text(text)
