from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from client.noise import Key, secure_key, seeded_key

GOLDEN = [1625302817203464410, 8289272364640812680]
SEEDED: dict[str, Any] = {"seed": 3, "plan_hash": "ab" * 32, "server_round": 2, "site": "north"}


def words(key: Key, purpose: str = "noise") -> list[int]:
    values: list[int] = key.stream(purpose).integers(0, 2**63, size=8).tolist()
    return values


def test_stream_follows_from_key_and_purpose() -> None:
    key = Key(secret=bytes(32))
    assert words(key) == words(key)
    assert words(key) != words(key, "sampling")
    assert words(key) != words(Key(secret=bytes(31) + b"\x01"))


def test_streams_of_two_purposes_are_uncorrelated() -> None:
    key = Key(secret=bytes(range(32)))
    first, second = (key.stream(purpose).standard_normal(100_000) for purpose in ("noise", "cases"))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.013, "four standard deviations"


@pytest.mark.parametrize(
    ("name", "value"), [("seed", 4), ("plan_hash", "b" * 64), ("server_round", 3), ("site", "s")]
)
def test_seeded_key_is_repeatable_and_depends_on_everything_it_is_named_by(
    name: str, value: int | str
) -> None:
    assert seeded_key(**SEEDED) == seeded_key(**SEEDED)
    assert seeded_key(**(SEEDED | {name: value})) != seeded_key(**SEEDED)


def test_seeded_keys_of_neighbouring_names_are_not_confused() -> None:
    """Round 1 at site "2/x" is not round "1/2" at site "x"."""
    ours = seeded_key(seed=1, plan_hash="a", server_round=1, site="2-x")
    assert ours != seeded_key(seed=11, plan_hash="a", server_round=2, site="x")


def test_secure_keys_are_256_bits_and_never_the_same() -> None:
    keys = [secure_key() for _ in range(100)]
    assert {len(key.secret) for key in keys} == {32}
    assert len({key.secret for key in keys}) == 100


def test_stream_has_not_changed_since_it_was_first_released() -> None:
    """The seeded numbers of the first release: a run must be repeatable with a later one."""
    assert words(seeded_key(seed=0, plan_hash="0" * 64, server_round=1, site="a"))[:2] == GOLDEN


def test_stream_is_the_same_in_another_process() -> None:
    code = (
        "from client.noise import seeded_key\n"
        "key = seeded_key(seed=3, plan_hash='ab' * 32, server_round=2, site='north')\n"
        "print(key.stream('noise').standard_normal(3).tolist())"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.strip() == str(seeded_key(**SEEDED).stream("noise").standard_normal(3).tolist())


def test_keys_and_streams_do_not_touch_torch_or_numpy_globals() -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state(legacy=False)
    secure_key().stream("noise").standard_normal(10)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert str(np.random.get_state(legacy=False)) == str(numpy_state)


def test_normal_numbers_pass_kolmogorov_smirnov() -> None:
    drawn = np.sort(Key(secret=bytes(32)).stream("noise").standard_normal(50_000, dtype=np.float32))
    normal = torch.special.ndtr(torch.from_numpy(drawn.astype(np.float64))).numpy()
    steps = np.arange(len(drawn) + 1) / len(drawn)
    distance = max((normal - steps[:-1]).max(), (steps[1:] - normal).max())
    assert distance * np.sqrt(len(drawn)) < 1.95, "the 0.1 % quantile of Kolmogorov's distribution"
