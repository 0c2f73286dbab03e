"""The directory of a new site: settings with an explanation of each, and keys that are made here."""

from __future__ import annotations

import re
import secrets
from pathlib import Path

from client.site import read_settings
from common import keys
from common.errors import ConfigError, UserError

SETTINGS = """\
# The name under which the coordinator knows this hospital: a-z, 0-9 and '-', 40 characters at most.
name: {name}

# training: this site trains and evaluates. evaluation: it only evaluates finished models.
role: training

# private: everything that leaves is protected. public: open data; an evaluation site may then send exact
# metrics.
data: private

# The expected number of patients in the training part, as a round number. It is public: sampling rate, noise
# and charges follow from it, and never from the true number. Change it only with a new cohort.
nominal_patients: {nominal_patients}

# column: the column patient_id of cases.csv names the patient. case: every image is a patient of its own.
patient_is: column

# Fractions of the patients in each part. Permanent from the first use on: a patient never changes parts.
split: {{train: 0.7, validation: 0.1, test: 0.2}}

# The most privacy loss (epsilon at this delta) that all studies together may cost a patient. Work over it is
# refused.
max_epsilon: 3.0
delta: 1.0e-4

# Noise from a known seed protects nobody. For rehearsals with data that are not private.
unsafe_allow_seeded_noise: false

# A plan with privacy "none" sends exact updates and scores: no budget limits what they tell. Only for data
# that may be known.
unsafe_allow_no_privacy: false

# none: a person approves every plan with feverfew-client approve. all: every plan within the limits above is
# taken.
approve: none

# How often the same round with other parameters may be charged again, after the server lost its state.
max_repeats: 2

# Processor threads for training.
threads: 1
"""

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")
CASES = "image,label,patient_id\n"


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
    number = "" if nominal_patients is None else str(nominal_patients)
    texts = {
        directory / "site.yaml": SETTINGS.format(name=name, nominal_patients=number),
        directory / "cases.csv": CASES,
    }
    for path, text in texts.items():
        if not path.exists():
            path.write_text(text, encoding="utf-8")
            made.append(path)
    return made + _make_keys(private)


def _make_keys(private: Path) -> list[Path]:
    made = []
    split_key, site_key, public = private / "split.key", private / "site.key", private / "site.pub"
    if not split_key.exists():
        keys.write_secret(split_key, secrets.token_hex(32).encode())
        made.append(split_key)
    if not site_key.exists():
        keys.write_private(site_key, keys.generate())
        made.append(site_key)
    if not public.exists():
        public.write_text(keys.public_text(keys.read_private(site_key).public_key()), encoding="ascii")
        made.append(public)
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
