"""What a simulation is told beside the plan: where sites come from, and how they are run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from common.errors import ConfigError
from common.trail import FILE
from common.value import Value, first_problem
from simulations.hospitals import DirectorySource, ListedSource, MedMnistSource, PhantomSource, Source
from simulations.phantom import CLASS_NAMES
from simulations.trials import InversionTrial, MembershipTrial

_SOURCES: dict[str, type[Source]] = {
    "phantoms": PhantomSource,
    "medmnist": MedMnistSource,
    "listed": ListedSource,
    "directory": DirectorySource,
}


class Engine(Value):
    """What carries the messages, and how many processes train."""

    name: Literal["local", "flower"]
    workers: Annotated[int, Field(ge=1, le=1024)] | None


class Experiment(Value):
    """What the run directory is named after."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")]


class Attack(Value):
    """How much the attacks are to find out: what ``conf/attack/default.yaml`` holds.

    ``false_alarm_prob`` is that of each statistical test of the mechanism; ``confidence`` is that of each
    lower bound of epsilon. ``membership`` and ``inversion``: None to leave that attack out.
    """

    num_canaries: Annotated[int, Field(ge=100, le=100_000)]
    num_guesses: Annotated[int, Field(ge=2, multiple_of=2)]
    confidence: Annotated[float, Field(gt=0.5, lt=1)]
    false_alarm_prob: Annotated[float, Field(gt=0, lt=0.1)]
    membership: MembershipTrial | None
    inversion: InversionTrial | None

    @model_validator(mode="after")
    def _guesses_are_about_canaries(self) -> Self:
        if self.num_guesses > self.num_canaries:
            raise ValueError(
                f"expected num_guesses <= num_canaries, found {self.num_guesses} > {self.num_canaries}"
            )
        return self


class Settings(Value):
    """How a plan is simulated: what ``conf/simulation.yaml`` holds beside the plan and the data."""

    engine: Engine
    experiment: Experiment
    sites_directory: Annotated[str, Field(min_length=1)]
    state: Literal["empty", "keep"]
    resume: bool
    attack: Attack | None


def settings_of(tree: Mapping[str, Any]) -> Settings:
    """Returns the settings of a composed config.

    Raises:
        ConfigError: unknown key, wrong type, value out of range; an attack on a promise that is not made.
    """
    known = {name: tree.get(name) for name in Settings.model_fields}  # attack is in few experiments
    if known["attack"] is not None and tree["privacy"]["mechanism"] == "none":
        raise ConfigError("Expected privacy=dp_sgd with experiment=attack, found privacy=none; leave it out.")
    try:
        return Settings.model_validate(known)
    except ValidationError as error:
        raise ConfigError(first_problem(error)) from None


def source_of(data: Mapping[str, Any]) -> Source:
    """Returns where the sites come from: the keys of ``conf/data/*.yaml`` but ``source`` and ``classes``.

    Raises:
        ConfigError: unknown source or key, wrong type.
    """
    kind = str(data["source"])
    if kind not in _SOURCES:
        raise ConfigError(f"data.source: expected one of {', '.join(_SOURCES)}, found {kind!r}.")
    if kind == "phantoms" and tuple(data["classes"]) != CLASS_NAMES:
        raise ConfigError(
            f"data.classes: expected {list(CLASS_NAMES)} for phantoms, found {data['classes']}."
        )
    values = {key: value for key, value in data.items() if key not in ("source", "classes")}
    names = {field.name for field in fields(_SOURCES[kind])}
    if "class_names" in names:
        values["class_names"] = tuple(data["classes"])
    unknown = sorted(set(values) - names)
    if unknown:
        raise ConfigError(f"Unknown key 'data.{unknown[0]}'; see conf/data/ for the keys that exist.")
    try:
        source: Source = TypeAdapter(_SOURCES[kind]).validate_python(values)
    except ValidationError as error:
        raise ConfigError(f"data.{first_problem(error)}") from None
    return source


def num_sites(source: Source) -> int:
    """Returns the number of sites of a source."""
    return len(source.sites()) if isinstance(source, DirectorySource) else len(source.names())


def require_resumable(settings: Settings, *, directory: Path) -> None:
    """Checks that the folder of the run has one where it is to go on, and none where it is to begin.

    Raises:
        ConfigError: it is the other way round.
    """
    if not settings.resume and (directory / FILE).exists():
        raise ConfigError(
            f"Expected a folder without a run, found one in {directory}; go on with it by resume=true, or "
            "name another with hydra.run.dir=..."
        )
    if settings.resume and not (directory / FILE).exists():
        raise ConfigError(
            f"Expected a run to resume in {directory}, found none; name its folder with hydra.run.dir=..."
        )


def require_own_state(settings: Settings, source: Source) -> None:
    """Checks that no state is deleted that a simulation did not make: a ledger may be in it.

    Raises:
        ConfigError: directories of somebody else with ``state=empty``.
    """
    if isinstance(source, DirectorySource) and settings.state == "empty":
        raise ConfigError(
            f"Expected state=keep for the sites in {source.directory}, found state=empty, which deletes "
            "their ledgers; set state=keep, on copies of the directories if they are real."
        )
