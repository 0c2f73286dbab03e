"""How long a site takes to read its cases: first pass and warm pass, beside a bare loop over the same files.

The bare loop decodes with pydicom and applies the same transforms, and does nothing else: no hash, no check,
no cohort, no cache. Passes take turns, and ratios of their medians are reported.

    python -m benchmarks.reading [--files 500] [--size 512] [--turns 3] [--json]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import torch
from pydicom.pixels import apply_modality_lut, apply_voi_lut

from client import preprocessing
from client.cohort import open_cohort
from client.images import Image
from client.site import Site, open_site
from common.asked import Asked
from common.config import compose_plan
from simulations.hospitals import PhantomSource, prepare_sites


def made_site(directory: Path, *, files: int, size: int) -> Site:
    """Writes a site of at least so many phantom radiographs and keeps that many in its table."""
    source = PhantomSource(
        num_sites=1,
        patients_per_site=files,
        seed=0,
        image_size=size,
        marker_effect=None,
        marker_missing_fraction=0.0,
        max_epsilon=10.0,
        delta=1e-4,
    )
    (path,) = prepare_sites(directory, source=source)
    table = path / "cases.csv"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[: files + 1]))
    return open_site(path)


def bare_loop(site: Site, asked: Asked) -> int:
    """Decodes and transforms every file; returns how many."""
    done = 0
    for line in (site.directory / "cases.csv").read_text().splitlines()[1:]:
        dataset = pydicom.dcmread(site.directory / line.split(",")[0])
        values = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset)
        image = Image(array=np.asarray(values, dtype=np.float32)[None], spacing_mm=None)
        preprocessing.apply([image], asked)
        done += 1
    return done


def first_pass(site: Site, asked: Asked) -> int:
    """Freezes and opens the cohort of a site that was never looked at."""
    shutil.rmtree(site.cache, ignore_errors=True)
    for path in site.private.iterdir():
        if path.name != "split.key":
            path.unlink() if path.is_file() else shutil.rmtree(path)
    return open_cohort(site, asked=asked).used


def warm_pass(site: Site, asked: Asked) -> int:
    """Opens the cohort again."""
    return open_cohort(site, asked=asked).used


def measured(site: Site, asked: Asked, *, turns: int) -> dict[str, list[float]]:
    """Returns seconds by pass, one for each turn."""
    passes: dict[str, Callable[[Site, Asked], int]] = {
        "bare": bare_loop,
        "first": first_pass,
        "warm": warm_pass,
    }
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for turn in range(turns + 1):
        for name, run in passes.items():
            begun = time.perf_counter()
            run(site, asked)
            if turn:  # the first turn imports and fills the machine's file cache
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def main() -> None:
    """Prints the medians and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=500)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    asked = compose_plan(["plan.classes=[normal,opacity]", "plan.sites=1", "plan.quorum=1"]).asked
    with tempfile.TemporaryDirectory() as directory:
        site = made_site(Path(directory) / "sites", files=options.files, size=options.size)
        seconds = measured(site, asked, turns=options.turns)
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    found: dict[str, Any] = {
        "files": options.files,
        "seconds": {name: round(value, 3) for name, value in middle.items()},
        "first_to_bare": round(middle["first"] / middle["bare"], 3),
        "first_to_warm": round(middle["first"] / middle["warm"], 1),
    }
    print(json.dumps(found) if options.json else "\n".join(f"{key}: {value}" for key, value in found.items()))


if __name__ == "__main__":
    main()
