"""The coordinator's peak memory with 4 and with 32 sites and a model of 100 MB.

Run with ``python -m benchmarks.server_memory``. Each number of sites is a process of its own, in which a
grid makes each reply when it is asked for, as a network would: what is measured is what the coordinator
keeps. Two rounds, the mean of updates in fp32, the report included. Memory is the peak resident set of the
process, with and without what it held before the first task went out.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.figure import tell

if TYPE_CHECKING:
    from flwr.app import Message, RecordDict

SIDE, CLASSES = 1000, 25
"""Pixels of an image's side: a linear model has so many parameters for each class, 100 MB together."""
ROUNDS = 2


def peak(num_sites: int) -> dict[str, float]:
    """Returns the peak resident set in MB of a run over so many sites, and what came after the start."""
    from server.app import coordinate
    from server.heads import Heads
    from tests.grid import InlineGrid
    from tests.plans import plan

    asked = plan(
        model="linear",
        privacy="none",
        preprocessing__size=(SIDE, SIDE),
        classes=tuple(f"c{number}" for number in range(CLASSES)),
        sites=num_sites,
        quorum=num_sites,
        rounds=ROUNDS,
        evaluation__validation_every=0,
        evaluation__test_at_end=False,
    )
    names = [f"site-{number:02}" for number in range(num_sites)]
    grid = InlineGrid({name: lambda message, name=name: _reply(message, name) for name in names})  # type: ignore[misc]
    before = _peak()
    with tempfile.TemporaryDirectory() as place:
        heads = Path(place, "heads")
        heads.mkdir()
        coordinate(
            grid, asked, run="benchmark", directory=Path(place), heads=Heads(heads), engine="benchmark"
        )
    assert grid.largest_batch == 1, "one reply at a time"
    return {"peak": _peak(), "added": _peak() - before}


def _reply(message: Message, name: str) -> Message:
    from flwr.app import Message

    return Message(_content(message, name), reply_to=message)


def _content(message: Message, name: str) -> RecordDict:
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

    from common import exchange

    match message.metadata.message_type:
        case exchange.PREPARE:
            return exchange.prepared_record(
                exchange.Prepared(
                    site=name,
                    status="approved",
                    reason="",
                    role="training",
                    data="private",
                    nominal_patients=100,
                    patient_is="person",
                    parts=("train",),
                    feverfew="benchmark",
                )
            )
        case exchange.TRAIN:
            (sent,) = message.content.array_records["arrays"].values()  # zeros: as good as any other update
            metrics = {
                "server-round": message.content["task"]["server-round"],
                "weight": 100,
                "train-loss": 0.5,
            }
            arrived = Array(
                dtype=sent.dtype, shape=sent.shape, stype=sent.stype, data=bytes(bytearray(sent.data))
            )
            return RecordDict({"arrays": ArrayRecord({"update": arrived}), "metrics": MetricRecord(metrics)})
    return exchange.delivered_record()


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    """Prints the peak for each number of sites, and the ratio of each to the first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--one", type=int)
    asked = parser.parse_args()
    if asked.one is not None:
        print(json.dumps(peak(asked.one)))
        return
    found: dict[int, list[dict[str, float]]] = {number: [] for number in asked.sites}
    for _ in range(asked.runs):
        for number, peaks in found.items():
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.server_memory", "--one", str(number)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            peaks.append(json.loads(done.stdout.splitlines()[-1]))
    first = asked.sites[0]
    for number, peaks in found.items():
        tell(f"coordinator's memory, {number} sites, 100 MB model", [one["peak"] for one in peaks], unit="MB")
    for number in asked.sites[1:]:
        ratios = [
            one["added"] / other["added"] for one, other in zip(found[number], found[first], strict=True)
        ]
        tell(f"coordinator's memory, {number} sites over {first}", ratios, at_most=1.2)


if __name__ == "__main__":
    main()
