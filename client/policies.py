"""Rules by which a hospital approves and refuses plans without a person: ``policies`` in ``site.yaml``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Final, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from common.asked import Target
from common.plan import Model, Plan
from common.value import Name, Value

MODELS: Final = frozenset(
    get_args(kind.model_fields["name"].annotation)[0] for kind in get_args(get_args(Model)[0])
)

Some = Annotated[tuple[Name, ...], Field(min_length=1)]
Epsilon = Annotated[float, Field(ge=0, le=1e6)]
Rounds = Annotated[int, Field(ge=0, le=100_000)]


class Conditions(Value):
    """What a plan must be for a rule to hold; a condition that is left out holds for every plan.

    ``clinical`` holds for a plan that asks for no other clinical values than these. The conditions on
    epsilon are about what one run costs here; it is infinite where nothing bounds it.
    """

    studies: Some | None = None
    models: Some | None = None
    targets: Annotated[tuple[Target, ...], Field(min_length=1)] | None = None
    clinical: tuple[Name, ...] | None = None
    max_rounds: Rounds | None = None
    above_rounds: Rounds | None = None
    max_epsilon: Epsilon | None = None
    above_epsilon: Epsilon | None = None

    @field_validator("models")
    @classmethod
    def _models_exist(cls, models: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if unknown := set(models or ()) - MODELS:
            raise ValueError(f"expected models of {sorted(MODELS)}, found {sorted(unknown)}")
        return models

    @model_validator(mode="after")
    def _can_hold(self) -> Self:
        for name in ("rounds", "epsilon"):
            most, least = getattr(self, f"max_{name}"), getattr(self, f"above_{name}")
            if most is not None and least is not None and least >= most:
                raise ValueError(
                    f"expected above_{name} < max_{name}, found {least} and {most}: it never holds"
                )
        return self

    def hold(self, plan: Plan, *, epsilon: Callable[[], float]) -> bool:
        """Says whether all conditions hold for a plan; ``epsilon`` is asked only if one is about it."""
        return all(
            (
                self.studies is None or plan.study in self.studies,
                self.models is None or plan.model.name in self.models,
                self.targets is None or plan.target in self.targets,
                self.clinical is None or {value.name for value in plan.clinical} <= set(self.clinical),
                _is_within(float(plan.rounds), self.max_rounds, self.above_rounds),
            )
        ) and (
            (self.max_epsilon is None and self.above_epsilon is None)
            or _is_within(epsilon(), self.max_epsilon, self.above_epsilon)
        )


class Policy(Value):
    """One rule: what it decides, and for which plans."""

    name: Annotated[str, Field(min_length=1, max_length=80)]
    decision: Literal["approve", "refuse"]
    when: Conditions


EVERY_PLAN: Final = Policy(name="every plan", decision="approve", when=Conditions())


def first(
    policies: Sequence[Policy],
    decision: Literal["approve", "refuse"],
    plan: Plan,
    *,
    epsilon: Callable[[], float],
) -> Policy | None:
    """Returns the first rule of a kind that holds for a plan."""
    chosen = (policy for policy in policies if policy.decision == decision)
    return next((policy for policy in chosen if policy.when.hold(plan, epsilon=epsilon)), None)


def _is_within(value: float, most: float | None, above: float | None) -> bool:
    return (most is None or value <= most) and (above is None or value > above)
