"""What membership inference and gradient inversion are tried on; values of ``conf/attack``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from common.asked import Size
from common.errors import ConfigError
from common.plan import DpSgd, NoPrivacy, Plan
from common.value import NonNegative, Positive, Value
from simulations.phantom import CLASS_NAMES


class MembershipTrial(Value):
    """A small hospital and a training long enough to learn it by heart, done again and again.

    Each of ``num_models`` models is trained on every patient with probability one half, and attacked with the
    help of the others. ``wrong_label_fraction`` of the patients have the other label in the case table.
    """

    num_patients: Annotated[int, Field(ge=2, le=100_000)]
    num_models: Annotated[int, Field(ge=5, le=1024)]
    image_size: Size
    wrong_label_fraction: Annotated[float, Field(ge=0, le=0.5)]
    local_steps: Annotated[int, Field(ge=1, le=100_000)]
    expected_batch: Annotated[int, Field(ge=1, le=100_000)]
    learning_rate: Positive
    momentum: Annotated[float, Field(ge=0, lt=1)]


class InversionTrial(Value):
    """One image, one step, and how long somebody looks for the image in the update.

    ``num_patients``: what is recovered is compared with the images of so many. ``step``: of Adam, in grey
    values. ``smoothness``: weight of the total variation of the image that is looked for.
    """

    num_patients: Annotated[int, Field(ge=2, le=10_000)]
    image_size: Size
    iterations: Annotated[int, Field(ge=1, le=100_000)]
    step: Positive
    smoothness: NonNegative


def changed(plan: Plan, *, image_size: int, **training: float) -> Plan:
    """Returns a plan with the same model, privacy and seed for one round on phantoms of ``image_size``."""
    tree = plan.model_dump(mode="json") | {"rounds": 1, "classes": CLASS_NAMES}
    tree["preprocessing"] |= {"size": (image_size, image_size)}
    tree["training"] |= {"proximal_mu": 0.0, "augmentation": None, **training}
    tree["evaluation"] |= {"validation_every": 0}
    return Plan.from_tree(tree)


def delta_of(plan: Plan) -> float:
    """Returns the delta of a plan with privacy.

    Raises:
        ConfigError: it has none, so there is nothing to compare with.
    """
    if not isinstance(plan.privacy, DpSgd):
        raise ConfigError("Expected privacy=dp_sgd to attack, found privacy=none; leave it out.")
    return plan.privacy.delta


def without_privacy(plan: Plan) -> Plan:
    """Returns the same plan with ``privacy=none``."""
    evaluation = plan.evaluation.model_copy(update={"noise_multiplier": None})
    return plan.model_copy(update={"privacy": NoPrivacy(mechanism="none"), "evaluation": evaluation})
