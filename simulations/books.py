"""The ledger of an audited site: the product's own, in a directory for one run only."""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path

from client.ledger import Charge, Ledger
from common import keys
from common.plan import DpSgd, Plan
from common.privacy import Epsilon, Spend
from simulations.implementation import Implementation


class Books:
    """Charges rounds to the ledger that the implementation names for each.

    ``spent``: what the ledger says after the last charge.
    """

    def __init__(self, directory: Path, *, plan: Plan, implementation: Implementation) -> None:
        assert isinstance(plan.privacy, DpSgd)
        self._directory, self._plan, self._book = directory, plan, implementation.book
        self._delta = plan.privacy.delta
        self._budget = plan.privacy.target_epsilon or math.inf
        self._key = keys.generate()
        self.spent = Epsilon(value=0.0, accountant="gaussian")

    def charge(self, spend: Spend, *, server_round: int) -> None:
        """Charges a round before it is trained."""
        path = self._directory / self._book(server_round)
        ledger = Ledger(
            path,
            head=path.with_suffix(".head"),
            key=self._key,
            max_epsilon=self._budget,
            delta=self._delta,
        )
        with closing(ledger):
            ledger.charge(self._row(spend, server_round), max_repeats=0)
            self.spent = ledger.spent()

    def _row(self, spend: Spend, server_round: int) -> Charge:
        return Charge(
            task=str(server_round),
            run="audit",
            plan_hash=self._plan.hash,
            study=self._plan.study,
            server_round=server_round,
            purpose="training",
            part="train",
            spend=spend,
            nominal_patients=self._plan.training.expected_batch,
        )
