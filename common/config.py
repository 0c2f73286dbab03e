"""Hydra/OmegaConf -> Plan; the only reader of Hydra below the entry points."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from hydra import compose, initialize_config_module
from hydra.errors import ConfigCompositionException, HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from common.errors import ConfigError
from common.plan import SCHEMA_VERSION, Plan

T = TypeVar("T")

GROUPS = ("model", "preprocessing", "privacy", "training", "strategy", "exchange")


def plan_of(tree: Mapping[str, Any]) -> Plan:
    """Returns the plan of a composed config.

    Raises:
        ConfigError: unknown key, wrong type, value out of range.
    """
    for name in ("plan", *GROUPS):
        if name not in tree:
            raise ConfigError(f"Expected the group {name}, found none; leave out ~{name}.")
    parts = {name: tree[name] for name in GROUPS}
    return Plan.from_tree({"schema_version": SCHEMA_VERSION, **tree["plan"], **parts})


def compose_plan(overrides: list[str]) -> Plan:
    """Composes ``conf/server.yaml`` with overrides into a plan.

    Raises:
        ConfigError: what Hydra or the plan refuses.
    """

    def composed() -> Plan:
        with initialize_config_module("conf", version_base="1.3"):
            return plan_of(plain(compose("server", overrides=overrides)))

    return explained(composed)


def plain(config: DictConfig) -> dict[str, Any]:
    """Returns plain dictionaries, lists and scalars; interpolations resolved.

    Raises:
        ConfigError: a mandatory value is missing, an interpolation leads nowhere.
    """

    def resolved() -> dict[str, Any]:
        tree = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        assert isinstance(tree, dict)
        return {str(key): value for key, value in tree.items()}

    return explained(resolved)


def explained(action: Callable[[], T]) -> T:
    """Runs an action; what Hydra refuses becomes one clear line.

    Raises:
        ConfigError: with the first line of Hydra's own explanation.
    """
    try:
        return action()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_line(error)) from None


def _one_line(error: Exception) -> str:
    """Hydra chains a general and a special error over several lines; the special one says what is wrong."""
    if isinstance(error, MissingMandatoryValue):
        return f"Expected a value of {error.full_key}, found none; add {error.full_key}=..."
    parts = [f"In '{error.override}':"] if isinstance(error, OverrideParseException) else []
    parts.append(str(error))
    if isinstance(error, ConfigCompositionException) and error.__cause__:
        parts.append(str(error.__cause__))
    lines = [line.strip() for line in "\n".join(parts).splitlines()]
    told = [line for line in lines if line and not line.startswith(_NOT_TOLD)]
    return " ".join(dict.fromkeys(told))


_NOT_TOLD = ("full_key:", "object_type=", "Available")
