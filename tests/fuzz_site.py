"""Fuzzes ``site.yaml``."""

from __future__ import annotations

from client.site import read_settings
from client.skeleton import settings_text
from common.errors import ConfigError
from tests.fuzz import PLACE

SEEDS = [
    settings_text(name="north", nominal_patients=20).encode(),
    b"name: north\nrole: training\n",
    b"a: &a [1, *a]\n",
    b"!!python/object/apply:os.system ['true']\n",
    b"[" * 60_000,
    b"name: 2001-99-99\n",
    b"name: 0x" + b"f" * 5000,
    b"name: !!timestamp 9",
    b"name: !!int ''",
    b"name: !!bool x",
]
FILE = PLACE / "site.yaml"


def parse(data: bytes) -> None:
    """Reads bytes as the settings of a site."""
    FILE.write_bytes(data)
    try:
        read_settings(FILE)
    except ConfigError:
        return
