"""A signed hash chain: every row names the hash of the row before, and each hash is signed.

The hash of the last row, the *head*, was computed over all rows, so its signature covers all of them: a
row that was edited, removed or reordered by somebody without the key is found. A tail that was cut is found
by whoever remembers a later head.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from common.keys import PrivateKey, PublicKey
from common.value import canonical_json

GENESIS = "0" * 64
_ALGORITHM = ec.ECDSA(hashes.SHA384())


@dataclass(frozen=True, kw_only=True)
class Head:
    """The last row of a chain at some time; ``number`` 0 and ``hash`` GENESIS before the first.

    hash: sha256, 64 hexadecimal digits. signature: ECDSA with P-384 and SHA-384, base64.
    """

    number: int
    hash: str
    signature: str

    def is_signed_by(self, key: PublicKey) -> bool:
        """Says whether the holder of a key has signed this head."""
        return is_signature(self.signature, key=key, text=_text(self.number, self.hash))


def link(previous_hash: str, row: Mapping[str, object]) -> str:
    """Returns the hash of a row: over its content and the hash of the row before.

    >>> link(GENESIS, {"a": 1}) == link(GENESIS, {"a": 2})
    False
    """
    return hashlib.sha256((previous_hash + canonical_json(dict(row))).encode()).hexdigest()


def signed(number: int, hash: str, *, key: PrivateKey) -> Head:
    """Returns a head with its signature."""
    return Head(number=number, hash=hash, signature=signature(_text(number, hash), key=key))


def signature(text: str, *, key: PrivateKey) -> str:
    """Returns the signature of a text, base64."""
    return base64.b64encode(key.sign(text.encode(), _ALGORITHM)).decode()


def is_signature(claimed: str, *, key: PublicKey, text: str) -> bool:
    """Says whether a signature is that of a text."""
    return _is_signature(claimed, key.public_numbers(), text)


@lru_cache(maxsize=64)  # what a site signed once is looked at in every round
def _is_signature(claimed: str, key: ec.EllipticCurvePublicNumbers, text: str) -> bool:
    try:
        key.public_key().verify(base64.b64decode(claimed, validate=True), text.encode(), _ALGORITHM)
    except (InvalidSignature, ValueError):
        return False
    return True


def _text(number: int, hash: str) -> str:
    return f"feverfew chain/{number}/{hash}"
