"""Whose turn it is: the sites that are asked to train in a round of ``plan.sites_per_round`` of them.

The coordinator draws, and no site can check it: nothing that is promised to patients relies on the draw.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice

from common.plan import Plan


def key_of(plan: Plan) -> str:
    """Returns what decides the draws of a run: 64 hexadecimal digits, from the plan's seed where all
    randomness is, else from the operating system."""
    if plan.randomness == "secure":
        return secrets.token_hex(32)
    return hashlib.sha256(f"turns {plan.seed}".encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """The sites of a round by name, and the turns of all sites after it; see ``draw``."""

    names: tuple[str, ...]
    turns: Mapping[str, int]


def draw(names: Collection[str], *, turns: Mapping[str, int], count: int, key: str) -> Drawn:
    """Draws the sites of a round at random among those whose turn it is.

    The sites go round: all have had a turn before one has the next. So of n sites that stay none is asked
    more than ceil(rounds * count / n) times, nor less than floor of it. A site that comes later joins the
    present turn and makes up for none that it missed.

    Args:
        names: of the sites that may be asked; all of them where they are ``count`` at most.
        turns: how many turns each site had that was ever asked, those before it came included.
        key: see ``key_of``. The draw is a function of the arguments.
    """
    least = max((turns[name] for name in names if name in turns), default=0) - 1
    waiting = {name: turn if (turn := turns.get(name, 0)) > least else least for name in names}
    chosen: list[str] = []
    for turn in sorted(set(waiting.values())):
        if len(chosen) < count:  # only those are ranked among whom is drawn
            ranked = _ranked(tuple(names), key=key, turn=turn)
            chosen += islice((name for name in ranked if waiting[name] == turn), count - len(chosen))
    chosen.sort()
    return Drawn(names=tuple(chosen), turns={**turns, **{name: waiting[name] + 1 for name in chosen}})


def first_turn(name: str, *, key: str) -> bytes:
    """Returns what the first turns of sites are ordered by; of sites that stay, ``draw`` asks the least
    first."""
    return _rank(name, key=key, turn=0)


@lru_cache(maxsize=2)  # a turn lasts for several rounds
def _ranked(names: tuple[str, ...], *, key: str, turn: int) -> tuple[str, ...]:
    """Returns the names in the order in which a turn asks them."""
    return tuple(sorted(names, key=partial(_rank, key=key, turn=turn)))


def _rank(name: str, *, key: str, turn: int) -> bytes:
    return hashlib.sha256(f"{key} {turn} {name}".encode()).digest()
