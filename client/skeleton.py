"""The directory of a new site: settings with an explanation of each, and keys that are made here."""

from __future__ import annotations

import re
import secrets
from importlib import resources
from pathlib import Path

from client.site import read_settings
from common import keys
from common.errors import ConfigError, UserError

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")
CASES = "image,label,patient_id\n"


def settings_text(*, name: str, nominal_patients: int | None) -> str:
    """Returns the text of a new ``site.yaml``, from ``conf/client.yaml``, which explains each key."""
    template = resources.files("conf").joinpath("client.yaml").read_text(encoding="utf-8")
    number = "" if nominal_patients is None else str(nominal_patients)
    return template.format(name=name, nominal_patients=number)


def complete(directory: Path, *, name: str, nominal_patients: int | None) -> list[Path]:
    """Makes whatever a site directory lacks; nothing that exists is changed. Returns what was made.

    Without ``nominal_patients`` the hospital fills in that line of ``site.yaml`` itself.

    Raises:
        UserError: the directory belongs to a site of another name.
        ConfigError: the name or the number is not usable; nothing was made.
    """
    _check_name(directory, name=name)
    private = directory / "private"
    made = [path for path in (directory, directory / "images", private) if not path.exists()]
    (directory / "images").mkdir(parents=True, exist_ok=True)
    private.mkdir(mode=0o700, exist_ok=True)
    texts = {
        directory / "site.yaml": settings_text(name=name, nominal_patients=nominal_patients),
        directory / "cases.csv": CASES,
    }
    for path, text in texts.items():
        if not path.exists():
            path.write_text(text, encoding="utf-8")
            made.append(path)
    return made + _make_keys(directory, name=name)


def _make_keys(directory: Path, *, name: str) -> list[Path]:
    from client import credential  # where keys are made: most commands need the text above alone

    private = directory / "private"
    made = []
    split_key, site_key = private / "split.key", private / "site.key"
    if not split_key.exists():
        keys.write_secret(split_key, secrets.token_hex(32).encode())
        made.append(split_key)
    if not site_key.exists():
        keys.write_private(site_key, keys.generate())
        made.append(site_key)
    made += credential.make_first(private)
    if not credential.request_file(directory, name=name).exists():
        made.append(credential.write_request(directory, credential.credentials(private)[-1], name=name))
    return made


def _check_name(directory: Path, *, name: str) -> None:
    path = directory / "site.yaml"
    if path.exists():
        known = read_settings(path).name
        if known != name:
            raise UserError(
                f"Expected the site {name} in {directory}, found {known}; choose another directory."
            )
    elif not NAME.fullmatch(name):
        raise ConfigError(f"Expected a name of a-z, 0-9 and '-' (40 at most), found {name!r}.")
