"""What a site does for each kind of task, with the privacy rules in their order:
approval, charge on disk, work, reply on disk, reply sent."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Final

from safetensors.numpy import save
from torch import nn

from client import (
    approval,
    course,
    evaluation,
    feedback,
    intensities,
    quarantine,
    release,
    run_folder,
    tally,
    trail,
    training,
    usage,
    waiting,
    withdrawal,
)
from client.cohort import Cohort, Part, open_cohort
from client.cost import planned_spends
from client.leaving import sends_exact_scores
from client.noise import Key, secure_key, seeded_key
from client.opened import OpenCohorts, Opened
from client.replies import Reply
from client.site import Site
from common import durable, model
from common.asked import Asked
from common.calibration import Mechanism, mechanism
from common.errors import LedgerError, PrivacyTargetError, Refusal
from common.exchange import Prepared, Scored, Task, Update
from common.measure import Exact
from common.plan import NoPrivacy, Plan

logger = logging.getLogger("feverfew.site")

PROGRESS_SECONDS: Final = 0.2
"""How often a task says how far it is; a step may take less than to write it down."""
PROGRESS_BYTES: Final = 256


def prepare(site: Site, plan: Plan, task: Task) -> Prepared:
    """Says whether this site takes part: approved, within budget, able. Releases public constants only.

    The cohort is opened here, so that the first round is not the one that decodes every image.
    """
    reason = ""
    try:
        approval.require(site, plan)
        course.require_plan(site, plan, run=task.run)
        _require_ledger(site, plan, task)
        _note_cohort(site, task.run, plan.hash, _open(site, plan))
        release.make_folder(site, is_exact=isinstance(plan.privacy, NoPrivacy))
    except Refusal as refusal:
        logger.info("declined: %s", refusal)
        reason = refusal.code
    except LedgerError as error:
        logger.error("%s", error)
        reason = "ledger_broken"
    status = {"": "approved", "not_approved": "waiting"}.get(reason, "declined")
    if status == "waiting":
        waiting.keep(site, plan)
    _note_answer(site, task.run, plan.hash, status, reason)
    return prepared(site, status=status, reason=reason)


@lru_cache(maxsize=64)
def sign_what_others_left(site: Site, *, run: str) -> None:
    """Signs the trail before the first line of a run: one that ended badly is not told so to the site."""
    trail.sign(site)


def prepared(site: Site, *, status: str, reason: str) -> Prepared:
    """Returns an answer to prepare: the site's public constants beside it."""
    return Prepared(
        site=site.name,
        status=status,
        reason=reason,
        role=site.settings.role,
        data=site.settings.data,
        nominal_patients=site.settings.nominal_patients,
        patient_is=site.settings.patient_is,
        parts=site.settings.split.parts,
        feverfew=_version(),
    )


@lru_cache(maxsize=1)
def _version() -> str:
    return version("feverfew")  # reads the files of the installation


def train(site: Site, plan: Plan, task: Task, *, network: nn.Module) -> Update:
    """Trains one round, or returns the stored reply where this very task was done before.

    Raises:
        Refusal: not approved, over budget, wrong parameters, wrong round, or an evaluation site.
    """
    _require_training(site, plan, asks_for_landmarks=False)
    approval.require(site, plan)
    chosen = _mechanism(site, plan)
    opened = _open(site, plan)
    part = opened.cohort.parts["train"]

    def work() -> Reply:
        _note_use(site, task.run, plan.hash, "train", opened)
        model.load(network, task.parameters)
        key = _key(site, plan, task)
        with _progress(site, plan, task) as on_step:
            trained = training.train_by_plan(
                network, part, plan=plan, mechanism=chosen, key=key, on_step=on_step
            )
        fields = {"weight": _weight(site, plan, part), "train_loss": trained.train_loss}
        arrays = feedback.quantised(site, task, trained.update, form=plan.exchange.update)
        return Reply(arrays=arrays, fields=fields)

    is_exact = isinstance(plan.privacy, NoPrivacy)
    spend = None if is_exact else chosen.training(plan.training.local_steps)
    _require_shape(network, task)
    course.enter(site, plan, task)
    reply = release.once(site, plan, task, part="train", spend=spend, work=work)
    loss = reply.fields["train_loss"]
    return Update(
        server_round=task.server_round,
        arrays=reply.arrays,
        weight=float(reply.fields["weight"] or 0),
        train_loss=None if loss is None else float(loss),
    )


def evaluate(site: Site, plan: Plan, task: Task, *, network: nn.Module) -> Scored:
    """Evaluates a part: noised histograms, or exact scores without privacy and for public data.

    Raises:
        Refusal: not approved, over budget, wrong parameters, wrong round, or a part that this site does not
            have.
    """
    if task.part not in ("validation", "test") or task.part not in site.settings.split.parts:
        raise Refusal("no_such_part")
    if plan.landmarks is not None:
        raise Refusal("not_in_plan")
    approval.require(site, plan)
    opened = _open(site, plan)
    part = opened.cohort.parts[task.part]
    is_exact = sends_exact_scores(plan, data=site.settings.data)
    chosen = _mechanism(site, plan)

    def work() -> Reply:
        _note_use(site, task.run, plan.hash, task.part, opened)
        model.load(network, task.parameters)
        exact = evaluation.exact(network, part, asked=plan.asked)
        _keep_scores(site, task, exact)
        if is_exact:
            return Reply(arrays=exact.arrays, fields={})
        noised = evaluation.noised(
            exact,
            asked=plan.asked,
            bins=plan.evaluation.bins,
            noise_multiplier=chosen.evaluation_noise_multiplier[task.part],
            noise=_key(site, plan, task).stream(f"evaluation/{task.part}"),
        )
        return Reply(arrays=noised.arrays, fields={})

    spend = None if is_exact else chosen.evaluation(task.part)
    _require_shape(network, task)
    course.enter(site, plan, task)
    reply = release.once(site, plan, task, part=task.part, spend=spend, work=work)
    return Scored(server_round=task.server_round, part=task.part, arrays=reply.arrays)


def landmarks(site: Site, plan: Plan, task: Task) -> Scored:
    """Counts the training part's patients by landmark of intensity: noised, or exact without privacy.

    Raises:
        Refusal: not approved, over budget, an evaluation site, or a plan that does not ask for it.
    """
    _require_training(site, plan, asks_for_landmarks=True)
    assert plan.landmarks is not None
    approval.require(site, plan)
    wanted, opened, chosen = plan.landmarks, _open(site, plan), _mechanism(site, plan)
    is_exact = isinstance(plan.privacy, NoPrivacy)

    def work() -> Reply:
        _note_use(site, task.run, plan.hash, "train", opened)
        counts = intensities.histograms(opened.cohort.parts["train"], plan.preprocessing, wanted=wanted)
        if not is_exact:
            noise = _key(site, plan, task).stream("landmarks")
            counts = intensities.noised(counts, noise_multiplier=chosen.noise_multiplier, noise=noise)
        return Reply(arrays={"landmarks": counts}, fields={})

    spend = None if is_exact else chosen.training(1)
    course.enter(site, plan, task)
    reply = release.once(site, plan, task, part="train", spend=spend, work=work)
    return Scored(server_round=task.server_round, part="train", arrays=reply.arrays)


def _require_training(site: Site, plan: Plan, *, asks_for_landmarks: bool) -> None:
    """Checks that the site's training part may be used, and for what the plan is about."""
    if site.settings.role != "training":
        raise Refusal("evaluation_only")
    if (plan.landmarks is not None) != asks_for_landmarks:
        raise Refusal("not_in_plan")


def keep_model(site: Site, plan: Plan, task: Task, *, network: nn.Module) -> Path:
    """Writes the final model to ``state/models/<run>/``; returns the directory."""
    approval.require(site, plan)
    _require_shape(network, task)
    course.enter(site, plan, task)
    directory = site.state / "models" / task.run
    directory.mkdir(parents=True, exist_ok=True)
    durable.write(directory / "plan.json", plan.to_json().encode())
    named = model.named_arrays(network, task.parameters)
    durable.write(directory / "model.safetensors", save(named))
    feedback.forget(site, run=task.run)
    trail.record(site, "model_received", run=task.run, plan_hash=plan.hash)
    trail.sign(site)
    return directory


def _require_shape(network: nn.Module, task: Task) -> None:
    expected = model.num_parameters(network)
    if task.parameters.shape != (expected,):
        raise Refusal("wrong_parameters", f"expected {expected} parameters, found {task.parameters.shape}")


def _require_ledger(site: Site, plan: Plan, task: Task) -> None:
    """Checks that the ledger is the one that the coordinator remembers, and that the run fits the budget."""
    try:
        spends = planned_spends(site, plan)
    except PrivacyTargetError as error:
        raise Refusal("unreachable_target", str(error)) from None
    if spends:
        with release.open_ledger(site) as ledger:
            if task.head is not None:
                ledger.require_known(task.head)
            ledger.require_affordable(spends, study=plan.study)


def _mechanism(site: Site, plan: Plan) -> Mechanism:
    return mechanism(plan, nominal_patients=site.settings.nominal_patients)


def _key(site: Site, plan: Plan, task: Task) -> Key:
    if plan.randomness == "secure":
        return secure_key()
    return seeded_key(seed=plan.seed, plan_hash=plan.hash, server_round=task.server_round, site=site.name)


def _weight(site: Site, plan: Plan, part: Part) -> float:
    """The site's weight in the average: public, but for ``examples``, which privacy=none alone allows."""
    match plan.strategy.weights:
        case "equal":
            return 1.0
        case "nominal":
            return float(site.settings.nominal_patients)
        case "examples":
            return float(max(1, len(part.patients)))


_cohorts = OpenCohorts()


def _open(site: Site, plan: Plan) -> Opened:
    """Returns the cohort as it is now: a new freeze and a withdrawal hold from the next task on."""
    listed = site.private / "cohort.json"
    frozen_at = listed.stat().st_mtime_ns if listed.exists() else 0
    wanted = (site, plan.asked, frozen_at, withdrawal.stamp(site))
    return _cohorts.get(site.directory, wanted, lambda: _newly_opened(site, plan.asked))


def _newly_opened(site: Site, asked: Asked) -> Cohort:
    cohort = open_cohort(site, asked=asked)
    most = site.settings.rules.max_quarantined_fraction
    quarantine.require_few(cohort.reasons, offered=cohort.offered, most=most)
    return cohort


@lru_cache(maxsize=64)
def _note_answer(site: Site, run: str, plan_hash: str, status: str, reason: str) -> None:
    """Tells the trail what a run was answered; the same answer, which a waiting site gives for days, once."""
    trail.record(site, "prepared", run=run, plan_hash=plan_hash, status=status, reason=reason)


def _note_cohort(site: Site, run: str, plan_hash: str, opened: Opened) -> None:
    """Writes down, once for a run and cohort, how many cases there are for the run and why not more."""
    if (run, plan_hash, "") in opened.noted:
        return
    with run_folder.opened(site, run=run) as folder:
        tally.record(folder, plan_hash=plan_hash, cohort=opened.cohort)
    opened.noted.add((run, plan_hash, ""))


def _note_use(site: Site, run: str, plan_hash: str, part: str, opened: Opened) -> None:
    """Writes down, once for a run, part and cohort, whose cases a task is about to use."""
    if (run, plan_hash, part) in opened.noted:
        return
    _note_cohort(site, run, plan_hash, opened)
    cohort = opened.cohort
    cases = cohort.sources[part]
    with run_folder.opened(site, run=run) as folder:
        usage.record(folder, plan_hash=plan_hash, part=part, cohort_version=cohort.version, cases=cases)
    opened.noted.add((run, plan_hash, part))


def _keep_scores(site: Site, task: Task, exact: Exact) -> None:
    """Keeps the exact scores at the site, for its own report."""
    directory = site.state / "scores" / task.run
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{task.part}.safetensors").write_bytes(save(exact.arrays))


@contextmanager
def _progress(site: Site, plan: Plan, task: Task) -> Iterator[Callable[[int, int], None]]:
    """Shows the site's own people how far a round is: ``state/progress.json``. A task that is done before
    anybody could look says nothing."""
    path = site.state / "progress.json"
    begun = written = time.monotonic()

    def on_step(step: int, steps: int) -> None:
        nonlocal written
        now = time.monotonic()
        is_last = step == steps and written > begun
        if now - written < PROGRESS_SECONDS and not is_last:
            return
        written = now
        told = {"run": task.run, "round": task.server_round, "step": step, "steps": steps}
        _overwrite(path, json.dumps(told).ljust(PROGRESS_BYTES))

    yield on_step


def _overwrite(path: Path, text: str) -> None:
    """Writes a text over a former one of the same length: a file that is emptied and written again is sent to
    the disk by some file systems when it is closed, which takes as long as a step."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, text.encode("ascii"))
    finally:
        os.close(descriptor)
