"""A run that trains nothing: every site is asked once for its landmarks of intensity, and they are merged."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from flwr.app import Message

from common import exchange, landmarks
from common.calibration import landmark_noise_std
from common.errors import QuorumNotReached, RunError
from common.landmarks import Floats
from common.measure import ArrayKind
from common.plan import NoPrivacy, Plan
from common.steps import Step
from server.checkpoint import RoundRecord
from server.rounds import Rounds

OVERRIDE_NAME = "harmonised.txt"
"""In the run's directory: the preprocessing of the later plan, as one override."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was made of the histograms of all sites.

    Attributes:
        percentiles: of the step ``landmarks``, the lowest and the highest included.
        values: to which they are mapped.
        uncertainty: see ``common.landmarks.uncertainty``; 0 without noise.
        sites: how many sites sent histograms.
        steps: the preprocessing of the later plan.
    """

    percentiles: tuple[float, ...]
    values: tuple[float, ...]
    uncertainty: float
    sites: int
    steps: tuple[Step, ...]

    @property
    def override(self) -> str:
        """The steps as an override of ``feverfew-simulate`` and ``feverfew-server plan``."""
        return override(self.steps)


def override(steps: Sequence[Step]) -> str:
    """Returns the steps of preprocessing as one override.

    >>> from common.steps import Percentile, Resize
    >>> override([Percentile(name="percentile", lower=1, upper=99), Resize(name="resize")])
    'preprocessing.steps=[{name:percentile,lower:1.0,upper:99.0},{name:resize}]'
    """
    tree = [step.model_dump(mode="json") for step in steps]
    return "preprocessing.steps=" + json.dumps(tree, separators=(",", ":")).replace('"', "")


def found_of(plan: Plan, counts: Sequence[Floats], *, noise_std: float) -> Found:
    """Merges the histograms of sites.

    Args:
        noise_std: standard deviation of the noise in every count of their sum.

    Raises:
        RunError: the noise drowns them.
    """
    assert plan.landmarks is not None
    merged = np.sum(counts, axis=0)
    uncertain = landmarks.uncertainty(merged, noise_std=noise_std)
    if uncertain > landmarks.MOST_UNCERTAIN or not merged.sum() > 0:
        raise RunError(
            f"Expected medians that noise moves by at most {landmarks.MOST_UNCERTAIN:.0%} of the patients, "
            f"found {uncertain:.0%}; ask more sites, take fewer percentiles or bins, or raise "
            "privacy.target_epsilon. What was released stays charged."
        )
    values = landmarks.values(merged)
    steps = landmarks.harmonised(plan.preprocessing, asked=plan.landmarks, values=values)
    step = next(step for step in steps if step.name == "landmarks")
    return Found(
        percentiles=step.percentiles,
        values=step.values,
        uncertainty=uncertain,
        sites=len(counts),
        steps=steps,
    )


class LandmarkRound(Rounds):
    """The one round of a plan that asks for landmarks."""

    def find(self) -> Found:
        """Asks every training site once.

        Raises:
            QuorumNotReached: fewer sites than the plan's quorum sent histograms.
            RunError: the noise drowns them.
        """
        self._roster.gather()
        self._learn_sites()
        start = time.monotonic()
        messages = self._messages()
        self._trail.record("round_started", round=1, rounds=1, sites=len(messages))
        counts = self._histograms(messages)
        self._attendances.count_away(server_round=1)
        self._attendances.count_bytes()
        if len(counts) < self._plan.quorum:
            raise QuorumNotReached(
                f"Expected histograms of at least {self._plan.quorum} sites, found {len(counts)} of "
                f"{len(messages)} asked; {self._attendances.reasons()}."
            )
        # by name: the sum of noised counts depends on the order of addition
        names = sorted(counts)
        noise = math.hypot(*(self._noise_std(name) for name in names))
        found = found_of(self._plan, [counts[name] for name in names], noise_std=noise)
        record = RoundRecord(
            server_round=1,
            seconds=time.monotonic() - start,
            sites_asked=len(messages),
            sites_valid=len(counts),
            train_loss=None,
        )
        self._state = replace(self._state, server_round=1, rounds=(record,))
        self._trail.record("round_finished", round=1, rounds=1, sites_valid=len(counts))
        return found

    def _messages(self) -> list[Message]:
        record = exchange.task_record(self._task(1, "landmarks", ""))
        ttl = self._plan.reply_deadline_seconds + self._plan.grace_seconds
        return [
            Message(record, dst_node_id=node, message_type=exchange.LANDMARKS, ttl=ttl, group_id="1")
            for node in self._roster.nodes("train").values()
        ]

    def _histograms(self, messages: list[Message]) -> dict[str, Floats]:
        asked = self._plan.landmarks
        assert asked is not None
        expected = {"landmarks": ArrayKind(shape=(len(asked.percentiles), asked.bins), dtype="float64")}

        def read(name: str, reply: Message) -> Floats:
            scored = exchange.read_scored(reply.content, server_round=1, part="train", expected=expected)
            return scored.arrays["landmarks"]

        counts: dict[str, Floats] = {}
        for name, found in self._answers(messages, server_round=1, read=read):
            counts[name] = found
            self._attendances.note_update(name, server_round=1)
        return counts

    def _noise_std(self, name: str) -> float:
        if isinstance(self._plan.privacy, NoPrivacy):
            return 0.0
        nominal = self._roster.sites[name].nominal_patients
        return landmark_noise_std(self._plan, nominal_patients=nominal)
