"""One audited run: real patients and canaries train over rounds; what leaves is held against the ledger."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.cohort import Part
from client.noise import Key, secure_key, seeded_key
from common import calibration, model
from common.calibration import Mechanism
from common.errors import ConfigError
from common.plan import DpSgd, Plan
from server.strategy import FixedPointSum, descended
from simulations import audit
from simulations.audit import Guesses
from simulations.books import Books
from simulations.canaries import Canaries, nobody, toss
from simulations.checks import Check, Silence, noise_scale, participation, sensitivity
from simulations.implementation import Implementation
from simulations.settings import Attack

AUDITED = "audited-site"

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What somebody who sees one kind of output could prove. ``lower_bound``: of epsilon."""

    seen: str
    guesses: Guesses
    lower_bound: float


@dataclass(frozen=True, kw_only=True)
class Audit:
    """The ledger's upper bound of epsilon, measured lower bounds, and tests of the mechanism."""

    ledger_epsilon: float
    accountant: str
    delta: float
    confidence: float
    noise_multiplier: float
    sample_rate: float
    steps: int
    num_patients: int
    num_sites: int
    findings: tuple[Finding, ...]
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Says whether nothing was found that contradicts the ledger."""
        bounded = all(finding.lower_bound <= self.ledger_epsilon for finding in self.findings)
        return bounded and all(check.passed for check in self.checks)


def run(
    plan: Plan,
    parts: Sequence[Part],
    *,
    attack: Attack,
    implementation: Implementation,
    on_round: Callable[[int, int], None] = lambda done, total: None,
) -> Audit:
    """Audits an implementation of training.

    Args:
        plan: with ``privacy=dp_sgd``.
        parts: the real patients of each site; canaries are added to those of the first.
        on_round: told (done, total) of the rounds.

    Raises:
        ConfigError: no privacy to audit, no gradients of single patients, or more canaries than parameters.
    """
    assert isinstance(plan.privacy, DpSgd)
    if plan.privacy.clipping == "ghost":
        raise ConfigError(
            "Expected gradients of single patients to put canaries in, found privacy.clipping=ghost, which "
            "has none; use privacy.clipping=auto."
        )
    chosen = calibration.mechanism(plan, nominal_patients=attack.num_canaries)
    tossed = _canaries(plan, parts[0], attack=attack, mechanism=chosen, implementation=implementation)
    whole = [tossed.joined(parts[0]), *parts[1:]]
    with tempfile.TemporaryDirectory(prefix="feverfew-audit-") as directory:
        books = Books(Path(directory), plan=plan, implementation=implementation)
        released, final = _train(
            plan,
            whole,
            canaries=tossed,
            mechanism=chosen,
            implementation=implementation,
            books=books,
            on_round=on_round,
        )
    cost = books.spent
    found = [("released updates", released), ("final model", final)]
    return Audit(
        ledger_epsilon=cost.value,
        accountant=cost.accountant,
        delta=plan.privacy.delta,
        confidence=attack.confidence,
        noise_multiplier=chosen.noise_multiplier,
        sample_rate=chosen.sample_rate,
        steps=plan.num_steps,
        num_patients=len(parts[0].patients),
        num_sites=len(parts),
        findings=tuple(
            _finding(seen, change, tossed, delta=plan.privacy.delta, attack=attack) for seen, change in found
        ),
        checks=_checks(
            plan,
            (parts[0], whole[0]),
            tossed,
            attack=attack,
            mechanism=chosen,
            implementation=implementation,
        ),
    )


def _canaries(
    plan: Plan, part: Part, *, attack: Attack, mechanism: Mechanism, implementation: Implementation
) -> Canaries:
    """Puts the canaries where real patients move little: an auditor may know those, and their drift
    would only make the bound less tight."""
    network = model.build(plan)
    if attack.num_canaries > model.num_parameters(network):
        raise ConfigError(
            f"Expected attack.num_canaries <= {model.num_parameters(network)}, the parameters of the model, "
            f"found {attack.num_canaries}; lower it or choose a larger model."
        )
    quiet = Implementation(gradient=implementation.gradient, noise=lambda stream: Silence())
    absent = nobody(first_label=len(plan.classes))
    key = key_of(plan, server_round=0, site=AUDITED)
    drift = quiet.train(network, part, plan=plan, mechanism=mechanism, canaries=absent, key=key).update
    return toss(attack.num_canaries, ranking=np.abs(drift), first_label=len(plan.classes), key=key)


def _train(
    plan: Plan,
    parts: Sequence[Part],
    *,
    canaries: Canaries,
    mechanism: Mechanism,
    implementation: Implementation,
    books: Books,
    on_round: Callable[[int, int], None],
) -> tuple[Floats, Floats]:
    """Returns the sum of the first site's updates, and the change of the global model over the run."""
    network = model.build(plan)
    start = model.flatten(network)
    parameters, velocity, released = start, None, np.zeros(len(start))
    theirs = [canaries] + [nobody(first_label=canaries.first_label)] * (len(parts) - 1)
    for server_round in range(1, plan.rounds + 1):
        books.charge(mechanism.training(plan.training.local_steps), server_round=server_round)
        mean = FixedPointSum(len(start), bound=plan.strategy.update_bound)
        for number, (part, own) in enumerate(zip(parts, theirs, strict=True)):
            model.load(network, parameters)
            key = key_of(plan, server_round=server_round, site=f"{AUDITED}-{number}")
            trained = implementation.train(
                network, part, plan=plan, mechanism=mechanism, canaries=own, key=key
            )
            mean.add(trained.update, weight=1)
            released += trained.update if number == 0 else 0.0
        parameters, velocity = descended(parameters, velocity, mean.mean(), asked=plan.strategy)
        on_round(server_round, plan.rounds)
    return released, parameters.astype(np.float64) - start


def _finding(seen: str, change: Floats, tossed: Canaries, *, delta: float, attack: Attack) -> Finding:
    guesses = audit.guess(tossed.scores(change), tossed.included, num_guesses=attack.num_guesses)
    bound = audit.lower_bound(guesses, delta=delta, confidence=attack.confidence)
    return Finding(seen=seen, guesses=guesses, lower_bound=bound)


def _checks(
    plan: Plan,
    parts: tuple[Part, Part],
    tossed: Canaries,
    *,
    attack: Attack,
    mechanism: Mechanism,
    implementation: Implementation,
) -> tuple[Check, ...]:
    """Tests the mechanism on real patients alone where canaries make no difference."""
    real, whole = parts
    key = key_of(plan, server_round=plan.rounds + 1, site=AUDITED)
    return (
        noise_scale(
            plan,
            whole,
            implementation=implementation,
            mechanism=mechanism,
            canaries=tossed,
            key=key,
            level=attack.false_alarm_prob,
        ),
        sensitivity(plan, real, implementation=implementation, key=key),
        participation(
            plan,
            whole,
            implementation=implementation,
            mechanism=mechanism,
            key=key,
            level=attack.false_alarm_prob,
        ),
    )


def key_of(plan: Plan, *, server_round: int, site: str) -> Key:
    """Returns the key of a task: of the operating system, or, in a seeded plan, of public values."""
    if plan.randomness == "secure":
        return secure_key()
    return seeded_key(seed=plan.seed, plan_hash=plan.hash, server_round=server_round, site=site)
