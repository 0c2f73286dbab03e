"""Aggregation through Flower's Strategy interface; replies arrive validated, one at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from common import exchange, received
from common.arrays import packed, unpacked
from common.model import FlatArray
from common.strategy import Aggregation

_LARGEST_TOTAL_WEIGHT_BITS = 28  # 268 million patients over all sites
_PIECE = 1 << 18  # values at a time: what their sums need besides stays in the processor's cache


class FixedPointSum:
    """A weighted sum of arrays whose bits do not depend on the order of addition.

    Values are scaled to integers and added in int64, which is associative; float addition is not.

    Args:
        size: length of the arrays.
        bound: largest magnitude of a value; larger ones are clipped to it.
    """

    def __init__(self, size: int, *, bound: float) -> None:
        self._bound = bound
        self._scale = 2.0 ** (62 - _LARGEST_TOTAL_WEIGHT_BITS - math.ceil(math.log2(bound)))
        self._sum = np.zeros(size, dtype=np.int64)
        self._weight = 0

    def add(self, values: FlatArray, *, weight: int) -> None:
        """Adds ``weight * values``; values: float32, (size,), finite.

        Raises:
            OverflowError: the weights add up to more than 2^28.
        """
        if self._weight + weight >= 2**_LARGEST_TOTAL_WEIGHT_BITS:
            raise OverflowError("expected weights that sum to less than 2^28")
        for start in range(0, len(values), _PIECE):
            part = slice(start, start + _PIECE)
            clipped = np.clip(values[part].astype(np.float64), -self._bound, self._bound)
            self._sum[part] += np.rint(clipped * self._scale).astype(np.int64) * weight
        self._weight += weight

    def mean(self) -> FlatArray:
        """Returns the weighted mean, float32, (size,); of nothing it is zero."""
        found = np.empty(len(self._sum), dtype=np.float32)
        np.divide(self._sum, self._scale * max(self._weight, 1), out=found, casting="same_kind")
        return found


def descended(
    parameters: FlatArray, velocity: FlatArray | None, update: FlatArray, *, asked: Aggregation
) -> tuple[FlatArray, FlatArray | None]:
    """Returns the model after a round's update, and the velocity, which the next round goes on from.

    Without momentum there is no velocity. All arrays: float32, (num_parameters,).

    Source: Hsu et al. (2019), Measuring the Effects of Non-Identical Data Distribution (FedAvgM).
    """
    if not asked.server_momentum:
        velocity = None
    elif velocity is None:
        velocity = update
    else:
        velocity = np.float32(asked.server_momentum) * velocity + update
    step = update if velocity is None else velocity
    return (parameters + step * asked.server_learning_rate).astype(np.float32), velocity


class FedAvg(Strategy):  # type: ignore[misc]
    """Federated averaging of updates, streaming: memory does not grow with the number of sites.

    Source: McMahan et al. (2017), Communication-Efficient Learning of Deep Networks from
    Decentralized Data.

    Args:
        nodes: returns the node ids to ask, by purpose ("train", or the part to evaluate).
        bound: ``plan.strategy.update_bound``.
        ttl_seconds: how long a task and its reply stay valid.
    """

    def __init__(self, *, nodes: Callable[[str], Sequence[int]], bound: float, ttl_seconds: float) -> None:
        self._nodes = nodes
        self._bound = bound
        self._ttl_seconds = ttl_seconds

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Returns one message for each training site; all share one record, so it is encoded once."""
        record = RecordDict({"task": config, "arrays": arrays})
        return self._messages(record, exchange.TRAIN, "train", server_round)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Returns one message for each site that has the part that ``config`` names."""
        record = RecordDict({"task": config, "arrays": arrays})
        return self._messages(record, exchange.EVALUATE, str(config["part"]), server_round)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Returns the mean update and the mean train loss over validated replies; None of none."""
        total: FixedPointSum | None = None
        loss_sum = loss_weight = 0.0
        for reply in replies:
            values = unpacked(received.part(reply.content, "arrays", ArrayRecord)["update"])
            metrics = received.part(reply.content, "metrics", MetricRecord)
            weight = int(float(str(metrics["weight"])))
            total = total or FixedPointSum(len(values), bound=self._bound)
            total.add(values, weight=weight)
            if "train-loss" in metrics:
                loss_sum += weight * float(str(metrics["train-loss"]))
                loss_weight += weight
            del reply, values
        if total is None:
            return None, None
        metrics_out = MetricRecord({"train-loss": loss_sum / loss_weight} if loss_weight else {})
        return ArrayRecord({"update": packed(total.mean())}), metrics_out

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing to do: score statistics are merged, not averaged (``server/rounds.py``)."""
        return None

    def summary(self) -> None:
        """Nothing to log: the plan says it all."""

    def _messages(
        self, record: RecordDict, message_type: str, purpose: str, server_round: int
    ) -> list[Message]:
        return [
            Message(
                record,
                dst_node_id=node,
                message_type=message_type,
                ttl=self._ttl_seconds,
                group_id=str(server_round),
            )
            for node in self._nodes(purpose)
        ]
