"""RunState -> Report: what a run cost, what it reached, and each site's story in one line."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Literal

from common.calibration import evaluation_noise_multipliers, mechanism
from common.exchange import Prepared
from common.plan import DpSgd, Plan
from common.privacy import Epsilon, Spend, worst_epsilon
from server.checkpoint import Attendance, RoundRecord, RunState
from server.landmarks import Found
from server.report import LandmarkResult, Participation, Privacy, Report, Round, SitePrivacy, Timing, Versions
from server.result import Result
from server.revoked import REVOKED
from server.rounds import Released

Status = Literal["completed", "quorum_not_reached", "failed"]


def report_of(
    state: RunState,
    *,
    plan: Plan,
    released: Released,
    landmarks: Found | None = None,
    status: Status,
    engine: str,
    restarts: Mapping[str, int],
) -> Report:
    """Returns the report of a run from what the coordinator may know.

    Args:
        restarts: how often each process of the coordinator was started again meanwhile.
    """
    finished = datetime.now(UTC)
    started = datetime.fromisoformat(state.started)
    wall = (finished - started).total_seconds()
    training = sum(entry.seconds for entry in state.rounds)
    names = sorted({*state.sites, *state.attendance})
    return Report(
        plan_hash=state.plan_hash,
        run=state.run,
        study=plan.study,
        engine=engine,
        versions=Versions(**{name: version(name) for name in Versions.model_fields}),
        started=started,
        finished=finished,
        status=status,
        rounds=tuple(_round(entry) for entry in state.rounds),
        final=Result.merged(
            released.statistics,
            noise_std=released.noise_std,
            bins=plan.evaluation.bins,
            target=plan.target,
        ),
        privacy=_privacy(plan, state),
        participation={
            name: _participation(
                state.sites.get(name),
                state.attendance.get(name, Attendance()),
                name=name,
                state=state,
                plan=plan,
            )
            for name in names
        },
        timing=Timing(
            wall_seconds=wall, training_seconds=training, overhead_seconds=max(0.0, wall - training)
        ),
        restarts=dict(restarts),
        plan=plan.model_dump(mode="json"),
        landmarks=None if landmarks is None else _landmarks(landmarks),
        notes=(*_notes(plan, state.sites), *_losses(restarts)),
    )


def _round(entry: RoundRecord) -> Round:
    return Round(
        round=entry.server_round,
        seconds=entry.seconds,
        sites_asked=entry.sites_asked,
        sites_valid=entry.sites_valid,
        train_loss=entry.train_loss,
        auroc=entry.auroc,
        auroc_interval=entry.auroc_interval,
        dice=entry.dice,
        dice_interval=entry.dice_interval,
        accuracy=entry.accuracy,
        bytes_up=entry.bytes_up,
        bytes_down=entry.bytes_down,
    )


def _landmarks(found: Found) -> LandmarkResult:
    return LandmarkResult(
        percentiles=found.percentiles,
        values=found.values,
        uncertainty=found.uncertainty,
        sites=found.sites,
        override=found.override,
    )


def _privacy(plan: Plan, state: RunState) -> Privacy:
    if not isinstance(plan.privacy, DpSgd):
        per_site = {
            name: SitePrivacy(
                epsilon=None,
                noise_multiplier=None,
                sample_rate=None,
                steps=0,
                nominal_patients=site.nominal_patients,
            )
            for name, site in state.sites.items()
        }
        return Privacy(
            unit="none", delta=None, max_epsilon=None, seeded=False, accountant=None, per_site=per_site
        )
    costs = {
        name: _cost(plan, site, state.attendance.get(name, Attendance()))
        for name, site in state.sites.items()
    }
    worst = max((bound for _, bound in costs.values()), key=lambda bound: bound.value, default=None)
    return Privacy(
        unit="patient",
        delta=plan.privacy.delta,
        max_epsilon=worst.value if worst else 0.0,
        seeded=plan.randomness == "seeded",
        accountant=worst.accountant if worst else None,
        per_site={name: cost for name, (cost, _) in costs.items()},
    )


def _cost(plan: Plan, site: Prepared, seen: Attendance) -> tuple[SitePrivacy, Epsilon]:
    """What this run cost a site, for every task that it was asked: a missing reply may still be charged."""
    assert isinstance(plan.privacy, DpSgd)
    nominal = site.nominal_patients
    asked = 0 if site.role != "training" else seen.valid + seen.missing + seen.rejected
    steps = asked * plan.round_steps
    training = mechanism(plan, nominal_patients=nominal).training(steps) if steps else None
    history: dict[str, tuple[Spend, ...]] = {"train": (training,)} if training else {}
    if site.data != "public":
        for part, sigma in evaluation_noise_multipliers(plan, nominal_patients=nominal).items():
            if part in seen.evaluations:
                count = seen.evaluations.count(part)
                history[part] = (Spend(noise_multiplier=sigma, sample_rate=1.0, steps=count),)
    bound = worst_epsilon(history, delta=plan.privacy.delta)
    return (
        SitePrivacy(
            epsilon=bound.value,
            noise_multiplier=training.noise_multiplier if training else None,
            sample_rate=training.sample_rate if training else None,
            steps=steps,
            nominal_patients=nominal,
        ),
        bound,
    )


def _participation(
    site: Prepared | None, seen: Attendance, *, name: str, state: RunState, plan: Plan
) -> Participation:
    waiting_since = state.waiting_since.get(name)
    return Participation(
        status=site.status if site else "unknown",
        role=site.role if site else "unknown",
        rounds_valid=seen.valid,
        rounds_late=seen.late,
        rounds_rejected=seen.rejected,
        tasks_sent_again=seen.away,
        bytes_down=seen.bytes_down,
        bytes_up=seen.bytes_up,
        story=_story(
            site,
            seen,
            rounds=None if plan.landmarks else state.server_round,
            asked=plan.sites_per_round,
            waiting_since=waiting_since,
        ),
        patient_is=site.patient_is if site else "unknown",
        waiting_since=None if waiting_since is None else datetime.fromisoformat(waiting_since),
    )


def _story(
    site: Prepared | None,
    seen: Attendance,
    *,
    rounds: int | None,
    asked: int | None,
    waiting_since: str | None,
) -> str:
    """Returns one line that a coordinator can read out.

    Args:
        rounds: None where landmarks were asked for.
        asked: ``plan.sites_per_round``.
    """
    if site is None:
        return "answered, but never said who it is"
    if site.status == "waiting":
        return f"nobody there has approved the plan; it waits since {waiting_since}"
    if site.status == REVOKED and not seen.valid:
        return "revoked before it sent anything valid"
    if site.status == "incompatible":
        return f"incompatible: {site.reason}; it has Feverfew {site.feverfew}"
    if site.status not in ("approved", REVOKED):
        return f"{site.status}: {site.reason}"
    if rounds is None:
        told = "sent its landmarks" if seen.valid else "sent no landmarks"
    elif site.role == "evaluation":
        told = f"evaluated {len(seen.evaluations)} times, did not train"
    else:
        told = f"trained {seen.valid} of {rounds} rounds"
        told += f", each of which asks {asked} sites" if asked is not None else ""
    if site.status == REVOKED:
        told = f"revoked by the coordinator; before, it {told}"
    problems = [f"{count} x {code}" for code, count in sorted(seen.problems.items()) if code != REVOKED]
    if seen.away:
        problems.append(f"went away over {seen.away} tasks, which were sent again")
    if seen.late:
        problems.append(f"{seen.late} late")
    return "; ".join([told, *problems])


def _losses(restarts: Mapping[str, int]) -> list[str]:
    return [
        f"The coordinator's {name} was lost and started again, {number} times; the run went on."
        for name, number in sorted(restarts.items())
    ]


def _notes(plan: Plan, sites: Mapping[str, Prepared]) -> list[str]:
    notes = []
    alone = sorted(name for name, site in sites.items() if site.patient_is == "case")
    if alone:
        notes.append(f"Each image is its own patient at: {', '.join(alone)}.")
    public = sorted(name for name, site in sites.items() if site.data == "public")
    if public:
        notes.append(f"Public data, exact metrics, no training at: {', '.join(public)}.")
    if plan.randomness == "seeded":
        notes.append("Noise was seeded, for a reproducible simulation: epsilon: not valid (seeded).")
    return notes
