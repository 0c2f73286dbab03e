"""Runs the benchmarks and writes their page: ``benchmarks/RESULTS.md`` and ``benchmarks/RESULTS.svg``.

Run with ``make bench``, or ``python -m benchmarks.page step_cost server_memory`` for some of them; those
that are not run again keep what is in ``benchmarks/RESULTS.json``. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from benchmarks.figure import VARIABLE, Figure

FOLDER: Final = Path(__file__).parent
PNEUMONIA: Final = FOLDER.parents[1] / "shared/data/medmnist/pneumoniamnist.npz"
BENCHMARKS: Final[dict[str, list[str]]] = {
    "many_sites": [],  # first: others delete many files, after which some file systems make new ones slowly
    "step_cost": [],
    "server_memory": [],
    "round_overhead": [],
    "round_cost": [],
    "flare": [],
    "deployed_round": [],
    "exchange": [str(PNEUMONIA)],
    "precision": [str(PNEUMONIA)],
}
"""By name, what a benchmark is called with."""
PACKAGES: Final = ("torch", "opacus", "flwr", "monai", "numpy")


def run(name: str) -> dict[str, Any]:
    """Runs one benchmark and returns its figures, what it printed, when, and on what machine.

    Raises:
        SystemExit: it failed.
    """
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, "figures")
        file.touch()
        command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.{name}", *BENCHMARKS[name]]
        printed = []
        with subprocess.Popen(
            command,
            env={**os.environ, VARIABLE: str(file)},
            cwd=FOLDER.parent,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", file=sys.stderr, flush=True)
                printed.append(line)
        if process.returncode:
            raise SystemExit(f"benchmarks.{name} failed")
        figures = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return {
        "figures": figures,
        "printed": "".join(printed),
        "seconds": round(time.monotonic() - begun),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
    }


def machine() -> str:
    """Returns in a line what was measured on: processor, cores, system, versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in PACKAGES)
    cores = len(os.sched_getaffinity(0))
    processor = names[0] if names else platform.processor()
    return f"{processor}, {cores} cores, {platform.system()}, Python {platform.python_version()}, {versions}"


def page(found: dict[str, Any]) -> str:
    """Returns the page: a table of all figures, then each benchmark with what it printed."""
    lines = [
        "# Figures",
        "",
        "Written by `make bench`. Each is the median of its runs, or pairs of runs, with the least and the",
        "greatest; a ratio has no unit. How each was measured, and how others were set up beside, is said at",
        "the top of its file.",
        "",
        "![Each ratio over what is wanted](RESULTS.svg)",
        "",
        "| figure | measured | wanted | |",
        "|---|---|---|---|",
    ]
    for name in BENCHMARKS:
        for figure in figures_of(found.get(name)):
            met = {True: "met", False: "**missed**", None: ""}[figure.is_met]
            lines.append(f"| {figure.name} | {figure.measured} | {figure.wanted} | {met} |")
    for name, part in found.items():
        about = f"{part['date']}, {part['seconds']} s; {part['machine']}."
        lines += ["", f"## `benchmarks/{name}.py`", "", about, "", "```", part["printed"].rstrip(), "```"]
    return "\n".join(lines) + "\n"


def figures_of(part: dict[str, Any] | None) -> list[Figure]:
    """Returns the figures of a benchmark; none of one that was never run."""
    return [] if part is None else [Figure(**tree) for tree in part["figures"]]


def draw(figures: Sequence[Figure], file: Path) -> None:
    """Draws each figure over what is wanted of it: left of the line is better."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "feverfew", "svg.fonttype": "none"}
    from matplotlib import pyplot

    shares, names = [], []
    for figure in reversed([one for one in figures if one.is_met is not None]):
        # of what is wanted at least, the inverse: less is better in both
        kinds = [(one / figure.at_most if figure.at_most else figure.at_least / one) for one in  # type: ignore[operator]
                 (figure.median, figure.least, figure.most)]  # fmt: skip
        shares.append((kinds[0], min(kinds), max(kinds)))
        names.append(figure.name)
    _, axes = pyplot.subplots(figsize=(9, 0.8 + 0.27 * len(names)), layout="constrained")
    for place, (median, least, most) in enumerate(shares):
        colour = "#2a7f62" if median <= 1 else "#b3412e"
        axes.plot([least, most], [place, place], color=colour, linewidth=3, alpha=0.4)
        axes.plot([median], [place], "o", color=colour)
    axes.axvline(1, color="#555555", linewidth=1)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xscale("log")
    ticks = [0.25, 0.5, 0.75, 1, 1.5, 2, 4]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("measured over wanted (log scale): left of the line it is met")
    axes.spines[["top", "right"]].set_visible(False)
    pyplot.savefig(file, metadata={"Date": None})


def main() -> None:
    """Runs what is asked for, all where nothing is, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("benchmarks", nargs="*", help=f"of {', '.join(BENCHMARKS)}; all where none is named")
    asked = parser.parse_args().benchmarks or list(BENCHMARKS)
    if unknown := set(asked) - set(BENCHMARKS):
        parser.error(f"expected benchmarks of {', '.join(BENCHMARKS)}, found {', '.join(sorted(unknown))}")
    kept = FOLDER / "RESULTS.json"
    found = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    for name in asked:
        print(f"benchmarks.{name}", file=sys.stderr, flush=True)
        found[name] = run(name)
        ordered = {name: found[name] for name in BENCHMARKS if name in found}
        kept.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
        (FOLDER / "RESULTS.md").write_text(page(ordered), encoding="utf-8")
        draw([one for part in ordered.values() for one in figures_of(part)], FOLDER / "RESULTS.svg")


if __name__ == "__main__":
    main()
