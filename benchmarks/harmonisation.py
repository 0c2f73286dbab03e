"""What harmonised sites give: phantoms of scanners that differ by their tone curves, with and without.

Run with ``python -m benchmarks.harmonisation``. Four hospitals train, a fifth whose scanner no other has is
tested only. In each row the same images are trained on with the same plan but for the preprocessing:

* percentile: the 1st and the 99th percentile of each image become 0 and 1, as ``preprocessing=grey32`` does;
* even landmarks: each percentile p becomes p / 100, which needs no other hospital and costs nothing;
* landmarks: those of a run of ``plan=landmarks`` before.

Private rows cost every patient epsilon 3 in all, by the hospitals' own ledgers: with landmarks 1 of that goes
to them alone, and the training gets what is left in composition. AUROCs are exact, of the test patients.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import yaml
from safetensors.numpy import load_file

from client.site import Site, open_site
from common import measure
from common.calibration import mechanism
from common.config import compose_plan
from common.plan import Plan
from common.privacy import epsilon
from server.report import Report
from simulations import phantom
from simulations.hospitals import PhantomSource, prepare_sites
from simulations.settings import Engine, Experiment, Settings
from simulations.simulation import simulate

EPSILON, OF_LANDMARKS, DELTA = 3.0, 1.0, 1e-4
GAMMAS = (0.55, 0.8, 1.5, 2.2, 3.0)  # of the phantoms' own 0.86 to 1.16; the last is tested only
SPLIT = {"train": 0.6, "validation": 0.0, "test": 0.4}
NO_TRAINING = {
    "role": "evaluation",
    "data": "public",
    "split": {"train": 0.0, "validation": 0.0, "test": 1.0},
}
PERCENTILE = "preprocessing.steps=[{name:percentile,lower:1,upper:99},{name:resize}]"
EVEN = (
    "preprocessing.steps=[{name:landmarks,percentiles:[1,10,25,50,75,90,99],"
    "values:[0,0.1,0.25,0.5,0.75,0.9,1]},{name:resize}]"
)


@dataclass(frozen=True, kw_only=True)
class Apart(PhantomSource):
    """Phantoms of scanners with these gammas; the last site is tested only."""

    gammas: tuple[float, ...]

    def scanner(self, rng: np.random.Generator, *, index: int) -> phantom.Scanner:
        """Draws the device of a site."""
        return replace(super().scanner(rng, index=index), gamma=self.gammas[index])

    def write(self, directory: Path, *, name: str) -> None:
        """Writes one site."""
        super().write(directory, name=name)
        path = directory / "site.yaml"
        written = yaml.safe_load(path.read_text(encoding="utf-8"))
        number = round(self.num_patients(self.names().index(name)) * SPLIT["train"])
        written |= {"split": SPLIT, "nominal_patients": number}
        written |= NO_TRAINING if name == self.names()[-1] else {}
        path.write_text(yaml.safe_dump(written), encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class Row:
    """AUROC over the sites that trained, at the worst of them, and at the one that did not."""

    pooled: float
    lowest: float
    unseen: float
    total_epsilon: float | None


class Trial:
    """The sites of one seed."""

    def __init__(self, place: Path, *, seed: int, patients: int, rounds: int) -> None:
        self._place, self._seed, self._rounds = place, seed, rounds
        source = Apart(
            num_sites=len(GAMMAS),
            patients_per_site=patients,
            seed=seed,
            image_size=64,
            marker_effect=None,
            marker_missing_fraction=0.0,
            max_epsilon=10.0,
            delta=DELTA,
            gammas=GAMMAS,
        )
        self._sites = prepare_sites(place / "sites", source=source)

    def plan(self, *overrides: str) -> Plan:
        """Composes a plan of this trial."""
        usual = ("plan.classes=[normal,opacity]", f"plan.sites={len(GAMMAS)}", f"plan.seed={self._seed}")
        training = (f"plan.rounds={self._rounds}", "plan.evaluation.validation_every=0")
        is_training = "plan=landmarks" not in overrides
        return compose_plan([*overrides, *usual, *(training if is_training else ())])

    def run(self, plan: Plan, *, name: str, state: str = "empty") -> Report:
        """Simulates a plan."""
        settings = Settings(
            engine=Engine(name="local", workers=None),
            experiment=Experiment(name="harmonisation"),
            sites_directory=str(self._place / "sites"),
            state=state,
            resume=False,
            attack=None,
        )
        return simulate(plan, self._sites, settings=settings, directory=self._place / "runs" / name)

    def row(self, report: Report) -> Row:
        """Reads the exact scores that the sites keep."""
        scores = {
            site.name: measure.statistic(load_file(site.state / "scores" / report.run / "test.safetensors"))
            for site in map(open_site, self._sites)
        }
        *trained, unseen = (scores[name] for name in sorted(scores))
        each = [_auroc([one]) for one in trained]
        totals = [cost.total_epsilon for cost in report.privacy.per_site.values() if cost.total_epsilon]
        return Row(
            pooled=_auroc(trained),
            lowest=min(each),
            unseen=_auroc([unseen]),
            total_epsilon=max(totals, default=None),
        )

    def rows(self, *, private: bool) -> dict[str, Row]:
        """Trains with each preprocessing."""
        kind = "private" if private else "exact"
        choice = ["privacy=dp_sgd"] if private else ["privacy=none"]
        whole = [*choice, *([f"privacy.target_epsilon={EPSILON}"] if private else [])]
        found = {
            name: self.row(self.run(self.plan(*whole, steps), name=f"{kind}-{place}"))
            for place, (name, steps) in enumerate((("percentile", PERCENTILE), ("even landmarks", EVEN)))
        }
        asking = self.plan(
            "plan=landmarks", *choice, *([f"privacy.target_epsilon={OF_LANDMARKS}"] if private else [])
        )
        landmarks = self.run(asking, name=f"{kind}-ask").landmarks
        assert landmarks is not None
        print(f"seed {self._seed}, {kind}: {landmarks.values}, uncertainty {landmarks.uncertainty:.3f}")
        rest = [f"privacy.target_epsilon={self._left(asking)}"] if private else []
        plan = self.plan(*choice, *rest, landmarks.override)
        found["landmarks"] = self.row(self.run(plan, name=f"{kind}-harmonised", state="keep"))
        return found

    def _left(self, asking: Plan) -> float:
        """Returns the largest target of the training, in hundredths, with which both cost EPSILON in all."""
        for hundredths in range(round(EPSILON * 100), 0, -1):
            target = hundredths / 100
            plan = self.plan(f"privacy.target_epsilon={target}")
            if all(_together(asking, plan, site.settings.nominal_patients) for site in self._training()):
                return target
        raise ValueError("expected something left for the training")

    def _training(self) -> list[Site]:
        return [open_site(path) for path in self._sites[:-1]]


def _together(asking: Plan, plan: Plan, nominal: int) -> bool:
    first = mechanism(asking, nominal_patients=nominal).training(1)
    second = mechanism(plan, nominal_patients=nominal).training(plan.num_steps)
    return epsilon([first, second], delta=DELTA).value <= EPSILON


def _auroc(scores: Sequence[measure.Statistic]) -> float:
    found = measure.value(measure.merge(scores))
    assert found is not None
    return found


def main() -> None:
    """Prints AUROCs by preprocessing, as a mean over the seeds, with those of each seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--patients", type=int, default=400, help="of a site, on average")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    found: dict[tuple[bool, str], list[Row]] = {}
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as place:
            trial = Trial(Path(place), seed=seed, patients=arguments.patients, rounds=arguments.rounds)
            for private in (False, True):
                for name, row in trial.rows(private=private).items():
                    found.setdefault((private, name), []).append(row)
                    print(f"seed {seed}, {'private' if private else 'exact'}, {name}: {row}", flush=True)
    print(
        "| privacy | preprocessing | AUROC, four scanners | lowest of the four | unseen scanner | epsilon |"
    )
    print("|---|---|---|---|---|---|")
    for (private, name), rows in found.items():
        cells = [_cell([getattr(row, key) for row in rows]) for key in ("pooled", "lowest", "unseen")]
        spent = max((row.total_epsilon or 0.0 for row in rows), default=0.0)
        cost = f"{spent:.2f}" if private else "none"
        print(f"| {'yes' if private else 'no'} | {name} | {' | '.join(cells)} | {cost} |")


def _cell(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ({', '.join(f'{value:.3f}' for value in values)})"


if __name__ == "__main__":
    main()
