"""Cryptographic randomness for noise, sampling and augmentation.

A stream is a numpy ``Generator`` over the ChaCha20 bit generator with a 256-bit key. In secure mode the
key comes from the operating system, once per task; in seeded mode, for simulation and tests, the same
code runs with a key derived from public values, and the epsilon of such a run is not valid.
torch's generators are never used: their seeds are cut to 32 bits.

Source: Bernstein, "ChaCha, a variant of Salsa20" (2008), by way of the package randomgen.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

from numpy.random import Generator
from randomgen import ChaCha


@dataclass(frozen=True, kw_only=True)
class Key:
    """256 bits that decide every random choice of one task."""

    secret: bytes

    def stream(self, purpose: str) -> Generator:
        """Returns the independent stream of one purpose, such as ``"sampling"``."""
        return Generator(ChaCha(key=int.from_bytes(self.derived(purpose), "big"), rounds=20))

    def derived(self, purpose: str) -> bytes:
        """Returns the independent key of one purpose, 32 bytes."""
        return hashlib.sha256(self.secret + b"/" + purpose.encode()).digest()


def secure_key() -> Key:
    """Returns a fresh key from the operating system."""
    return Key(secret=os.urandom(32))


def seeded_key(*, seed: int, plan_hash: str, server_round: int, site: str) -> Key:
    """Returns the key that (seed, plan, round, site) name. For simulation and tests only."""
    text = f"feverfew seeded noise/{seed}/{plan_hash}/{server_round}/{site}"
    return Key(secret=hashlib.sha256(text.encode()).digest())
