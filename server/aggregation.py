"""Robust aggregation: Flower's own strategies, over validated updates as one array each.

Unlike ``server.strategy.FedAvg`` these rules compare updates with each other, so they hold all of a round in
memory, in float64, and some of them copies: up to 32 bytes for each parameter and site.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy

from common import received
from common.arrays import packed, unpacked
from common.plan import Plan
from common.strategy import Aggregation, Bulyan, FedMedian, FedTrimmedAvg, Krum, MultiKrum
from server.strategy import FedAvg

WEIGHT, LOSS = "weight", "train-loss"


def strategy_of(plan: Plan, *, nodes: Callable[[str], Sequence[int]]) -> Strategy:
    """Returns the strategy of a plan for the nodes of a roster, by purpose."""
    asked = plan.strategy
    ttl_seconds = plan.reply_deadline_seconds + plan.grace_seconds
    rule = rule_of(asked)
    if rule is None:
        return FedAvg(nodes=nodes, bound=asked.update_bound, ttl_seconds=ttl_seconds)
    return Robust(
        nodes=nodes,
        bound=asked.update_bound,
        ttl_seconds=ttl_seconds,
        rule=rule,
        least_updates=asked.least_updates,
    )


def rule_of(asked: Aggregation) -> Strategy | None:
    """Returns Flower's strategy that aggregates as a plan says; None for the mean, which needs none."""
    keys = {"weighted_by_key": WEIGHT, "train_metrics_aggr_fn": _median_loss}
    match asked:
        case Krum(num_malicious_nodes=hostile):
            return flower.Krum(num_malicious_nodes=hostile, **keys)
        case MultiKrum(num_malicious_nodes=hostile, num_nodes_to_select=selected):
            return flower.MultiKrum(num_malicious_nodes=hostile, num_nodes_to_select=selected, **keys)
        case FedTrimmedAvg(beta=beta):
            return flower.FedTrimmedAvg(beta=beta, **keys)
        case FedMedian():
            return flower.FedMedian(**keys)
        case Bulyan(num_malicious_nodes=hostile):
            return flower.Bulyan(num_malicious_nodes=hostile, selection_rule=selected_by_krum, **keys)
    return None


class Robust(FedAvg):
    """Aggregates by a rule of Flower's that bears hostile updates; asks as ``FedAvg`` does.

    Args:
        rule: one of ``flwr.serverapp.strategy``; only its ``aggregate_train`` is used.
        least_updates: with fewer of them the rule promises nothing, and there is no result.
    """

    def __init__(
        self,
        *,
        nodes: Callable[[str], Sequence[int]],
        bound: float,
        ttl_seconds: float,
        rule: Strategy,
        least_updates: int,
    ) -> None:
        super().__init__(nodes=nodes, bound=bound, ttl_seconds=ttl_seconds)
        self._rule = rule
        self._least_updates = least_updates

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Returns the aggregate of validated replies and the median of their train losses.

        The result depends on the updates and not on the order in which they arrived.
        """
        contents = sorted((_prepared(reply.content) for reply in replies), key=_bits)
        if len(contents) < self._least_updates:
            return None, None
        messages = [Message(content, dst_node_id=1, message_type="train") for content in contents]
        with _quiet():
            arrays, metrics = self._rule.aggregate_train(server_round, messages)
        if arrays is None or metrics is None:
            return None, None
        update = arrays["update"].numpy().astype(np.float32)
        return ArrayRecord({"update": packed(update)}), metrics


def selected_by_krum(
    contents: list[RecordDict], num_malicious_nodes: int, num_nodes_to_select: int
) -> list[RecordDict]:
    """Selects by Krum again and again among those that are left, as Bulyan is defined.

    Flower's own rule for Bulyan takes all of the selection from one round of scores.

    Source: El Mhamdi et al. (2018), The Hidden Vulnerability of Distributed Learning in Byzantium, section 4.
    """
    vectors = [_update(content).numpy() for content in contents]
    squares = np.array([[np.square(one - other).sum() for other in vectors] for one in vectors])
    left = list(range(len(contents)))
    selected: list[int] = []
    while len(selected) < num_nodes_to_select:
        num_near = max(1, len(left) - num_malicious_nodes - 2)
        scores = [np.sort(squares[one, left])[1 : num_near + 1].sum() for one in left]  # without itself
        selected.append(left.pop(int(np.argmin(scores))))
    return [contents[one] for one in selected]


def _prepared(content: RecordDict) -> RecordDict:
    """Keeps what is aggregated; in float64, since Flower's distances are differences of large numbers."""
    values = unpacked(_update(content)).astype(np.float64)
    said = received.part(content, "metrics", MetricRecord)
    metrics = {WEIGHT: float(str(said[WEIGHT])), LOSS: float(str(said.get(LOSS, "nan")))}
    return RecordDict(
        {"arrays": ArrayRecord({"update": Array(values)}), "metrics": MetricRecord(dict(metrics))}
    )


def _update(content: RecordDict) -> Array:
    found: Array = received.part(content, "arrays", ArrayRecord)["update"]
    return found


def _bits(content: RecordDict) -> tuple[bytes, str]:
    return _update(content).data, repr(received.part(content, "metrics", MetricRecord))


def _median_loss(contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
    """A mean is for one hostile site to choose."""
    losses = [float(str(received.part(content, "metrics", MetricRecord)[LOSS])) for content in contents]
    known = [loss for loss in losses if loss == loss]
    return MetricRecord({LOSS: float(np.median(known))} if known else {})


@contextmanager
def _quiet() -> Iterator[None]:
    """Flower's strategies tell the log of every aggregation; ours is told of by the trail."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
