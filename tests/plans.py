"""Plans for tests, made from ``conf/`` as a coordinator's are."""

from __future__ import annotations

from functools import cache
from typing import Any

from common.asked import Asked
from common.config import GROUPS, compose_plan
from common.plan import Plan

TINY: dict[str, Any] = {
    "model__channels": (4,),
    "model__groups": 2,
    "model__pool_sizes": (2,),
    "preprocessing__size": (8, 8),
}
"""Changes that make a network of a few hundred parameters for images of 8 x 8 pixels."""


def plan(**changes: Any) -> Plan:
    """Returns the plan of ``conf/server.yaml`` for two sites with phantoms' classes, changed.

    A text for a group chooses its file: ``model="article_cnn"``, ``privacy="none"``. Anything else is set
    after composing: ``rounds=3``, ``classes=("a", "b", "c")``, and with two underscores for a dot,
    ``training__local_steps=1``.

    Raises:
        ConfigError: the plan refuses the changes.
    """
    choices = {name: value for name, value in changes.items() if name in GROUPS and isinstance(value, str)}
    tree = _composed(tuple(sorted(choices.items()))).model_dump(mode="json")
    for name, value in changes.items():
        if name not in choices:
            *path, key = name.split("__")
            place = tree
            for part in path:
                place = place[part]
            place[key] = value
    return Plan.from_tree(tree)


@cache
def _composed(choices: tuple[tuple[str, str], ...]) -> Plan:
    overrides = [f"{name}={value}" for name, value in choices]
    if ("model", "unet") in choices:
        overrides.append("plan.target=mask")
    if any(name == "strategy" for name, _ in choices):
        overrides += ["plan.sites=20", "plan.quorum=20"]  # enough for every rule; tests set their own
    return compose_plan(["plan.classes=[normal,opacity]", "plan.sites=2", *overrides])


def asked(
    *,
    target: str = "class",
    classes: tuple[str, ...] = ("normal", "opacity"),
    clinical: tuple[dict[str, Any], ...] = (),
    steps: tuple[dict[str, Any], ...] = (),
    **preprocessing: Any,
) -> Asked:
    """Returns what a plan asks of a case: grey, 8 x 8, all of the image's own range scaled to [0, 1]."""
    steps = steps or ({"name": "percentile", "lower": 0, "upper": 100}, {"name": "resize"})
    usual = {"inputs": ("image",), "channels": 1, "size": (8, 8), "precision": "uint8", "steps": steps}
    return Asked.model_validate(
        {"target": target, "classes": classes, "clinical": clinical, "preprocessing": usual | preprocessing}
    )
