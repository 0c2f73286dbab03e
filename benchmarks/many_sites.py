"""Very many sites: logistic regression beside Flower's engine; and with 10, 100 and 1,000 sites, a CNN too.

Run with ``python -m benchmarks.many_sites``. 784 inputs, 10 classes, 60 patients a site (one case each), 10
sites asked a round, 6 local steps (one pass) with 10 patients expected in each, 100 rounds, no privacy. The
data are random; sites are written and their images decoded before, by a run that is not timed. Whole
processes are timed, imports and report included; what both engines do for a round (charge, trail, reply on
disk) is the same files. Of 1,000 sites every task is the site's first in the run, with files of its own; of
10 hardly any is. That is seen where a step takes half a millisecond, as one of logistic regression does;
the network of ``conf/model/cnn.yaml``, in fewer rounds, says what it is where a round has more work. Beside
both engines stands what ``benchmarks/least_run.py`` leaves of a run on the same sites, which no simulation
of directories can leave out. Memory is the peak of all processes together, as PSS (``benchmarks/tree.py``).

Not to be run within minutes after many files were deleted, as by tests: some file systems make files slowly
then (``docs/decisions/030``), and a site's first task makes more of them than a later one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks import least_run
from benchmarks.figure import tell
from benchmarks.tree import Cost, measured

COMMAND = str(Path(sys.executable).with_name("feverfew-simulate"))
CLASSES = [f"c{number}" for number in range(10)]
CASES_PER_SITE = 60
PLAN = [
    "data=medmnist",
    f"data.classes=[{','.join(CLASSES)}]",
    "data.partition=iid",
    "data.min_cases=1",
    "data.evaluation_site=false",
    "preprocessing=grey28",
    "preprocessing.steps=[{name: window, lower: 0, upper: 255}, {name: resize}]",
    "model=linear",
    "privacy=none",
    "plan.sites_per_round=10",
    "plan.quorum=10",
    "plan.randomness=seeded",
    "plan.evaluation.validation_every=0",
    "plan.evaluation.test_at_end=false",
    "training.expected_batch=10",
    "training.local_steps=6",
    "training.learning_rate=0.05",
]


def write_data(file: Path, *, num_sites: int, seed: int = 0) -> None:
    """Writes a file in the form of MedMNIST's: classes that differ in their mean image."""
    rng = np.random.default_rng(seed)
    means = rng.integers(0, 256, (len(CLASSES), 28, 28))
    arrays = {}
    sizes = {"train": num_sites * CASES_PER_SITE - len(CLASSES), "val": len(CLASSES), "test": len(CLASSES)}
    for name, size in sizes.items():
        labels = rng.integers(0, len(CLASSES), size)
        images = means[labels] * 0.4 + rng.normal(64, 60, (size, 28, 28))
        arrays[f"{name}_images"] = np.clip(images, 0, 255).astype(np.uint8)
        arrays[f"{name}_labels"] = labels[:, None]
    np.savez(file, **arrays)


class Federation:
    """So many sites in a folder, written and decoded; a run of it is a process of its own."""

    def __init__(self, place: Path, *, num_sites: int, rounds: int) -> None:
        self._place, self._name = place, f"sites-{num_sites}"
        self._own = [f"data.file={place / f'{num_sites}.npz'}", f"data.num_sites={num_sites}"]
        self._own += [f"plan.rounds={rounds}", f"experiment.name={self._name}"]
        write_data(place / f"{num_sites}.npz", num_sites=num_sites)
        self.run("plan.rounds=1")

    @property
    def sites(self) -> Path:
        """The folder of the sites."""
        return self._place / "sites" / self._name

    def run(self, *overrides: str) -> Cost:
        """Returns the cost of a run; its files are in the newest folder of ``runs``."""
        return measured([COMMAND, *PLAN, *self._own, *overrides], cwd=self._place)

    def round_seconds(self) -> float:
        """Returns the median time of a round of the newest run, the pause to the next included."""
        events = max(self._place.glob("runs/*/events.jsonl"), key=lambda path: path.stat().st_mtime_ns)
        told = [json.loads(line) for line in events.read_text(encoding="utf-8").splitlines()]
        times = [np.datetime64(one["time"][:-6]) for one in told if one["event"] == "round_started"]
        return float(np.median(np.diff(times)) / np.timedelta64(1, "s"))


def shown(values: Sequence[float]) -> str:
    """Returns median, least and greatest.

    >>> shown([3.0, 1.0, 2.0])
    '2.00 (1.00 to 3.00)'
    """
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def engines(place: Path, *, num_sites: int, rounds: int, runs: int) -> None:
    """Prints the wall time and memory of each engine, and the ratio of paired runs."""
    federation = Federation(place, num_sites=num_sites, rounds=rounds)
    local, flower = [], []
    for _ in range(runs):
        local.append(federation.run())
        flower.append(federation.run("engine=flower"))
    # at the end: what these write at the sites would have to be put aside by a run
    least = [least_run.timed(federation.sites, place / f"least-{number}")[0] for number in range(runs)]
    for name, costs in (("local", local), ("flower", flower)):
        print(
            f"{name:>6}, {num_sites} sites, {rounds} rounds: {shown([one.seconds for one in costs])} s, "
            f"{shown([one.megabytes for one in costs])} MB in {costs[0].processes} processes"
        )
    ratios = [theirs.seconds / ours.seconds for ours, theirs in zip(local, flower, strict=True)]
    name = f"{num_sites} sites, {rounds} rounds"
    tell(f"{name}, Flower's engine over ours", ratios, at_least=20.0)
    tell(f"{name}, memory", [one.megabytes for one in local], unit="MB", at_most=500.0)
    tell(f"{name}, the least that a run takes", least, unit="s")
    ratios = [theirs.seconds / bare for bare, theirs in zip(least, flower, strict=True)]
    tell(f"{name}, Flower's engine over that", ratios)


def by_sites(federations: Mapping[int, Federation], *, model: str, rounds: int, runs: int) -> None:
    """Prints time of a round and peak memory by number of sites, and the ratios to the fewest."""
    found: dict[int, list[tuple[float, float]]] = {number: [] for number in federations}
    for _ in range(runs):
        for number, federation in federations.items():
            cost = federation.run(f"model={model}", f"plan.rounds={rounds}")
            found[number].append((federation.round_seconds(), cost.megabytes))
    fewest = min(federations)
    for number in federations:
        pairs = list(zip(found[number], found[fewest], strict=True))
        times, sizes = (list(column) for column in zip(*found[number], strict=True))
        print(
            f"{model}, {number:>5} sites: {shown([1e3 * one for one in times])} ms a round, "
            f"{shown(sizes)} MB",
            flush=True,
        )
        if number != fewest:
            name = f"{model}, {number} sites over {fewest}, 10 asked"
            tell(f"{name}, time of a round", [ours[0] / least[0] for ours, least in pairs], at_most=1.3)
            tell(f"{name}, memory", [ours[1] / least[1] for ours, least in pairs], at_most=1.2)


def main() -> None:
    """Prints both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--sites", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--part", choices=("both", "engines", "sizes"), default="both")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        if asked.part != "engines":
            federations = {
                number: Federation(Path(place), num_sites=number, rounds=asked.rounds)
                for number in asked.sites
            }
            for model, rounds in (("linear", asked.rounds), ("cnn", asked.rounds // 3)):
                by_sites(federations, model=model, rounds=rounds, runs=asked.runs)
        if asked.part != "sizes":
            engines(Path(place), num_sites=asked.sites[-1], rounds=asked.rounds, runs=asked.runs)


if __name__ == "__main__":
    main()
