"""How the updates of a round become one: what a plan says about it, and how many updates that needs.

``least_updates`` is the condition under which the published rule holds, by which ``quorum`` is judged.
"""

from __future__ import annotations

from math import ceil
from typing import Annotated, Literal

from pydantic import Field

from common.value import Positive, Value

NumHostile = Annotated[int, Field(ge=1, le=10_000)]


class Aggregation(Value):
    """What every rule has.

    ``update_bound``: an update with a larger element is rejected; so is one with a larger Euclidean norm than
    ``max_update_norm``, or than an honest site can have (``server/norm.py``).
    """

    weights: Literal["equal", "nominal", "examples"]
    server_learning_rate: Positive
    server_momentum: Annotated[float, Field(ge=0, lt=1)]
    update_bound: Annotated[float, Field(gt=0, le=1024)]
    max_update_norm: Positive | None

    @property
    def least_updates(self) -> int:
        """The least number of updates with which the rule does what it promises."""
        return 1

    @property
    def condition(self) -> str:
        """Why it is that number."""
        return ""


class FedAvg(Aggregation):
    """Federated averaging (McMahan et al. 2017) of updates with public weights."""

    name: Literal["fedavg"]


class Krum(Aggregation):
    """The one update that is nearest to its neighbours.

    Source: Blanchard et al. (2017), Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent.
    """

    name: Literal["krum"]
    weights: Literal["equal"]
    num_malicious_nodes: NumHostile

    @property
    def least_updates(self) -> int:
        return 2 * self.num_malicious_nodes + 3

    @property
    def condition(self) -> str:
        return f"n >= 2f + 3 with num_malicious_nodes={self.num_malicious_nodes}"


class MultiKrum(Aggregation):
    """The weighted mean of the updates that are nearest to their neighbours (Blanchard et al. 2017)."""

    name: Literal["multikrum"]
    num_malicious_nodes: NumHostile
    num_nodes_to_select: Annotated[int, Field(ge=2, le=100_000)]

    @property
    def least_updates(self) -> int:
        hostile = self.num_malicious_nodes
        return max(2 * hostile + 3, self.num_nodes_to_select + hostile + 2)

    @property
    def condition(self) -> str:
        return (
            f"n >= 2f + 3 and n >= m + f + 2 with num_malicious_nodes={self.num_malicious_nodes} and "
            f"num_nodes_to_select={self.num_nodes_to_select}"
        )


class FedTrimmedAvg(Aggregation):
    """For each parameter the mean without the largest and the smallest values.

    ``beta``: the fraction that is left out at either end.

    Source: Yin et al. (2018), Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates.
    """

    name: Literal["fedtrimmedavg"]
    weights: Literal["equal"]
    beta: Annotated[float, Field(gt=0, lt=0.5)]

    @property
    def least_updates(self) -> int:
        least = ceil(1 / self.beta)
        return least if int(self.beta * least) else least + 1  # rounding

    @property
    def condition(self) -> str:
        return f"one value is left out at either end if n >= 1 / beta, with beta={self.beta:g}"


class FedMedian(Aggregation):
    """For each parameter the median (Yin et al. 2018)."""

    name: Literal["fedmedian"]
    weights: Literal["equal"]

    @property
    def least_updates(self) -> int:
        return 3

    @property
    def condition(self) -> str:
        return "the median of fewer than 3 updates is their mean"


class Bulyan(Aggregation):
    """For each parameter the mean of the values about the median of what Krum selects.

    Source: El Mhamdi et al. (2018), The Hidden Vulnerability of Distributed Learning in Byzantium.
    """

    name: Literal["bulyan"]
    weights: Literal["equal"]
    num_malicious_nodes: NumHostile

    @property
    def least_updates(self) -> int:
        return 4 * self.num_malicious_nodes + 3

    @property
    def condition(self) -> str:
        return f"n >= 4f + 3 with num_malicious_nodes={self.num_malicious_nodes}"


Strategy = Annotated[
    FedAvg | Krum | MultiKrum | FedTrimmedAvg | FedMedian | Bulyan, Field(discriminator="name")
]
