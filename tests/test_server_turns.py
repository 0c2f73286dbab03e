from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from hypothesis import given
from hypothesis import strategies as st

from common import exchange
from common.calibration import mechanism
from common.errors import ConfigError
from common.trail import read
from server import checkpoint
from server.turns import _rank, draw, first_turn, key_of
from tests.grid import Behaviour
from tests.plans import plan
from tests.rounds import run, site, tiny_plan


def drawn(names: Sequence[str], *, count: int, rounds: int, key: str = "k") -> list[tuple[str, ...]]:
    turns: dict[str, int] = {}
    found = []
    for _ in range(rounds):
        one = draw(names, turns=turns, count=count, key=key)
        found.append(one.names)
        turns = dict(one.turns)
    return found


def named(num_sites: int) -> list[str]:
    return [f"site-{number}" for number in range(num_sites)]


@given(num_sites=st.integers(1, 40), count=st.integers(1, 40), rounds=st.integers(1, 30), key=st.text())
def test_no_site_is_asked_more_or_less_than_its_share(
    num_sites: int, count: int, rounds: int, key: str
) -> None:
    names = named(num_sites)
    found = drawn(names, count=count, rounds=rounds, key=key)
    asked = Counter(name for one in found for name in one)
    each = min(count, num_sites)
    assert all(len(set(one)) == len(one) == each and list(one) == sorted(one) for one in found)
    share = rounds * each / num_sites
    assert all(math.floor(share) <= asked[name] <= math.ceil(share) for name in names)


@given(num_sites=st.integers(2, 30), count=st.integers(1, 10), rounds=st.integers(1, 10), seed=st.randoms())
def test_the_draw_depends_on_names_and_key_alone(num_sites: int, count: int, rounds: int, seed: Any) -> None:
    names = named(num_sites)
    found = drawn(names, count=count, rounds=rounds)
    seed.shuffle(names)
    assert drawn(names, count=count, rounds=rounds) == found


@given(data=st.data())
def test_sites_come_and_go_and_nobody_is_asked_twice_before_those_that_stay(data: Any) -> None:
    """A newcomer has no turns to make up for; one that was away has none of those that it missed."""
    stays, others = named(6), [f"other-{number}" for number in range(6)]
    turns: dict[str, int] = {}
    asked: Counter[str] = Counter()
    for _ in range(1, 20):
        there = [*stays, *data.draw(st.lists(st.sampled_from(others), unique=True))]
        one = draw(there, turns=turns, count=2, key="k")
        turns = dict(one.turns)
        asked.update(one.names)
        counts = [asked[name] for name in stays]
        assert max(counts) - min(counts) <= 1
        latest = max(turns[name] for name in there if name in turns)
        assert all(latest - 1 <= turns[name] for name in one.names)


def test_a_newcomer_is_asked_once_and_waits_for_its_next_turn() -> None:
    turns = dict.fromkeys(named(4), 7)
    first = draw([*named(4), "new"], turns=turns, count=1, key="k")
    assert first.names == ("new",) and first.turns["new"] == 7
    second = draw([*named(4), "new"], turns=first.turns, count=4, key="k")
    third = draw([*named(4), "new"], turns=second.turns, count=1, key="k")
    assert set(second.names) | set(third.names) == {*named(4), "new"}


@given(num_sites=st.integers(1, 40), count=st.integers(1, 40), key=st.text())
def test_sites_are_asked_for_the_first_time_in_the_order_of_their_first_turns(
    num_sites: int, count: int, key: str
) -> None:
    expected = sorted(named(num_sites), key=lambda name: first_turn(name, key=key))
    rounds = num_sites // count
    for number, names in enumerate(drawn(named(num_sites), count=count, rounds=rounds, key=key)):
        assert list(names) == sorted(expected[number * count : (number + 1) * count])


def test_sites_are_prepared_in_the_order_in_which_they_are_asked(tmp_path: Path) -> None:
    asked = tiny_plan(rounds=4, sites=8, sites_per_round=2, quorum=2)
    told: dict[str, list[str]] = {"prepare": [], "train": []}

    def noted(name: str) -> Behaviour:
        def behave(message: Message) -> Message | None:
            purpose = exchange.read_task(message.content).purpose
            told.get(purpose, []).append(name)
            return site(asked, name, 0.1)(message)

        return behave

    run(asked, {name: noted(name) for name in named(8)}, tmp_path)
    in_rounds = [sorted(told["prepare"][begin : begin + 2]) for begin in range(0, 8, 2)]
    assert [told["train"][begin : begin + 2] for begin in range(0, 8, 2)] == in_rounds
    assert len(set(told["prepare"])) == 8


def test_every_pass_through_the_sites_has_an_order_of_its_own() -> None:
    found = drawn(named(40), count=10, rounds=8)
    assert set(found[:4]) != set(found[4:])
    assert drawn(named(40), count=10, rounds=4, key="other") != found[:4]


def test_the_key_follows_from_the_seed_or_from_the_operating_system() -> None:
    seeded = plan(randomness="seeded", seed=3)
    assert key_of(seeded) == key_of(seeded) != key_of(plan(randomness="seeded", seed=4))
    assert key_of(plan()) != key_of(plan())


@pytest.mark.parametrize("asked", [1, 3])
def test_a_round_asks_at_least_the_quorum_and_at_most_all_sites(asked: int) -> None:
    with pytest.raises(ConfigError, match="expected quorum <= sites_per_round <= sites"):
        plan(sites=2, quorum=2, sites_per_round=asked)
    assert plan(sites=4, quorum=2, sites_per_round=3).sites_per_round == 3


class Cut(Exception):
    """The coordinator's machine goes."""


@pytest.mark.parametrize("randomness", ["secure", "seeded"])
def test_a_coordinator_that_died_in_a_round_asks_the_same_sites_again(
    randomness: str, tmp_path: Path
) -> None:
    asked = tiny_plan(rounds=6, sites=9, sites_per_round=2, quorum=2, randomness=randomness)
    names = named(9)
    alive = {name: site(asked, name, 0.1) for name in names}

    def cut(message: Message) -> Message | None:
        if exchange.read_task(message.content).server_round == 4:
            raise Cut
        return alive[message_site[message.metadata.dst_node_id]](message)

    message_site = {number: name for number, name in enumerate(names, 2)}
    with pytest.raises(Cut):
        run(asked, dict.fromkeys(names, cut), tmp_path)
    state = checkpoint.latest(tmp_path / "checkpoints", run="r", plan_hash=asked.hash)
    assert state is not None and state.server_round == 3
    finished = run(asked, alive, tmp_path, state=state)
    told = [
        (event["round"], event["asked"])
        for event in read(tmp_path / "events.jsonl")
        if event["event"] == "round_started"
    ]
    assert [number for number, _ in told] == [1, 2, 3, 4, 4, 5, 6] and told[3] == told[4]
    turns = Counter(name for place, (_, names_asked) in enumerate(told) if place != 3 for name in names_asked)
    assert sorted(turns[name] for name in names) == [1] * 6 + [2] * 3
    assert [entry.sites_asked for entry in finished.state.rounds] == [2] * 6


def test_epsilon_is_that_of_a_site_that_is_asked_in_every_round() -> None:
    """The coordinator draws and no site can check it: the draw earns nothing."""
    some, every = plan(sites=9, sites_per_round=2), plan(sites=9)
    assert mechanism(some, nominal_patients=200) == mechanism(every, nominal_patients=200)
    assert some.num_steps == every.num_steps


@given(
    turns=st.dictionaries(st.sampled_from(list("abcdefghijkl")), st.integers(0, 3)), count=st.integers(1, 13)
)
def test_the_draw_is_the_beginning_of_all_sites_in_order_of_turns_and_then_of_rank(
    turns: dict[str, int], count: int
) -> None:
    names = list("abcdefgh")
    latest = max((turns[name] for name in names if name in turns), default=0)

    def place(name: str) -> tuple[int, bytes]:
        turn = max(turns.get(name, 0), latest - 1)
        return turn, _rank(name, key="k", turn=turn)

    found = draw(names, turns=turns, count=count, key="k")
    assert found.names == tuple(sorted(sorted(names, key=place)[:count]))
