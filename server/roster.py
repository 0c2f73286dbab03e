"""Which sites take part: found on the grid, asked to prepare until they have decided, known by their
enrolled name."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import numpy as np
from flwr.app import Message

from common import exchange
from common.calibration import require_reachable
from common.errors import InvalidReply, PrivacyTargetError
from common.exchange import Prepared, Task
from common.plan import Plan
from common.trail import Trail
from server.approvals import pause_seconds
from server.heads import Heads, taken_from
from server.mailbox import Mailbox
from server.revoked import REVOKED

_LOOK_SECONDS = 0.1
_ATTEMPTS = 3
"""How often a site is asked to prepare that does not answer; one that answers wrongly is asked once."""


class Roster:
    """The sites of a run.

    Args:
        first_turn: sorts names: sites are prepared in the order in which they will be asked, so that a grid
            that gives its processes a site each in turn has those of a round with different ones.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        *,
        plan: Plan,
        run: str,
        trail: Trail,
        heads: Heads,
        first_turn: Callable[[str], bytes] = lambda _: b"",
    ) -> None:
        self._mailbox = mailbox
        self._plan = plan
        self._run = run
        self._trail = trail
        self._heads = heads
        self._first_turn = first_turn
        self._names: dict[int, str] = {}
        self._reached: dict[str, int] = {}  # by name: the node that is asked
        self._attempts: Counter[int] = Counter()
        self._asked = time.monotonic()
        self._ask_again = 0.0
        self._settled: Mapping[int, str] | None = None  # the nodes that are online, if none is left to ask
        self._takers: dict[str, dict[str, int]] = {}  # by purpose, as long as nothing changes
        self.sites: dict[str, Prepared] = {}
        """Every site that answered, by name."""
        self.answers = 0
        """How many answers to prepare were admitted."""

    def gather(self) -> None:
        """Waits until the plan's number of sites is there, or the deadline; then prepares them."""
        end = time.monotonic() + self._plan.node_deadline_seconds
        while len(self._nodes()) < self._plan.sites and time.monotonic() < end:
            time.sleep(_LOOK_SECONDS)
        self.admit_newcomers()

    def await_decisions(self, *, seconds: float, learn: Callable[[], None]) -> None:
        """Asks the sites that wait for a person's approval again and again, until all the sites that are
        expected have decided, or for so long. ``learn`` is called whenever they were asked."""
        end = time.monotonic() + seconds
        while self.waiting and len(self.nodes("deliver")) < self._plan.sites:
            left = end - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(left, max(_LOOK_SECONDS, self._ask_again - time.monotonic())))
            self.admit_newcomers()
            learn()

    @property
    def waiting(self) -> list[str]:
        """The sites that are known to wait for a person's approval."""
        return sorted(name for name, site in self.sites.items() if site.status == "waiting")

    def admit_newcomers(self) -> None:
        """Prepares the sites that have come since, and again those that waited for a person's approval.

        Others that were seen before are not asked again. Nor is one that comes as another node because its
        key was renewed: it is the same site.
        """
        online = self._nodes()
        if online is self._settled:
            return
        known = {node: name for node, name in online.items() if name in self.sites}
        self._names |= known
        self._reached |= {name: node for node, name in known.items()}
        newcomers = {node: name for node, name in online.items() if self._is_to_ask(node)}
        if newcomers:
            self._ask(newcomers)
        self._takers.clear()
        self._settled = None if any(map(self._is_left, online)) else online

    def _ask(self, newcomers: Mapping[int, str]) -> None:
        task = Task(
            run=self._run,
            plan_hash=self._plan.hash,
            server_round=0,
            purpose="prepare",
            part="",
            parameters=np.zeros(0, dtype=np.float32),
        )
        ttl = self._plan.reply_deadline_seconds + self._plan.grace_seconds
        messages = [
            Message(
                exchange.task_record(replace(task, head=self._heads.of(name))),
                dst_node_id=node,
                message_type=exchange.PREPARE,
                ttl=ttl,
                group_id="0",
            )
            for node, name in sorted(newcomers.items(), key=lambda one: self._first_turn(one[1]))
        ]
        deadline = self._plan.reply_deadline_seconds
        for node, reply in self._mailbox.ask(messages, deadline_seconds=deadline):
            self._admit(node, enrolled=newcomers[node], reply=reply)
        now = time.monotonic()
        self._ask_again = now + pause_seconds(now - self._asked)

    def _is_to_ask(self, node: int) -> bool:
        return self._is_left(node) and (node not in self._names or time.monotonic() >= self._ask_again)

    def _is_left(self, node: int) -> bool:
        """Says whether a node is to be asked now or later: it has not decided yet."""
        if self._attempts[node] >= _ATTEMPTS:
            return False
        return node not in self._names or self.sites[self._names[node]].status == "waiting"

    def strike(self, names: Collection[str]) -> None:
        """Asks these sites no more: they were revoked. One that is enrolled again comes with the next run."""
        for name in self.sites.keys() & names:
            self.sites[name] = replace(self.sites[name], status=REVOKED)
            self._takers.clear()

    def name(self, node: int) -> str:
        """Returns the name of a site's node."""
        known = self._mailbox.addresses.name(node)
        return self._names.get(node, known if known in self.sites else f"node {node}")

    def nodes(self, purpose: str) -> Mapping[str, int]:
        """Returns the nodes to ask, in the order of site names: "train", a part to evaluate, or "deliver"."""
        if purpose not in self._takers:
            self._takers[purpose] = {
                name: self._reached[name]
                for name in sorted(self._reached)
                if _takes(self.sites[name], purpose)
            }
        return self._takers[purpose]

    def _admit(self, node: int, *, enrolled: str, reply: Message | None) -> None:
        is_answer = reply is not None and not reply.has_error()
        self._attempts[node] += _ATTEMPTS if is_answer else 1
        try:
            if reply is None or reply.has_error():
                raise InvalidReply("missing" if reply is None else "app_failed")
            exchange.require_accepted(reply.content)
            head = taken_from(reply.content)
            prepared = exchange.read_prepared(reply.content)
            if enrolled and prepared.site != enrolled:
                raise InvalidReply("other_name")
            if prepared.site in self._reached and self._names.get(node) != prepared.site:
                raise InvalidReply("second_node")
            if prepared.status == "approved":
                self._require_reachable(prepared)
        except InvalidReply as problem:
            self._trail.record("site_rejected", site=enrolled or f"node {node}", code=problem.code)
            return
        self._heads.keep(prepared.site, head)
        self._reach(node, prepared.site)
        self._attempts[node] = 0
        former = self.sites.get(prepared.site)
        self.sites[prepared.site] = prepared
        self.answers += 1
        if former is None or (former.status, former.reason) != (prepared.status, prepared.reason):
            self._trail.record(
                "site_prepared", site=prepared.site, status=prepared.status, reason=prepared.reason
            )

    def _reach(self, node: int, name: str) -> None:
        former = self._names.get(node, name)
        if former != name and self._reached.get(former) == node:
            del self._reached[former]
        self._names[node] = name
        self._reached[name] = node

    def _require_reachable(self, site: Prepared) -> None:
        """The noise of a site is computed here from its public number, so there must be one."""
        try:
            require_reachable(self._plan, nominal_patients=site.nominal_patients)
        except PrivacyTargetError:
            raise InvalidReply("unreachable_target") from None

    def _nodes(self) -> Mapping[int, str]:
        """Node ids on the grid with the enrolled name, "" where the grid gives none."""
        return self._mailbox.addresses.online()


def _takes(site: Prepared, purpose: str) -> bool:
    if site.status != "approved":
        return False
    if purpose == "train":
        return site.role == "training"
    return purpose == "deliver" or purpose in site.parts
