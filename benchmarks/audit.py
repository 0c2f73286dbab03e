"""How tight the audit is and whether it catches planted defects: 20 runs of each.

Run with ``python -m benchmarks.audit``, or name some cases. Everything is drawn anew in each run, from the
operating system's randomness; only the real patients, phantoms, are the same.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from hydra import compose, initialize_config_module

from client.cohort import Part
from client.noise import secure_key
from common.calibration import noise_multiplier
from common.config import plain, plan_of
from common.plan import DpSgd, Plan
from simulations import audit, auditor
from simulations.auditor import Audit
from simulations.implementation import PRODUCT, Implementation
from simulations.patients import phantom_part
from simulations.settings import Attack
from tests.defects import CAUGHT_BY

SITES = 4
PATIENTS_PER_SITE = 60
EPSILON_WITHOUT_NOISE = 4.0
"""What the ledger says in the runs without noise."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run: the bound from the updates, the ledger's, which checks failed, and the time."""

    bound: float
    final_bound: float
    ledger: float
    failed: frozenset[str]
    seconds: float


def composed(*overrides: str) -> tuple[Plan, Attack]:
    """Returns plan and settings of ``experiment=attack``."""
    with initialize_config_module("conf", version_base="1.3"):
        asked = ["experiment=attack", f"plan.sites={SITES}", *overrides]
        tree = plain(compose("simulation", overrides=asked))
    return plan_of(tree), Attack.model_validate(tree["attack"])


def audited(implementation: Implementation, *overrides: str) -> Callable[[list[Part]], Outcome]:
    """Returns what runs the experiment once."""
    plan, attack = composed(*overrides)

    def run(parts: list[Part]) -> Outcome:
        start = time.monotonic()
        found = auditor.run(plan, parts, attack=attack, implementation=implementation)
        return _outcome(found, seconds=time.monotonic() - start)

    return run


def _outcome(found: Audit, *, seconds: float) -> Outcome:
    updates, final = found.findings
    failed = {check.name for check in found.checks if not check.passed}
    if updates.lower_bound > found.ledger_epsilon:
        failed.add("audit")
    return Outcome(
        bound=updates.lower_bound,
        final_bound=final.lower_bound,
        ledger=found.ledger_epsilon,
        failed=frozenset(failed),
        seconds=seconds,
    )


def plain_gaussian(parts: list[Part]) -> Outcome:
    """The same guesses about a Gaussian mechanism of the plan's epsilon: no training, one number a canary."""
    plan, attack = composed()
    assert isinstance(plan.privacy, DpSgd) and plan.privacy.target_epsilon is not None
    start = time.monotonic()
    std = noise_multiplier(
        target_epsilon=plan.privacy.target_epsilon, delta=plan.privacy.delta, sample_rate=1.0, steps=1
    )
    stream = secure_key().stream("gaussian")
    included = stream.random(attack.num_canaries) < 0.5
    scores = included + std * stream.standard_normal(attack.num_canaries)
    guesses = audit.guess(np.asarray(scores), included, num_guesses=attack.num_guesses)
    bound = audit.lower_bound(guesses, delta=plan.privacy.delta, confidence=attack.confidence)
    return Outcome(
        bound=bound,
        final_bound=bound,
        ledger=plan.privacy.target_epsilon,
        failed=frozenset({"audit"} if bound > plan.privacy.target_epsilon else ()),
        seconds=time.monotonic() - start,
    )


def cases() -> dict[str, tuple[Callable[[list[Part]], Outcome], str | None]]:
    """Returns what is run, and the check that has to catch it; None for what has to pass."""
    stronger = f"privacy.target_epsilon={EPSILON_WITHOUT_NOISE}"
    found: dict[str, tuple[Callable[[list[Part]], Outcome], str | None]] = {
        "gaussian mechanism": (plain_gaussian, None),
        "product": (audited(PRODUCT), None),
    }
    for name, (implementation, check) in CAUGHT_BY.items():
        found[name] = (audited(implementation, *([stronger] if name == "no noise" else [])), check)
    return found


def main() -> None:
    """Prints a line for each case: bounds, ledger, how often it was caught, the longest time."""
    known = cases()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"one of: {', '.join(known)}; all if none")
    parser.add_argument("--runs", type=int, default=20)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    plan, _ = composed()
    parts = [
        phantom_part(PATIENTS_PER_SITE, cases_per_patient=2, asked=plan.asked, image_size=128, seed=seed)
        for seed in range(SITES)
    ]
    for name in asked.cases or known:
        run, check = known[name]
        report(name, [run(parts) for _ in range(asked.runs)], check=check)


def report(name: str, outcomes: list[Outcome], *, check: str | None) -> None:
    """Prints one case."""
    bounds = [one.bound for one in outcomes]
    finals = [one.final_bound for one in outcomes]
    good = sum(not one.failed if check is None else check in one.failed for one in outcomes)
    verdict = "passed everything" if check is None else f"caught by {check}"
    others = sorted({failed for one in outcomes for failed in one.failed} - {check or ""})
    print(
        f"{name}: epsilon >= {statistics.median(bounds):.2f} ({min(bounds):.2f} to {max(bounds):.2f}), "
        f"final model >= {statistics.median(finals):.2f}; "
        f"ledger <= {max(one.ledger for one in outcomes):.3f}; {verdict} in {good} of {len(outcomes)}"
        + (f" (also by {', '.join(others)})" if others else "")
        + f"; at most {max(one.seconds for one in outcomes):.1f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
