"""The permanent split of a site by patient, keyed by the site's secret."""

from __future__ import annotations

import bisect
import hashlib
import hmac
import itertools
from collections.abc import Iterable, Iterator
from functools import lru_cache

from client.site import Site, Split
from common import keys
from common.errors import DataError

KEY_BYTES = 32


def read_key(site: Site) -> bytes:
    """Returns the 32 bytes of ``private/split.key``, which decides for ever who is in which part.

    Raises:
        DataError: the file does not hold 64 hexadecimal digits.
        UserError: there is none, or others than its owner can read it.
    """
    path = site.private / "split.key"
    try:
        secret = bytes.fromhex(keys.read_secret(path).decode("ascii"))
    except ValueError:
        secret = b""
    if len(secret) != KEY_BYTES:
        raise DataError(f"Expected {2 * KEY_BYTES} hexadecimal digits in {path}; restore it from a backup.")
    return secret


def pseudonym(text: str, *, secret: bytes) -> bytes:
    """Returns HMAC-SHA256 of a text under the site's secret, 32 bytes."""
    return hmac.digest(secret, text.encode(), hashlib.sha256)


def part_of(patient: bytes, *, split: Split) -> str:
    """Returns the part of a patient, given the patient's pseudonym.

    The first 53 bits are a number in [0, 1), compared with the cumulated fractions; so a patient's part
    depends on nobody else, and patients in the order of their pseudonyms are in the order of the parts.

    >>> part_of(bytes(32), split=Split(train=0.7, validation=0.1, test=0.2))
    'train'
    """
    return next(parts_of([patient], split=split))


def parts_of(patients: Iterable[bytes], *, split: Split) -> Iterator[str]:
    """Yields the part of each patient; see ``part_of``."""
    names, ends = _ends(split)  # once, since to look it up takes longer than to find a part
    for patient in patients:
        position = (int.from_bytes(patient[:8], "big") >> 11) / 2**53
        yield names[bisect.bisect_right(ends, position)]


@lru_cache(maxsize=64)
def _ends(split: Split) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Returns the parts, and where each but the last, which has the rest, ends."""
    fractions = [getattr(split, name) for name in split.parts[:-1]]
    return split.parts, tuple(itertools.accumulate(fractions))
