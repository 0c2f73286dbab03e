"""The round loop: ask, validate, aggregate, checkpoint; every failure explicit, one reply in memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from common import exchange, measure, metrics, quantisation, received
from common.arrays import unpacked
from common.calibration import measure_noise_std
from common.errors import InvalidReply, QuorumNotReached
from common.exchange import Prepared, Task
from common.measure import Statistic
from common.metrics import Histogram, Scores
from common.model import FlatArray
from common.plan import NoPrivacy, Plan
from common.trail import Trail
from server import approvals
from server.attendance import Attendances
from server.checkpoint import RoundRecord, RunState
from server.heads import Heads, taken_from
from server.mailbox import NOT_READABLE, Mailbox
from server.norm import largest_norm
from server.revoked import REVOKED
from server.roster import Roster
from server.strategy import descended
from server.turns import draw, first_turn, key_of

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Released:
    """What sites released about one part: statistics and the noise in each count, by site."""

    statistics: Mapping[str, Statistic]
    noise_std: Mapping[str, float]


class Rounds:
    """One run of a plan over a grid.

    Args:
        strategy: made for a roster, since Flower's interface lets it choose whom to ask.
        revoked: returns the names of the sites that are let in no more.
        save: called with the state after every round, before the next begins.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        plan: Plan,
        state: RunState,
        strategy: Callable[[Callable[[str], list[int]]], Strategy],
        trail: Trail,
        heads: Heads,
        save: Callable[[RunState], None],
        revoked: Callable[[], frozenset[str]] = frozenset,
    ) -> None:
        self._grid = grid
        self._plan = plan
        self._trail = trail
        self._heads = heads
        self._save = save
        self._revoked = revoked
        self._mailbox = Mailbox(grid)
        self._roster = Roster(
            self._mailbox, plan=plan, run=state.run, trail=trail, heads=heads, first_turn=self._first_turn
        )
        self._attendances = Attendances(
            state.attendance, mailbox=self._mailbox, roster=self._roster, trail=trail, revoked=revoked
        )
        self._strategy = strategy(lambda purpose: list(self._nodes(purpose)))
        self._state = state
        self._learned: tuple[int, frozenset[str]] | None = None  # what _learn_sites saw last

    @property
    def state(self) -> RunState:
        """The last good state; kept when the run fails."""
        return replace(self._state, attendance=self._attendances.by_site)

    def run(self) -> Released:
        """Runs all rounds that are left, evaluates the test part, delivers the model.

        Raises:
            QuorumNotReached: a round had fewer valid updates than the plan's quorum.
        """
        self._keep_turns_key()
        self._roster.gather()
        self._learn_sites()
        if self._state.server_round == 0 and self._roster.waiting:
            self._await_approval()
        while self._state.server_round < self._plan.rounds:
            self._roster.admit_newcomers()
            self._learn_sites()
            self._attendances.count_late()
            self._round(self._state.server_round + 1)
        test = Released(statistics={}, noise_std={})
        if self._plan.evaluation.test_at_end:
            test = self._evaluate("test", self._plan.rounds)
        self._learn_sites()
        self._deliver()
        self._attendances.count_away(server_round=self._state.server_round + 1)
        self._attendances.count_late()
        self._attendances.count_bytes()
        return test

    def _await_approval(self) -> None:
        """Waits for persons at the sites; the deadline counts from the first asking, whatever died since."""
        deadline = self._plan.approval_deadline_seconds
        left = approvals.seconds_left(self._state.waiting_since, deadline_seconds=deadline)
        if left > 0:
            self._trail.record("approval_awaited", sites=self._roster.waiting, seconds=left)
            self._roster.await_decisions(seconds=left, learn=self._learn_sites)

    def _keep_turns_key(self) -> None:
        """Keeps what decides the draws before the first, so that a restart asks the same sites."""
        if self._plan.sites_per_round is not None and not self._state.turns_key:
            self._state = replace(self._state, turns_key=key_of(self._plan))
            self._save(self.state)

    def _first_turn(self, name: str) -> bytes:
        return first_turn(name, key=self._state.turns_key) if self._state.turns_key else b""

    def _nodes(self, purpose: str) -> Sequence[int]:
        """Returns the nodes to ask, by site name; of the training sites those whose turn it is."""
        nodes = self._roster.nodes(purpose)
        count, state = self._plan.sites_per_round, self._state
        if purpose != "train" or count is None:
            return list(nodes.values())
        found = draw(nodes, turns=state.turns, count=count, key=state.turns_key)
        self._state = replace(state, turns=dict(found.turns))
        return [nodes[name] for name in found.names]

    def _round(self, server_round: int) -> None:
        start = time.monotonic()
        plan = self._plan
        self._attendances.count_bytes()  # those before the round
        task = self._task(server_round, "train", "")
        record = exchange.task_record(task, form=plan.exchange.update)
        messages = list(self._strategy.configure_train(server_round, *_parts(record), self._grid))
        self._note_asked("round_started", messages, task, rounds=plan.rounds)
        valid: list[str] = []
        replies = self._valid_updates(messages, server_round=server_round, valid=valid)
        arrays, measures = self._strategy.aggregate_train(server_round, replies)
        self._attendances.count_away(server_round=server_round)
        if len(valid) < plan.quorum or arrays is None or measures is None:
            raise QuorumNotReached(
                f"Expected at least {plan.quorum} valid updates in round {server_round} for "
                f"strategy={plan.strategy.name}, found "
                f"{len(valid)} of {len(messages)} asked; {self._attendances.reasons()}. "
                f"The model after round {server_round - 1} is kept."
            )
        loss = measures.get("train-loss")
        record_of_round = RoundRecord(
            server_round=server_round,
            seconds=time.monotonic() - start,
            sites_asked=len(messages),
            sites_valid=len(valid),
            train_loss=None if loss is None else float(str(loss)),
        )
        parameters, velocity = descended(
            self._state.parameters, self._state.velocity, unpacked(arrays["update"]), asked=plan.strategy
        )
        if server_round == plan.rounds:
            parameters = self._carried(parameters)  # the model that sites test and keep is the result
        self._state = replace(
            self._state, server_round=server_round, parameters=parameters, velocity=velocity
        )
        if server_round in plan.validation_rounds:
            record_of_round = self._validated(record_of_round)
        crossed = self._attendances.count_bytes()
        record_of_round = replace(record_of_round, bytes_down=crossed.down, bytes_up=crossed.up)
        self._state = replace(self._state, rounds=(*self._state.rounds, record_of_round))
        self._save(self.state)
        self._trail.record(
            "round_finished",
            round=server_round,
            rounds=plan.rounds,
            sites_valid=len(valid),
            train_loss=record_of_round.train_loss,
            auroc=record_of_round.auroc,
            dice=record_of_round.dice,
        )

    def _valid_updates(
        self, messages: list[Message], *, server_round: int, valid: list[str]
    ) -> Iterator[Message]:
        """Yields validated replies one at a time; records what became of each."""

        def read(name: str, reply: Message) -> Message:
            if name in valid:
                raise InvalidReply("second_reply")
            site = self._roster.sites[name]
            update = exchange.read_update(
                reply.content,
                server_round=server_round,
                num_parameters=len(self._state.parameters),
                form=self._plan.exchange.update,
                bound=self._plan.strategy.update_bound,
                max_norm=self._max_norm(site),
                weight=self._weight(site),
            )
            if self._plan.exchange.update != "fp32":  # for Flower's strategies
                reply.content = exchange.update_record(update)
            return reply

        for name, reply in self._answers(messages, server_round=server_round, read=read):
            valid.append(name)
            self._attendances.note_update(name, server_round=server_round)
            yield reply
            del reply

    def _answers(
        self, messages: Sequence[Message], *, server_round: int, read: Callable[[str, Message], T]
    ) -> Iterator[tuple[str, T]]:
        """Asks sites, and yields the name of each that answered and what was read of its reply; one is in
        memory.

        Args:
            read: (name, reply) -> what is wanted of its content; raises ``InvalidReply``, which is counted.
        """
        for node, reply in self._mailbox.ask(messages, deadline_seconds=self._plan.reply_deadline_seconds):
            name = self._roster.name(node)
            try:
                reply = _answered(reply)
                self._heads.keep(name, taken_from(reply.content))  # what it says about the site's ledger
                found = read(name, reply)
            except InvalidReply as problem:
                self._attendances.note_problem(name, problem.code, server_round=server_round)
                continue
            yield name, found
            del reply, found

    def _max_norm(self, site: Prepared) -> float:
        asked = self._plan.strategy.max_update_norm
        possible = largest_norm(
            self._plan, nominal_patients=site.nominal_patients, parameters=self._state.parameters
        )
        return possible if asked is None else min(asked, possible)

    def _weight(self, site: Prepared) -> float | None:
        """The public weight that a site's reply must carry; None where its exact count is the weight."""
        match self._plan.strategy.weights:
            case "equal":
                return 1.0
            case "nominal":
                return float(site.nominal_patients)
            case "examples":
                return None

    def _validated(self, record: RoundRecord) -> RoundRecord:
        released = self._evaluate("validation", record.server_round)
        if not released.statistics:
            return record
        pooled = measure.merge(released.statistics)
        noise_std = math.hypot(*(released.noise_std[site] for site in sorted(released.noise_std)))
        key = measure.headline(self._plan.target).key
        found: dict[str, Any] = {
            key: measure.value(pooled),
            f"{key}_interval": measure.interval(pooled, noise_std=noise_std),
        }
        if isinstance(pooled, Histogram | Scores):
            found["accuracy"] = metrics.accuracy(pooled)
        return replace(record, **found)

    def _evaluate(self, part: str, server_round: int) -> Released:
        task = self._task(server_round, "evaluate", part)
        record = exchange.task_record(task, form=self._plan.exchange.update)
        messages = list(self._strategy.configure_evaluate(server_round, *_parts(record), self._grid))
        self._note_asked("evaluation_started", messages, task, part=part)

        def read(name: str, reply: Message) -> Statistic:
            kinds = measure.arrays_of(
                self._plan.asked, bins=self._plan.evaluation.bins, exact=self._is_exact(name)
            )
            try:
                scored = exchange.read_scored(
                    reply.content, server_round=server_round, part=part, expected=kinds
                )
                return measure.statistic(scored.arrays)
            except ValueError:
                raise InvalidReply("scores") from None

        statistics: dict[str, Statistic] = {}
        for name, statistic in self._answers(messages, server_round=server_round, read=read):
            statistics[name] = statistic
            self._attendances.note_scores(name, server_round=server_round, part=part)
        noise_std = {
            name: measure_noise_std(
                self._plan, nominal_patients=self._roster.sites[name].nominal_patients, part=part
            )
            for name in statistics
            if not self._is_exact(name)
        }
        return Released(statistics=statistics, noise_std=noise_std)

    def _is_exact(self, name: str) -> bool:
        """Says whether a site sends exact scores."""
        return isinstance(self._plan.privacy, NoPrivacy) or self._roster.sites[name].data == "public"

    def _deliver(self) -> None:
        """Sends the final model to every site that takes part."""
        task = self._task(self._plan.rounds, "deliver", "")
        record = exchange.task_record(task, form=self._plan.exchange.update)
        ttl = self._plan.reply_deadline_seconds + self._plan.grace_seconds
        messages = [
            Message(record, dst_node_id=node, message_type=exchange.DELIVER, ttl=ttl, group_id="deliver")
            for node in self._roster.nodes("deliver").values()
        ]
        last = self._plan.rounds
        for name, _ in self._answers(messages, server_round=last, read=lambda name, reply: None):
            self._trail.record("model_delivered", site=name)

    def _task(self, server_round: int, purpose: exchange.Purpose, part: str) -> Task:
        return Task(
            run=self._state.run,
            plan_hash=self._state.plan_hash,
            server_round=server_round,
            purpose=purpose,
            part=part,
            parameters=self._carried(self._state.parameters),
        )

    def _carried(self, parameters: FlatArray) -> FlatArray:
        return quantisation.carried(parameters, form=self._plan.exchange.update)

    def _learn_sites(self) -> None:
        revoked = self._revoked()
        self._roster.strike(revoked)
        news = (self._roster.answers, revoked)
        if news == self._learned:  # as in most rounds, which then do not look at every site
            return
        self._learned, former = news, self._state.waiting_since
        waiting = approvals.since(former, self._roster.waiting)
        sites = {**self._state.sites, **self._roster.sites}
        sites |= {name: replace(sites[name], status=REVOKED) for name in revoked & sites.keys()}
        if sites != self._state.sites:  # else the checkpoint sees what it saw, and writes nothing down again
            self._state = replace(self._state, sites=sites)
        self._state = replace(self._state, waiting_since=waiting)
        if waiting != former and self._state.server_round == 0:
            self._save(self.state)  # so that a restart does not wait as long again

    def _note_asked(self, event: str, messages: list[Message], task: Task, **more: Any) -> None:
        asked = [self._roster.name(message.metadata.dst_node_id) for message in messages]
        told = {"round": task.server_round, **more, "sites": len(asked), "asked": asked}
        self._trail.record(event, **told, task=task.identity)


def _answered(reply: Message | None) -> Message:
    """Returns a reply that has a content.

    Raises:
        InvalidReply: there is none: missing at the deadline, an error of the site's process, a refusal.
    """
    if reply is None:
        raise InvalidReply("missing")
    if reply.has_error():
        if reply.error.code == NOT_READABLE:
            raise InvalidReply("unreadable")
        raise InvalidReply(f"error_{int(reply.error.code)}")
    exchange.require_accepted(reply.content)
    return reply


def _parts(task: RecordDict) -> tuple[ArrayRecord, ConfigRecord]:
    return received.part(task, "arrays", ArrayRecord), received.part(task, "task", ConfigRecord)
