"""What a DICOM header says of its image that the pixels do not need: modality, and text burned in.

Both are looked at when the cohort is checked or frozen, and become a count or a code; the header's words
are kept nowhere.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client import files
from common.errors import UnusableCase

HEAD_BYTES = 1024
MAGIC = b"DICM"  # after 128 bytes
DEFLATED = b"1.2.840.10008.1.2.1.99"


@dataclass(frozen=True, kw_only=True, slots=True)
class Declared:
    """``modality``: "" where the file is no DICOM, or says none."""

    modality: str = ""
    burned_in: bool = False


def declared(path: Path) -> Declared:
    """Reads two tags of a DICOM file, or of the first file of a series; nothing from any other file.

    A deflated file says nothing here: its header cannot be had without inflating it whole.
    """
    try:
        path = min(one for one in files.listed(path) if one.name[0] != ".") if path.is_dir() else path
        with path.open("rb") as stream:
            head = stream.read(HEAD_BYTES)
    except (OSError, ValueError, UnusableCase):
        return Declared()
    return _tags(path) if head[128:132] == MAGIC and DEFLATED not in head else Declared()


def _tags(path: Path) -> Declared:
    import pydicom  # heavy, and a site without DICOM does without

    logger = logging.getLogger("pydicom")
    level = logger.level
    try:
        logger.setLevel(logging.CRITICAL + 1)  # it quotes header values, and so do its warnings
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = pydicom.dcmread(
                path, stop_before_pixels=True, specific_tags=["Modality", "BurnedInAnnotation"]
            )
            burned_in = _word(header, "BurnedInAnnotation") == "YES"
            return Declared(modality=_word(header, "Modality"), burned_in=burned_in)
    except Exception:  # a parser raises anything on damaged bytes; whoever decodes the file says what it is
        return Declared()
    finally:
        logger.setLevel(level)


def _word(header: Any, keyword: str) -> str:
    return str(header.get(keyword) or "").strip().upper()
