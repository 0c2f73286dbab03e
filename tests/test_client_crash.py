from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from common import model
from tests import crash
from tests.crash import SECURE, SEEDED, Hospital

EVERY = 8


@pytest.mark.parametrize("first", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, EVERY))])
def test_site_killed_at_any_step_sends_one_output_under_one_charge(tmp_path: Path, first: int) -> None:
    hospital = Hospital.make(tmp_path, SECURE)
    parameters = model.flatten(model.build(SECURE))
    task = hospital.task(1, parameters)
    hospital.ask(task)  # decodes the images, once
    hospital.forget()
    num_steps = hospital.ask(task)
    assert num_steps is not None and num_steps > 30, "every step is counted"
    for kill_at in range(first, num_steps, EVERY):
        hospital.forget()
        assert hospital.ask(task, kill_at=kill_at) is None
        hospital.check([task])
        assert hospital.ask(task) is not None
        hospital.check([task])
        assert hospital.outputs(task)


def test_the_check_above_finds_two_outputs_of_one_task(tmp_path: Path) -> None:
    hospital = Hospital.make(tmp_path, SECURE)
    task = hospital.task(1, model.flatten(model.build(SECURE)))
    hospital.ask(task)
    hospital.check([task])
    (hospital.sent / f"{task.identity}.1").write_bytes(np.ones(3).tobytes())
    with pytest.raises(AssertionError, match="two outputs"):
        hospital.check([task])


@pytest.mark.slow
def test_runs_with_random_kills_and_repeats_end_like_an_undisturbed_one() -> None:
    assert crash.repeat(8, seed=1) == 0
    assert SEEDED.randomness == "seeded"
