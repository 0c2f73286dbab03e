"""Which sites were revoked, told by the files of their certificates: the process that carries a run needs no
more of the coordinator's directory to say so in its report."""

from __future__ import annotations

from pathlib import Path
from typing import Final

REVOKED: Final = "revoked"
"""The status of a site that is let in no more, and the code of a task that it did not answer."""


def revoked_sites(certificates: Path) -> frozenset[str]:
    """Returns the names of the sites that were revoked and have not been enrolled again.

    certificates: where they lie, ``NAME.NUMBER.crt``, or ``NAME.NUMBER.revoked``; there may be none.
    """
    return _names(certificates, "revoked") - _names(certificates, "crt")


def _names(directory: Path, ending: str) -> frozenset[str]:
    return frozenset(path.name.partition(".")[0] for path in directory.glob(f"*.{ending}"))
