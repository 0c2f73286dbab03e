"""What hostile sites do to a run, by strategy: 10 sites, 0 to 4 of them hostile, private and not.

Run with ``python -m benchmarks.robustness FILE`` (PneumoniaMNIST); writes the tables of
``docs/robustness.md``. Sites train with the product's own code in this process, and the product's server
validates and aggregates what they send, so a hostile update may also be rejected. Updates are attacked here,
between the two.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Message
from safetensors.numpy import load_file

from client import evaluation, training
from client.cohort import Part
from client.noise import seeded_key
from common import exchange, measure, model
from common.calibration import mechanism
from common.config import compose_plan
from common.errors import ConfigError, QuorumNotReached
from common.exchange import Prepared, Update
from common.plan import Plan
from server import app
from server.heads import Heads
from server.report import Report
from simulations import medmnist
from tests.grid import InlineGrid

SITES = 10
HOSTILE = range(5)
SCALE = 20.0
TABLES = "<!-- tables: benchmarks/robustness.py -->"
Values = np.ndarray[Any, np.dtype[np.float32]]
Attack = Callable[[Values, np.random.Generator], Values]


def _random(update: Values, rng: np.random.Generator) -> Values:
    drawn = rng.standard_normal(len(update))
    return (drawn * (SCALE * np.linalg.norm(update) / np.linalg.norm(drawn))).astype(np.float32)


ATTACKS: dict[str, Attack] = {
    "sign-flipped": lambda update, rng: -update,
    "scaled": lambda update, rng: update * np.float32(-SCALE),
    "label-flipped": lambda update, rng: update,  # made by training on the other labels
    "random": _random,
}
STRATEGIES: dict[str, Callable[[int], list[str]]] = {
    "fedavg": lambda f: ["strategy=fedavg", "strategy.weights=equal"],
    "krum": lambda f: ["strategy=krum", f"strategy.num_malicious_nodes={f}"],
    "multikrum": lambda f: [
        "strategy=multikrum",
        f"strategy.num_malicious_nodes={f}",
        f"strategy.num_nodes_to_select={max(2, SITES - f - 2)}",
    ],
    "fedtrimmedavg": lambda f: ["strategy=fedtrimmedavg", f"strategy.beta={f / SITES + 0.01}"],
    "fedmedian": lambda f: ["strategy=fedmedian"],
    "bulyan": lambda f: ["strategy=bulyan", f"strategy.num_malicious_nodes={f}"],
}
"""What each is set to where so many sites are hostile, of whom it is told the number; at least 1."""
PLAN = [
    *("plan.classes=[normal,pneumonia]", f"plan.sites={SITES}", f"plan.quorum={SITES}"),
    *("plan.randomness=seeded", "plan.evaluation.validation_every=0", "plan.evaluation.test_at_end=false"),
    *("preprocessing=grey28", "model.channels=[8,16]", "model.groups=8", "model.pool_sizes=[4,2]"),
    *("model.pooling=average", "model.first_block=contrast", "model.head_size=3"),
    *("plan.rounds=8", "training.local_steps=4", "training.expected_batch=64"),
]
PRIVATE = {
    "without privacy": ["privacy=none", "training.learning_rate=0.5"],
    "at epsilon 3": ["privacy=dp_sgd", "training.learning_rate=0.5"],
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a table."""

    privacy: str
    strategy: str
    attack: str
    num_hostile: int


def plan_of(cell: Cell) -> Plan | None:
    """Returns the plan; None outside of the strategy's condition."""
    told = STRATEGIES[cell.strategy](max(1, cell.num_hostile))
    try:
        return compose_plan([*PLAN, *PRIVATE[cell.privacy], *told])
    except ConfigError as error:
        if "plan.quorum" not in str(error):
            raise
        return None


def parts(file: Path) -> tuple[list[Part], Part]:
    """Returns what ten sites have, drawn at random, and the official test part."""
    read = medmnist.read(file, num_classes=2)
    rng = np.random.default_rng(0)
    cases = medmnist.divide_evenly(read["train"].labels, num_sites=SITES, rng=rng)
    return [_part(read["train"], one) for one in cases], _part(
        read["test"], np.arange(len(read["test"].labels))
    )


def _part(source: medmnist.Part, cases: np.ndarray) -> Part:
    return Part(
        images=source.images[cases][:, None],
        targets=source.labels[cases],
        values=np.zeros((len(cases), 0), np.float32),
        patients=tuple(np.array([case]) for case in range(len(cases))),
    )


def site(cell: Cell, plan: Plan, number: int, part: Part) -> Callable[[Message], Message]:
    """Returns how a site answers; those with the lowest numbers are hostile."""
    is_hostile = number < cell.num_hostile
    if is_hostile and cell.attack == "label-flipped":
        part = replace(part, targets=1 - part.targets)
    network, nominal = model.build(plan), len(part.patients)
    chosen = mechanism(plan, nominal_patients=nominal)

    def answer(message: Message) -> Message:
        task = exchange.read_task(message.content)
        if task.purpose == "prepare":
            return Message(exchange.prepared_record(_prepared(number, nominal)), reply_to=message)
        if task.purpose == "deliver":
            return Message(exchange.delivered_record(), reply_to=message)
        model.load(network, task.parameters)
        key = seeded_key(seed=0, plan_hash=plan.hash, server_round=task.server_round, site=f"s{number}")
        trained = training.train_by_plan(network, part, plan=plan, mechanism=chosen, key=key)
        values = trained.update
        if is_hostile:
            values = ATTACKS[cell.attack](values, np.random.default_rng([number, task.server_round]))
        update = Update(
            server_round=task.server_round,
            arrays={"values": values},
            weight=1.0,
            train_loss=trained.train_loss,
        )
        return Message(exchange.update_record(update), reply_to=message)

    return answer


def _prepared(number: int, nominal: int) -> Prepared:
    return Prepared(
        site=f"s{number}",
        status="approved",
        reason="",
        role="training",
        data="private",
        nominal_patients=nominal,
        patient_is="case",
        parts=("train",),
        feverfew="0",
    )


def shown(cell: Cell, *, file: Path) -> str:
    """Runs a cell; returns the AUROC of the model on the test part, or why there is none."""
    plan = plan_of(cell)
    if plan is None:
        return "n/a"
    torch.set_num_threads(1)
    sites, test = parts(file)
    nodes = {f"s{number}": site(cell, plan, number, part) for number, part in enumerate(sites)}
    # Rejected updates must not end the run here: what is left is what the table is about.
    least = max(plan.strategy.least_updates, SITES - cell.num_hostile)
    plan = plan.model_copy(update={"quorum": min(least, SITES)})
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        try:
            app.coordinate(
                InlineGrid(nodes),
                plan,
                run="r",
                directory=directory,
                heads=Heads(directory / "h"),
                engine="test",
            )
        except QuorumNotReached:
            return "stopped"
        report = Report.read(directory)
        rejected = sum(entry.sites_asked - entry.sites_valid for entry in report.rounds)
        named = load_file(directory / "model.safetensors")
    network = model.build(plan)
    flat = np.concatenate([named[name].reshape(-1) for name, _ in network.named_parameters()])
    model.load(network, flat.astype(np.float32))
    auroc = measure.value(evaluation.exact(network, test, asked=plan.asked))
    mark = "\\*" if rejected else ""
    return ("-" if auroc is None or math.isnan(auroc) else f"{auroc:.3f}") + mark


def cells() -> list[Cell]:
    """Returns all runs; where nobody is hostile, one run stands for all attacks."""
    return [
        Cell(privacy=privacy, strategy=strategy, attack=attack, num_hostile=number)
        for privacy in PRIVATE
        for attack in ATTACKS
        for strategy in STRATEGIES
        for number in HOSTILE
        if number or attack == next(iter(ATTACKS))
    ]


def table(results: dict[Cell, str]) -> str:
    """Returns a Markdown table for each kind of privacy and attack."""
    lines: list[str] = []
    for privacy in PRIVATE:
        for attack in ATTACKS:
            lines += [f"**{attack}, {privacy}**", ""]
            lines += ["| strategy | " + " | ".join(f"{number} hostile" for number in HOSTILE) + " |"]
            lines += ["|---" * (len(HOSTILE) + 1) + "|"]
            for strategy in STRATEGIES:
                row = [
                    results[
                        Cell(
                            privacy=privacy,
                            strategy=strategy,
                            attack=attack if number else next(iter(ATTACKS)),
                            num_hostile=number,
                        )
                    ]
                    for number in HOSTILE
                ]
                lines.append(f"| `{strategy}` | " + " | ".join(row) + " |")
            lines.append("")
    return "\n".join(lines)


def write(text: str, *, document: Path) -> None:
    """Puts the tables in their place in the document."""
    before, _, rest = document.read_text(encoding="utf-8").partition(TABLES)
    _, _, after = rest.partition(TABLES)
    document.write_text(f"{before}{TABLES}\n\n{text}\n{TABLES}{after}", encoding="utf-8")


def main() -> None:
    """Runs all cells and writes the tables into the document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--document", type=Path, default=Path("docs/robustness.md"))
    asked = parser.parse_args()
    every: Sequence[Cell] = cells()
    with get_context("forkserver").Pool(asked.workers) as pool:
        running = [(cell, pool.apply_async(shown, (cell,), {"file": asked.file})) for cell in every]
        results = {}
        for cell, result in running:
            results[cell] = result.get()
            print(cell, results[cell], flush=True)
    write(table(results), document=asked.document)


if __name__ == "__main__":
    main()
