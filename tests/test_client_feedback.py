from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client import feedback
from client.site import Site
from common.errors import StateError
from common.exchange import Task
from common.quantisation import BLOCK, Form, restored
from tests.sites import write_site

SIZE = 600


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return write_site(tmp_path / "north")


def task(server_round: int, *, run: str = "r-1") -> Task:
    return Task(
        run=run,
        plan_hash="0" * 64,
        server_round=server_round,
        purpose="train",
        part="",
        parameters=np.zeros(SIZE, np.float32),
    )


def update(number: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(number).standard_normal(SIZE).astype(np.float32)


def sent(site: Site, number: int, *, form: Form = "int8", run: str = "r-1") -> np.ndarray[Any, Any]:
    return restored(feedback.quantised(site, task(number, run=run), update(number), form=form))


@pytest.mark.parametrize("form", tuple(BLOCK))
def test_over_the_rounds_nothing_is_lost_but_what_is_left_at_the_end(site: Site, form: Form) -> None:
    """The sums telescope: what all rounds sent is what all rounds trained, but for one round's rounding."""
    numbers = range(1, 21)
    total = sum(sent(site, number, form=form).astype(np.float64) for number in numbers)
    trained = sum(update(number).astype(np.float64) for number in numbers)
    one = np.abs(sent(site, 1, form=form, run="other") - update(1)).max()
    without = sum(sent(site, number, form=form, run=f"alone-{number}") for number in numbers) - trained
    assert np.abs(total - trained).max() < 2 * one
    assert np.abs(without).max() > 2 * one, "without feedback the errors of twenty rounds add up"


def test_a_task_that_is_done_again_gives_the_same_bits(site: Site) -> None:
    first = [sent(site, number).tobytes() for number in (1, 2, 3)]
    assert [sent(site, number).tobytes() for number in (3, 2, 3)] == [first[2], first[1], first[2]]


def test_runs_do_not_know_each_other(site: Site) -> None:
    sent(site, 1)
    assert sent(site, 2, run="r-2").tobytes() != sent(site, 2).tobytes()
    assert sent(site, 2, run="r-3").tobytes() == sent(site, 2, run="r-4").tobytes()


def test_a_round_that_the_site_missed_changes_nothing(site: Site) -> None:
    sent(site, 1, run="a")
    sent(site, 1, run="b")
    assert sent(site, 2, run="a").tobytes() == sent(site, 2, run="b").tobytes()
    assert (
        restored(feedback.quantised(site, task(5, run="a"), update(5), form="int8")).tobytes()
        == restored(feedback.quantised(site, task(3, run="b"), update(5), form="int8")).tobytes()
    )


def test_fp32_keeps_nothing(site: Site) -> None:
    assert sent(site, 1, form="fp32").tobytes() == update(1).tobytes()
    assert not (site.state / "feedback").exists()


def test_few_files_are_kept_and_none_of_a_run_that_is_over(site: Site) -> None:
    for number in range(1, 10):
        sent(site, number)
    directory = site.state / "feedback" / "r-1"
    assert sorted(path.name for path in directory.iterdir()) == [f"00000{n}.safetensors" for n in (7, 8, 9)]
    feedback.forget(site, run="r-1")
    assert not directory.exists()


@pytest.mark.parametrize("data", [b"", b"damage", b"\x08\0\0\0\0\0\0\0{}      "])
def test_damage_is_named(site: Site, data: bytes) -> None:
    sent(site, 1)
    (site.state / "feedback" / "r-1" / "000001.safetensors").write_bytes(data)
    with pytest.raises(StateError, match=r"000001\.safetensors, found damage"):
        sent(site, 2)


def test_what_is_left_of_another_model_is_refused(site: Site) -> None:
    sent(site, 1)
    with pytest.raises(StateError, match="Expected 2 values"):
        feedback.quantised(site, task(2), np.zeros(2, np.float32), form="int8")
