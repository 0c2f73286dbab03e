"""Noise, sampling and augmentation at a site owe nothing to torch's or numpy's own generators."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from client import work
from client.site import Site
from common import model
from common.exchange import Purpose, Task
from common.model import FlatArray
from common.plan import Plan
from tests.plans import TINY, plan
from tests.sites import write_site

SMALL: dict[str, Any] = {
    **TINY,
    "training__local_steps": 3,
    "training__expected_batch": 4,
    "training__cases_per_patient": 1,
    "training__augmentation": {
        "copies": 2,
        "max_shift_fraction": 0.2,
        "max_rotation_degrees": 30.0,
        "max_zoom_fraction": 0.2,
        "flip_axes": [1],
        "max_gamma": 1.5,
        "max_noise_std": 0.1,
    },
}

IN_PLACE = (
    *("bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "normal_"),
    *("random_", "uniform_"),
)
NEW = ("rand", "randn", "randperm", "randint", "rand_like", "randn_like", "randint_like")
DRAWN = ("bernoulli", "multinomial", "normal", "poisson")
NUMPY = (
    "random",
    "rand",
    "randn",
    "randint",
    "normal",
    "standard_normal",
    "uniform",
    "choice",
    "permutation",
)


def constant(value: float) -> Callable[..., Any]:
    """A function that returns one number, whatever it is asked for; in place where it has a tensor."""

    def replaced(*arguments: Any, **settings: Any) -> Any:
        if arguments and isinstance(arguments[0], torch.Tensor):
            return arguments[0].fill_(value)
        return torch.full(arguments[0] if isinstance(arguments[0], tuple) else arguments[:1], value)

    return replaced


@contextmanager
def constant_generators(value: float, *, seed: int) -> Iterator[None]:
    """Torch's, numpy's and Python's own ways of drawing return ``value``; generators start at ``seed``."""
    with ExitStack() as replaced:
        for name in (*NEW, *DRAWN):
            replaced.enter_context(patch.object(torch, name, constant(value)))
        for name in IN_PLACE:
            replaced.enter_context(patch.object(torch.Tensor, name, constant(value)))
        for name in NUMPY:
            replaced.enter_context(patch.object(np.random, name, constant(value)))
        replaced.enter_context(patch.object(random, "random", lambda: value))
        seeded = torch.default_generator.manual_seed(seed)
        replaced.enter_context(patch.object(torch, "Generator", lambda *_, **__: seeded))
        np.random.seed(seed)
        random.seed(seed)
        yield


def test_generators_of_torch_are_constant_in_the_tests_below() -> None:
    with constant_generators(0.25, seed=1):
        assert set(torch.randn(4).tolist()) == {0.25}
        assert set(torch.empty(4).normal_().tolist()) == {0.25}
        assert set(torch.nn.init.uniform_(torch.empty(4)).tolist()) == {0.25}
        assert set(torch.normal(torch.zeros(4), 1.0).tolist()) == {0.25}
        first = torch.Generator().get_state()
    with constant_generators(0.25, seed=1):
        assert torch.equal(torch.Generator().get_state(), first)
    assert len(set(torch.randn(4).tolist())) == 4


def released(site: Site, asked: Plan, start: FlatArray, *, purpose: Purpose, number: int) -> list[bytes]:
    """What a site releases of a task, as bytes; every task is another by ``number``, as the ledger has it."""
    network = model.build(asked)
    task = Task(
        run=f"run-{number}",
        plan_hash=asked.hash,
        server_round=1 if purpose == "train" else asked.rounds,
        purpose=purpose,
        part="" if purpose == "train" else "test",
        parameters=start,
    )
    if purpose == "train":
        update = work.train(site, asked, task, network=network)
        return [update.arrays["values"].tobytes(), repr(update.train_loss).encode()]
    return [work.evaluate(site, asked, task, network=network).arrays["histogram"].tobytes()]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A site whose patients have two cases each, one of which is chosen in a step."""
    return write_site(tmp_path / "north", unsafe_allow_seeded_noise=True, max_epsilon=100.0)


@pytest.mark.parametrize("purpose", ["train", "evaluate"])
def test_seeded_releases_are_bit_identical_whatever_the_generators_of_torch_return(
    site: Site, purpose: Purpose
) -> None:
    asked = plan(**SMALL, randomness="seeded")
    start = model.flatten(model.build(asked))
    plain = released(site, asked, start, purpose=purpose, number=0)
    for number, value in enumerate((0.0, 0.25, 1.0), start=1):
        with constant_generators(value, seed=number):
            assert released(site, asked, start, purpose=purpose, number=number) == plain


@pytest.mark.parametrize("purpose", ["train", "evaluate"])
def test_secure_releases_differ_under_identical_generators_of_torch(site: Site, purpose: Purpose) -> None:
    asked = plan(**SMALL, randomness="secure")
    start, found = model.flatten(model.build(asked)), []
    for number in range(3):
        with constant_generators(0.25, seed=1):
            found.append(released(site, asked, start, purpose=purpose, number=number))
    for values in zip(*found, strict=True):
        assert len(set(values)) == 3
