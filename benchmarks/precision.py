"""What bfloat16 costs: the same runs trained in fp32 and in bf16, and their AUROC.

Run with ``python -m benchmarks.precision pneumoniamnist.npz``. ``experiment=pneumonia`` with its privacy; for
each seed both run one after the other on the same sites. The noise of a private run is its own, so AUROCs of
single seeds differ also between equal forms.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from benchmarks.exchange import report, tell_difference

PRECISIONS = ("fp32", "bf16")


def main() -> None:
    """Prints the mean AUROC of each precision over the seeds, and how far apart they are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    found: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
    with tempfile.TemporaryDirectory() as place:
        for seed in range(given.seeds):
            for precision, scores in found.items():
                common = (f"data.file={given.file.resolve()}", f"plan.seed={seed}")
                one = report(Path(place), *common, f"training.precision={precision}")
                scores.append(one.final.auroc_exact or 0.0)
                print(seed, precision, f"{scores[-1]:.4f}", flush=True)
    for precision, scores in found.items():
        print(f"{precision}: {statistics.mean(scores):.4f} ({min(scores):.4f} to {max(scores):.4f})")
    tell_difference("bf16, mean AUROC less fp32's", found["bf16"], found["fp32"])


if __name__ == "__main__":
    main()
