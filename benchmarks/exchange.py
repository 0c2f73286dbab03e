"""What fewer bytes cost: the same runs with updates in fp32, fp16 and int8, their bytes and their AUROC.

Run with ``python -m benchmarks.exchange pneumoniamnist.npz``. For each seed the three forms run one after the
other on the same sites. Bytes are those of the messages' content, up and down, of all sites together. The
noise of a private run is its own, so AUROCs of single seeds differ also between equal forms.
"""

from __future__ import annotations

import argparse
import secrets
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.figure import tell
from common.quantisation import DTYPES
from server.report import Report

COMMAND = str(Path(sys.executable).with_name("feverfew-simulate"))


def report(place: Path, *overrides: str) -> Report:
    """Runs one simulation and returns its report."""
    run = f"run-{secrets.token_hex(4)}"
    done = subprocess.run(
        [COMMAND, "experiment=pneumonia", f"hydra.run.dir={run}", *overrides],
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return Report.read(place / run)


def main() -> None:
    """Prints for each form the share of fp32's bytes and the AUROC over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--override", nargs="*", default=[])
    given = parser.parse_args()
    found: dict[str, list[Report]] = {form: [] for form in DTYPES}
    with tempfile.TemporaryDirectory() as place:
        for seed in range(given.seeds):
            common = [f"data.file={given.file.resolve()}", f"plan.seed={seed}", *given.override]
            for form in found:
                found[form].append(report(Path(place), *common, f"exchange.update={form}"))
                print(seed, form, f"{found[form][-1].final.auroc_exact:.4f}", flush=True)
    fp32 = found.pop("fp32")
    exact = [one.final.auroc_exact or 0.0 for one in fp32]
    wanted = {"fp16": 0.51, "int8": 0.27}
    for form, reports in found.items():
        for way, total in (("up", _bytes_up), ("down", _bytes_down)):
            shares = [total(one) / total(full) for one, full in zip(reports, fp32, strict=True)]
            tell(f"{form}, bytes {way} over fp32's", shares, at_most=wanted[form])
        scores = [one.final.auroc_exact or 0.0 for one in reports]
        print(f"{form}: mean AUROC {statistics.mean(scores):.4f}, fp32 {statistics.mean(exact):.4f}")
        tell_difference(f"{form}, mean AUROC less fp32's", scores, exact)


def tell_difference(name: str, scores: list[float], others: list[float]) -> None:
    """Tells how far apart two means over seeds are, without sign."""
    tell(name, [abs(statistics.mean(scores) - statistics.mean(others))], at_most=0.005)


def _bytes_up(one: Report) -> int:
    return sum(part.bytes_up for part in one.participation.values())


def _bytes_down(one: Report) -> int:
    return sum(part.bytes_down for part in one.participation.values())


if __name__ == "__main__":
    main()
