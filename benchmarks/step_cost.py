"""What a private step costs: its time and peak memory over those of a plain step, beside Opacus' own ways.

Run with ``python -m benchmarks.step_cost``. A plain step is forward, backward and descent in fp32; a private
one samples nothing, but clips each patient, adds the noise and descends. Every way is a process of its own;
within it, plain and private steps alternate, and the ratio is the median over pairs. Times are of the
process, so that a busy machine disturbs less; for two threads of the wall.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.figure import tell
from client.process import set_environment

NETWORKS: dict[str, tuple[dict[str, Any], int]] = {
    "cnn": ({"preprocessing__size": (64, 64)}, 64),
    "article_cnn": ({"model": "article_cnn", "preprocessing": "rgb64"}, 64),
    "densenet121": ({"model": "densenet121", "preprocessing__size": (64, 64)}, 8),
    "efficientnet_b0": ({"model": "efficientnet_b0", "preprocessing__size": (64, 64)}, 8),
    "unet": ({"model": "unet", "preprocessing__size": (64, 64)}, 8),
}
"""By name: the changes of a plan, and the cases of a batch."""
WAYS = {
    "bookkeeping": {"privacy__clipping": "bookkeeping"},
    "bf16": {"privacy__clipping": "bookkeeping", "training__precision": "bf16"},
    "hooks": {"privacy__clipping": "hooks"},
    "ew": {"privacy__clipping": "ew"},
    "ghost": {"privacy__clipping": "ghost"},
}
"""By name, the changes of a plan; "bf16" is book-keeping, computed in that type. Plain steps are in fp32."""
OPACUS = ("hooks", "ew", "ghost")
FEW_STEPS = 3
"""Of Opacus' ways: some take thirty times as long as a plain step."""
WANTED = {
    "cnn": {"bookkeeping": 1.2, "bf16": 0.9},
    "article_cnn": {"bookkeeping": 1.3, "bf16": 0.8},
    "densenet121": {"bookkeeping": 1.6, "bf16": 1.3},
}
"""By network and way, the most that a private step should take over a plain one in fp32."""


def measure(name: str, way: str, *, cases_per_patient: int, threads: int, steps: int) -> dict[str, float]:
    """Returns the seconds of a plain and of a private step, and their median ratio."""
    import torch

    torch.set_num_threads(threads)
    plain, private = _steps(name, way, cases_per_patient=cases_per_patient)
    clock = time.process_time if threads == 1 else time.perf_counter
    pairs = [(_timed(plain, clock), _timed(private, clock)) for _ in range(steps + 2)][2:]
    return {
        "plain": statistics.median(one for one, _ in pairs),
        "private": statistics.median(other for _, other in pairs),
        "ratio": statistics.median(other / one for one, other in pairs),
    }


def peak(name: str, way: str, *, cases_per_patient: int) -> float:
    """Returns the peak memory in MB that steps of one kind add to a process; "plain" is a way, too."""
    import torch

    torch.set_num_threads(1)
    plain, private = _steps(
        name, "bookkeeping" if way == "plain" else way, cases_per_patient=cases_per_patient
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        (plain if way == "plain" else private)()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3


def _steps(name: str, way: str, *, cases_per_patient: int) -> tuple[Callable[[], None], Callable[[], None]]:
    import torch

    from client.clipping import PrivateGradient
    from client.gaussian import Gaussian
    from client.precision import compute_type
    from client.training import Batch, Descent, PlainGradient
    from common import model
    from tests.plans import plan

    changes, cases = NETWORKS[name]
    asked = plan(**changes, **WAYS[way], training__cases_per_patient=cases_per_patient)
    network, other = model.build(asked), model.build(asked)
    (image, *_) = model.blank_inputs(asked)
    targets = torch.arange(cases) % 2
    if asked.target == "mask":
        targets = torch.randint(0, 2, (cases, *asked.preprocessing.size))
    batch = Batch(
        images=torch.rand(cases, *image.shape[1:]),
        values=torch.zeros(cases, 0),
        targets=targets,
        owners=torch.arange(cases) // cases_per_patient,
        num_patients=cases // cases_per_patient,
    )
    ordinary = PlainGradient(network, expected_batch=batch.num_patients)
    private = PrivateGradient(
        other,
        privacy=asked.privacy,  # type: ignore[arg-type]
        noise_multiplier=1.0,
        expected_batch=batch.num_patients,
        noise=Gaussian(bytes(32)),
        compute=compute_type(asked),
    )
    descents = Descent(network, training=asked.training), Descent(other, training=asked.training)

    def plain_step() -> None:
        network.zero_grad()
        ordinary.accumulate(batch)
        ordinary.finish()
        descents[0].step()

    def private_step() -> None:
        other.zero_grad()
        private.accumulate(batch)
        private.finish()
        descents[1].step()

    return plain_step, private_step


def _timed(step: Callable[[], None], clock: Callable[[], float]) -> float:
    begun = clock()
    step()
    return clock() - begun


def _apart(*arguments: object) -> Any:
    """Runs this module in a process of its own; None where a way does not know the network."""
    set_environment()  # as the processes that train at a site
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.step_cost", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def times(name: str, *, threads: Sequence[int], steps: int, runs: int) -> None:
    """Tells what a private step of a network takes over a plain one, and over Opacus' best way."""
    for number in threads:
        settings = ("--threads", number, "--steps", steps)
        few = ("--threads", number, "--steps", FEW_STEPS)
        found = {way: _apart(name, way, *(few if way in OPACUS else settings)) for way in WAYS}
        for way, one in found.items():
            if one is None:
                print(f"{name}, {way}: not for this network")
                continue
            told = f"{one['private'] * 1e3:.0f} ms over {one['plain'] * 1e3:.0f} ms"
            print(
                f"{name}, {way}, threads: {number}: {one['ratio']:.2f} of a plain step ({told})", flush=True
            )
        for way, wanted in WANTED.get(name, {}).items():
            again = [found[way], *(_apart(name, way, *settings) for _ in range(runs - 1))]
            ratios = [one["ratio"] for one in again]
            tell(f"{name}, private step ({way}) over plain, threads: {number}", ratios, at_most=wanted)
        best = min(one["ratio"] for way, one in found.items() if way in OPACUS and one is not None)
        ratio = found["bookkeeping"]["ratio"] / best
        tell(f"{name}, bookkeeping over Opacus' best way, threads: {number}", [ratio], at_most=1.0)


def memory(name: str, *, cases_per_patient: int, runs: int) -> None:
    """Tells the peak memory of private steps of a network over that of plain ones."""
    more = ("--peak", "--cases-per-patient", cases_per_patient)
    pairs = [(_apart(name, "bookkeeping", *more), _apart(name, "plain", *more)) for _ in range(runs)]
    told = "a case a patient" if cases_per_patient == 1 else f"{cases_per_patient} cases a patient"
    tell(f"{name}, memory of a step over plain, {told}", [one / other for one, other in pairs], at_most=1.4)


def main() -> None:
    """Prints for each network and way the ratios of time and of peak memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", nargs="?", choices=NETWORKS)
    parser.add_argument("way", nargs="?", choices=("plain", *WAYS))
    parser.add_argument("--cases-per-patient", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--peak", action="store_true")
    asked = parser.parse_args()
    if asked.way is not None:
        cases, threads = asked.cases_per_patient[0], asked.threads[0]
        if asked.peak:
            print(json.dumps(peak(asked.network, asked.way, cases_per_patient=cases)))
        else:
            found = measure(
                asked.network, asked.way, cases_per_patient=cases, threads=threads, steps=asked.steps
            )
            print(json.dumps(found))
        return
    for name in NETWORKS if asked.network is None else [asked.network]:
        times(name, threads=asked.threads, steps=asked.steps, runs=asked.runs)
        for cases in asked.cases_per_patient:
            memory(name, cases_per_patient=cases, runs=asked.runs)


if __name__ == "__main__":
    main()
