"""Fuzzes ``site.yaml``."""

from __future__ import annotations

import os
from pathlib import Path

from client.site import read_settings
from client.skeleton import settings_text
from common.errors import ConfigError

SEEDS = [
    settings_text(name="north", nominal_patients=20).encode(),
    b"name: north\nrole: training\n",
    b"a: &a [1, *a]\n",
    b"!!python/object/apply:os.system ['true']\n",
]
PLACE = Path(os.environ.get("TMPDIR", "/tmp")) / f"feverfew-fuzz-{os.getpid()}.yaml"


def parse(data: bytes) -> None:
    """Reads bytes as the settings of a site."""
    PLACE.write_bytes(data)
    try:
        read_settings(PLACE)
    except ConfigError:
        return
