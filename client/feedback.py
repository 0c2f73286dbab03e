"""Error feedback: what quantisation took from a site's update is added to its next one of the same run.

Only updates that are about to be sent go in, with their noise: what is kept tells no more than what is
released.

Source: Seide et al. (2014), 1-Bit Stochastic Gradient Descent and its Application to Data-Parallel
Distributed Training of Speech DNNs; Karimireddy et al. (2019), Error Feedback Fixes SignSGD.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from client.site import Site
from common import durable, quantisation
from common.errors import StateError
from common.exchange import Task
from common.model import FlatArray
from common.quantisation import FloatArray, Form

KEPT: Final = 3
"""Rounds: a server that lost its last checkpoint goes back by one."""


def quantised(site: Site, task: Task, update: FlatArray, *, form: Form) -> dict[str, FloatArray]:
    """Returns what is sent for an update, and keeps what that leaves of it for the next round.

    A task that is done again begins from what the rounds before it left, so it changes nothing twice.

    Args:
        update: float32, (num_parameters,), noised where the plan says so.

    Raises:
        StateError: what was kept is damaged.
    """
    if form == "fp32":
        return quantisation.quantised(update, form=form)
    directory = _directory(site, task.run)
    whole = update + _left(directory, before=task.server_round, size=len(update))
    arrays = quantisation.quantised(whole, form=form)
    _keep(directory, task.server_round, whole - quantisation.restored(arrays))
    return arrays


def forget(site: Site, *, run: str) -> None:
    """Deletes what a run that is over has left."""
    shutil.rmtree(_directory(site, run), ignore_errors=True)


def _directory(site: Site, run: str) -> Path:
    return site.state / "feedback" / run


def _left(directory: Path, *, before: int, size: int) -> FlatArray:
    former = [path for path in _rounds(directory) if int(path.stem) < before]
    if not former:
        return np.zeros(size, np.float32)
    try:
        left = load(former[-1].read_bytes())["left"]
    except (SafetensorError, KeyError) as error:
        raise StateError(f"Expected what a round left in {former[-1]}, found damage: {error}.") from None
    if left.shape != (size,) or left.dtype != np.float32:
        raise StateError(f"Expected {size} values in {former[-1]}, found {left.shape} of {left.dtype}.")
    return left


def _keep(directory: Path, server_round: int, left: FlatArray) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    durable.write(directory / f"{server_round:06d}.safetensors", save({"left": left}))
    for path in _rounds(directory)[:-KEPT]:
        path.unlink(missing_ok=True)


def _rounds(directory: Path) -> list[Path]:
    return sorted(directory.glob("[0-9]*.safetensors"))
