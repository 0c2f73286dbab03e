"""SiteSettings: what the hospital decides. Its limits win over any plan."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from client.case import PatientIs
from client.listing import Listing
from client.pacs_settings import Pacs
from client.policies import Policy
from client.proxy import Setting as ProxySetting
from client.rest import Hours
from client.rules import Fraction, Rules
from common.errors import ConfigError, DataError
from common.settings import current, tree_of
from common.value import Positive, Value, first_problem


class Split(Value):
    """Fractions of the patients in each part; permanent from the first use on."""

    train: Fraction
    validation: Fraction
    test: Fraction

    @model_validator(mode="after")
    def _sums_to_one(self) -> Self:
        total = self.train + self.validation + self.test
        if abs(total - 1) > 1e-9:
            raise ValueError(f"expected fractions that sum to 1, found {total}")
        return self

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that have patients, in fixed order."""
        return tuple(name for name in ("train", "validation", "test") if getattr(self, name) > 0)


class StudyBudget(Value):
    """A limit of its own for one study, by the name that its plans give it."""

    study: Annotated[str, Field(min_length=1, max_length=80)]
    max_epsilon: Annotated[float, Field(ge=0, le=1e6)]


class SiteSettings(Value):
    """The hospital's own settings, read from ``site.yaml``; every key is explained there."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")]
    role: Literal["training", "evaluation"]
    data: Literal["private", "public"]
    nominal_patients: Annotated[int, Field(ge=1, le=10_000_000)]
    nominal_cases_per_patient: Annotated[float, Field(ge=1, le=10_000)]
    cases: Listing
    pacs: Pacs | None
    patient_is: PatientIs
    split: Split
    rules: Rules
    max_epsilon: Annotated[float, Field(ge=0, le=1e6)]
    delta: Annotated[float, Field(gt=0, lt=0.1)]
    study_budgets: tuple[StudyBudget, ...]
    unsafe_allow_seeded_noise: bool
    unsafe_allow_no_privacy: bool
    policies: tuple[Policy, ...]
    max_repeats: Annotated[int, Field(ge=0, le=100)]
    threads: Annotated[int, Field(ge=1, le=256)]
    max_memory_gigabytes: Positive | None
    hours: Hours | None
    monitor_port: Annotated[int, Field(ge=1, le=65535)] | None
    proxy: ProxySetting
    max_cache_gigabytes: Positive

    @model_validator(mode="before")
    @classmethod
    def _proxy_is_no_text(cls, tree: object) -> object:
        # Here and not at the field, whose message would repeat the text, which may hold a password.
        proxy = tree.get("proxy") if isinstance(tree, dict) else None
        if isinstance(proxy, str) and proxy != "environment":
            raise ValueError("expected proxy to be environment, null, or url and more, found another text")
        return tree

    @model_validator(mode="after")
    def _a_study_has_one_budget(self) -> Self:
        names = [budget.study for budget in self.study_budgets]
        if len(set(names)) < len(names):
            raise ValueError(f"expected each study once in study_budgets, found {names}")
        return self

    @model_validator(mode="after")
    def _a_policy_has_a_name_of_its_own(self) -> Self:
        names = [policy.name for policy in self.policies]
        if len(set(names)) < len(names):
            raise ValueError(f"expected each name once in policies, found {names}")
        return self

    @model_validator(mode="after")
    def _public_data_is_for_evaluation(self) -> Self:
        if self.data == "public" and self.role != "evaluation":
            raise ValueError("data: public goes with role: evaluation only")
        return self


@dataclass(frozen=True, kw_only=True)
class Site:
    """One hospital: a directory and its settings. ``records``: where its records are; None for the directory
    itself."""

    directory: Path
    settings: SiteSettings
    records: Path | None = None

    def __hash__(self) -> int:
        return hash(self.directory)  # what is cached of a site is asked for a dozen times a task

    @property
    def name(self) -> str:
        return self.settings.name

    @cached_property
    def state(self) -> Path:
        """Ledger, replies, models and events."""
        return (self.records or self.directory) / "state"

    @cached_property
    def runs(self) -> Path:
        """For each run the cases that it used."""
        return (self.records or self.private) / "runs"

    @cached_property
    def approvals(self) -> Path:
        """What was decided about plans."""
        return (self.records or self.private) / "approvals"

    @cached_property
    def private(self) -> Path:
        """Keys and everything that names a case; mode 0700; never leaves."""
        return self.directory / "private"

    @cached_property
    def cache(self) -> Path:
        """Preprocessed cases; can be deleted at any time."""
        return self.directory / "cache"


def site_directory(node_config: Mapping[str, object]) -> Path:
    """Returns the site directory of a ClientApp's node: named by the agent, or, in Flower's own simulation
    runtime, the ``partition-id``-th line of the environment variable ``FEVERFEW_SITES``."""
    if "site" in node_config:
        return Path(str(node_config["site"]))
    return Path(os.environ["FEVERFEW_SITES"].splitlines()[int(str(node_config["partition-id"]))])


def waits_for_disk(node_config: Mapping[str, object]) -> bool:
    """Says whether what a node writes waits for the disk: always, but in a simulation that begins anew."""
    if "site" in node_config:
        return bool(node_config.get("durable", True))
    return os.environ.get("FEVERFEW_DURABLE") != "no"


def open_site(directory: Path) -> Site:
    """Reads ``site.yaml`` of a site directory.

    Raises:
        DataError: no such directory or no ``site.yaml``.
        ConfigError: a key of ``site.yaml`` is unknown, missing or wrong.
    """
    path = directory / "site.yaml"
    if not path.is_file():
        raise DataError(
            f"Expected a site directory with site.yaml, found none at {directory}; "
            "make one with feverfew-client init."
        )
    return Site(directory=directory, settings=read_settings(path))


def read_settings(path: Path) -> SiteSettings:
    """Reads and validates ``site.yaml``.

    Raises:
        SchemaError: written for another version.
        ConfigError: not YAML, or a key is unknown, missing or wrong.
    """
    return _read_settings(path, path.read_bytes())


@lru_cache(maxsize=1024)  # every task reads the file, so that a change holds from the next on
def _read_settings(path: Path, content: bytes) -> SiteSettings:
    try:
        tree = current(tree_of(content), template="client.yaml", name="", nominal_patients=1)
        return _sharing(SiteSettings.model_validate(tree))
    except ConfigError as error:
        raise type(error)(f"{path}: {error}") from None
    except ValidationError as error:
        raise ConfigError(f"{path}: {first_problem(error)}") from None


def _sharing(settings: SiteSettings) -> SiteSettings:
    """Returns settings whose values are those of settings read before, where they are equal: a thousand
    simulated sites say the same, in memory once."""
    values = {name: _first(value) for name, value in settings if isinstance(value, Value)}
    return settings.model_copy(update=values)


@lru_cache(maxsize=256)
def _first(value: Value) -> Value:
    """Returns the first of equal values."""
    return value
