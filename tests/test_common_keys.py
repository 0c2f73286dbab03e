from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from common import keys
from common.errors import UserError


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


def test_fingerprints_tell_keys_apart_and_stay_the_same() -> None:
    first, second = keys.generate().public_key(), keys.generate().public_key()
    assert keys.fingerprint(first) == keys.pem_fingerprint(keys.public_pem(first))
    assert keys.fingerprint(first) != keys.fingerprint(second)
