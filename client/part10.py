"""The first bytes of a DICOM file, which say which instance it is. Nothing about a patient stands there."""

from __future__ import annotations

import struct
from typing import Final

HEAD_BYTES: Final = 65536
_PREAMBLE: Final = 128
_LONG: Final = (b"OB", b"UN", b"OW", b"UT")  # value representations whose length has four bytes


def instance_of(head: bytes) -> str:
    """Returns the UID of the instance that a DICOM file says it is; "" if it is none, or does not say.

    >>> instance_of(b"GIF89a")
    ''

    Args:
        head: the first bytes of the file; its own group 2 is always explicit, little endian.
    """
    if head[_PREAMBLE : _PREAMBLE + 4] != b"DICM":
        return ""
    at = _PREAMBLE + 4
    while at + 8 <= len(head):
        group, element, kind, length = struct.unpack_from("<HH2sH", head, at)
        at += 8
        if kind in _LONG:
            if at + 4 > len(head):
                return ""
            (length,) = struct.unpack_from("<I", head, at)
            at += 4
        if group != 2:
            return ""
        if element == 3:
            return head[at : at + length].rstrip(b"\0 ").decode("ascii", errors="replace")
        at += length
    return ""
