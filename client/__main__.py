"""Verbs of a hospital: ``feverfew-client init|renew|fetch|check|rehearse|approve|...|run``."""

from __future__ import annotations

import argparse
import logging
import logging.handlers
import signal
import sys
from pathlib import Path
from typing import Any, TextIO

from client import coordinator, credential, log, release, rest, skeleton, trail
from client.agent import open_agent
from client.site import Site, open_site
from common import certificates, keys, logline, seal
from common.command import exit_code
from common.errors import DataError, UserError
from common.invitation import Invitation
from common.logline import Format
from common.plan import Plan

COMMAND = "feverfew-client"
PATIENT = "as the case table names them; the image's path with patient_is: case; '-' to type or pipe it in"


def main() -> None:
    """Entry point of ``feverfew-client``."""
    arguments = _parser().parse_args()
    tell = logline.tell_errors("agent") if getattr(arguments, "log_format", "text") == "json" else None
    sys.exit(exit_code(lambda: arguments.verb(arguments), command=COMMAND, tell=tell))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=COMMAND, description="One hospital's side of a federation.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    init = verbs.add_parser("init", help="make the directory of a site, or what it lacks")
    init.add_argument("directory", type=Path)
    init.add_argument("--name", help="a-z, 0-9 and '-'; default: the name of the directory")
    init.add_argument("--nominal-patients", type=int, help="public number of patients in the training part")
    init.add_argument("--invitation", type=Path, help="the file that the coordinator sent")
    init.set_defaults(verb=_init)

    renew = verbs.add_parser("renew", help="make a new key for connections, and a request to the coordinator")
    renew.add_argument("directory", type=Path)
    renew.set_defaults(verb=_renew)

    fetch = verbs.add_parser("fetch", help="bring the images that site.yaml asks for from the PACS")
    fetch.add_argument("directory", type=Path)
    fetch.add_argument("--list", action="store_true", help="only count what would be fetched")
    fetch.add_argument("--json", action="store_true", help="print JSON instead of text")
    fetch.set_defaults(verb=_fetch)

    check = verbs.add_parser("check", help="say what of this site would be used, and what is wrong")
    check.add_argument("directory", type=Path)
    check.add_argument("--plan", type=Path, help="for this plan (default: usual preprocessing, all labels)")
    check.add_argument("--freeze", action="store_true", help="take the data as they are now as the cohort")
    for decision in ("refuse", "keep"):
        check.add_argument(
            f"--{decision}",
            metavar="CODE",
            action="append",
            default=[],
            help=f"{decision} the cases of this finding, and freeze (repeatable)",
        )
    check.add_argument("--json", action="store_true", help="print JSON instead of tables")
    check.set_defaults(verb=_check)

    rehearse = verbs.add_parser(
        "rehearse", help="run one round of a plan here, send nothing, show what would leave"
    )
    rehearse.add_argument("directory", type=Path)
    rehearse.add_argument("plan", type=Path, help="a plan as JSON")
    rehearse.add_argument("--json", action="store_true", help="print JSON instead of a table")
    rehearse.set_defaults(verb=_rehearse)

    pause = verbs.add_parser("pause", help="let the daemon rest after the task at hand, until resume")
    pause.add_argument("directory", type=Path)
    pause.set_defaults(verb=_pause)

    resume = verbs.add_parser("resume", help="let a paused daemon work again")
    resume.add_argument("directory", type=Path)
    resume.set_defaults(verb=_resume)

    approve = verbs.add_parser(
        "approve", help="show a plan and decide about it, or show which wait and what was decided"
    )
    approve.add_argument("directory", type=Path)
    approve.add_argument("plan", nargs="?", help="a plan as JSON, or the beginning of a known one's hash")
    verdict = approve.add_mutually_exclusive_group()
    verdict.add_argument("--refuse", action="store_true", help="never work on this plan")
    verdict.add_argument("--withdraw", action="store_true", help="take the approval of this plan back")
    approve.add_argument("--reason", default="", help="why (with --refuse or --withdraw); stays at the site")
    approve.add_argument("--yes", action="store_true", help="do not ask, record")
    approve.add_argument("--json", action="store_true", help="print JSON; without --yes only show")
    approve.set_defaults(verb=_approve)

    ledger = verbs.add_parser(
        "ledger", help="show what was spent and what is left, or restore a broken ledger"
    )
    ledger.add_argument("action", nargs="?", choices=("show", "restore"), default="show")
    ledger.add_argument("directory", type=Path)
    ledger.add_argument("--json", action="store_true", help="print JSON instead of a table")
    ledger.add_argument(
        "--what-if", type=Path, metavar="PLAN", help="what a plan would cost, and whether it fits (with show)"
    )
    ledger.add_argument(
        "--plan",
        type=Path,
        action="append",
        help="charge this plan in full (with restore; repeatable; default: every plan that may be missing)",
    )
    ledger.set_defaults(verb=_ledger)

    used = verbs.add_parser("used", help="say which runs used the cases of a patient, or what a run used")
    used.add_argument("directory", type=Path)
    who = used.add_mutually_exclusive_group(required=True)
    who.add_argument("patient", nargs="?", help=PATIENT)
    who.add_argument("--run", help="instead of a patient: how many cases this run was offered and uses")
    used.add_argument("--json", action="store_true", help="print JSON instead of tables")
    used.set_defaults(verb=_used)

    withdraw = verbs.add_parser(
        "withdraw", help="exclude a patient from every later task, and say which runs used their cases"
    )
    withdraw.add_argument("directory", type=Path)
    what = withdraw.add_mutually_exclusive_group(required=True)
    what.add_argument("patient", nargs="?", help=PATIENT)
    what.add_argument("--list", action="store_true", help="show who is withdrawn, and since when")
    withdraw.add_argument("--undo", action="store_true", help="take the withdrawal of this patient back")
    withdraw.add_argument("--json", action="store_true", help="print JSON instead of tables")
    withdraw.set_defaults(verb=_withdraw)

    trail = verbs.add_parser("trail", help="prove that the log of what this site did is unbroken")
    trail.add_argument("action", choices=("verify",))
    trail.add_argument("directory", type=Path)
    trail.add_argument("--json", action="store_true", help="print JSON instead of a line")
    trail.set_defaults(verb=_trail)

    run = verbs.add_parser("run", help="work for the coordinator until stopped")
    run.add_argument("directory", type=Path)
    run.add_argument(
        "--log-format", choices=logline.FORMATS, default="text", help="of every line (default: text)"
    )
    run.set_defaults(verb=_run)
    return parser


def _init(arguments: argparse.Namespace) -> int:
    directory: Path = arguments.directory
    invitation = None
    if arguments.invitation is not None:
        invitation = Invitation.from_text(_text(arguments.invitation))
    name = arguments.name or _known_name(directory)
    for path in skeleton.complete(directory, name=name, nominal_patients=arguments.nominal_patients):
        print(f"made {path}")
    if invitation is None:
        _tell_request(directory, name=name)
    else:
        coordinator.accept(invitation, directory=directory)
        accepted = credential.accept(directory / "private", invitation, name=name)
        print(f"invited to {invitation.address}; the coordinator's fingerprint is {invitation.fingerprint}")
        print(f"admitted until {accepted.certificate.not_valid_after_utc:%Y-%m-%d}")
    return 0


def _renew(arguments: argparse.Namespace) -> int:
    site = open_site(arguments.directory)
    fresh = credential.renew(site.private)
    credential.write_request(site.directory, fresh, name=site.name)
    _tell_request(site.directory, name=site.name)
    return 0


def _tell_request(directory: Path, *, name: str) -> None:
    path = credential.request_file(directory, name=name)
    key = certificates.read_request(_text(path), name=name)
    print(f"send {path} to the coordinator; its fingerprint is {keys.fingerprint(key)}")


def _known_name(directory: Path) -> str:
    return open_site(directory).name if (directory / "site.yaml").exists() else directory.resolve().name


def _fetch(arguments: argparse.Namespace) -> int:
    from client import fetch  # see _check

    site = open_site(arguments.directory)
    return fetch.report(site, only_list=arguments.list, as_json=arguments.json)


def _check(arguments: argparse.Namespace) -> int:
    # Imported here: the daemon, which shares this file, does not need what it brings.
    from client import inspection, report, rules

    site = open_site(arguments.directory)
    plan = None if arguments.plan is None else _plan(arguments.plan)
    decided = rules.decided(refuse=arguments.refuse, keep=arguments.keep)
    return report.report(
        site,
        asked=inspection.usual(site) if plan is None else plan.asked,
        plan=plan,
        others=inspection.lines(site, plan),
        freeze=arguments.freeze or bool(decided),
        decided=decided,
        as_json=arguments.json,
    )


def _rehearse(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from client import rehearsal  # see _check

    found = rehearsal.rehearse(open_site(arguments.directory), _plan(arguments.plan))
    if arguments.json:
        print(found.to_json())
    else:
        rehearsal.show(found, console=Console())
    return 0 if found.status == "approved" else 1


def _approve(arguments: argparse.Namespace) -> int:
    from client import consent, decision  # see _check

    site = open_site(arguments.directory)
    changes = arguments.refuse or arguments.withdraw
    if arguments.plan is None and (changes or arguments.yes):
        raise UserError("Expected a plan to decide about, found none; name a file or a hash.")
    if arguments.reason and not changes:
        raise UserError("Expected --reason with --refuse or --withdraw, found it without.")
    if len(arguments.reason) > decision.MAX_REASON:
        raise UserError(f"Expected a reason of at most {decision.MAX_REASON} characters, found a longer one.")
    if arguments.plan is None:
        return consent.listed(site, as_json=arguments.json)
    return consent.decide(
        site,
        consent.plan_named(site, arguments.plan),
        "refused" if arguments.refuse else "withdrawn" if arguments.withdraw else "approved",
        reason=arguments.reason,
        is_agreed=arguments.yes,
        as_json=arguments.json,
    )


def _ledger(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from client import restoration, statement  # see _check

    site = open_site(arguments.directory)
    restores = arguments.action == "restore"
    if restores and arguments.what_if is not None:
        raise UserError("Expected --what-if with ledger show, found it with ledger restore.")
    if not restores and arguments.plan is not None:
        raise UserError("Expected --plan with ledger restore, found it with ledger show; see --what-if.")
    if restores:
        plans = None if arguments.plan is None else [_plan(path) for path in arguments.plan]
        done = restoration.restore(site, plans=plans)
        if not arguments.json:
            print(f"kept {done.num_kept} intact rows; charged in full: {len(done.charged)} plans")
            for plan in done.charged:
                print(f"  {plan.hash} of study {plan.study}")
            print(f"the old file is {done.old_file}" if done.old_file else "there was no old file")
    told = statement.statement(site, what_if=None if arguments.what_if is None else _plan(arguments.what_if))
    if arguments.json:
        print(told.to_json())
    else:
        statement.show(told, console=Console())
    return 0 if told.what_if is None or told.what_if.fits else 1


def _used(arguments: argparse.Namespace) -> int:
    from client import patient, tally  # see _check

    site = open_site(arguments.directory)
    if arguments.run is not None:
        return tally.report(site, arguments.run, as_json=arguments.json)
    return patient.report(site, _patient(arguments), as_json=arguments.json)


def _withdraw(arguments: argparse.Namespace) -> int:
    from client import patient, withdrawal  # see _check

    site = open_site(arguments.directory)
    if arguments.list:
        return patient.report_withdrawn(site, as_json=arguments.json)
    named = _patient(arguments)
    change = withdrawal.undo if arguments.undo else withdrawal.withdraw
    change(site, patient=named)  # before anything else is read: what is broken elsewhere must not stop it
    if not arguments.json:
        print("the withdrawal is undone" if arguments.undo else "withdrawn: no later task uses this patient")
    return patient.report(site, named, as_json=arguments.json)


def _trail(arguments: argparse.Namespace) -> int:
    return seal.report([trail.verify(open_site(arguments.directory))], as_json=arguments.json)


def _patient(arguments: argparse.Namespace) -> str:
    """Returns the patient that is asked for; read from standard input, they are in no shell history."""
    named: str = arguments.patient
    return (sys.stdin.readline() if named == "-" else named).strip()


def _run(arguments: argparse.Namespace) -> int:
    site = open_site(arguments.directory)
    release.ledger_head(site)  # a broken ledger is said now, not at the first task
    form: Format = arguments.log_format
    agent = open_agent(site, log_format=form)
    signal.signal(signal.SIGTERM, _leave)
    if form == "json":
        with logline.own_output(log.kept_apart(site)) as output:
            _log_to(site, form=form, output=output)
            agent.run()
    else:
        _log_to(site)
        agent.run()
    return 0


def _pause(arguments: argparse.Namespace) -> int:
    site = open_site(arguments.directory)
    rest.pause(site.state)
    print(f"{site.name} rests after the task at hand; feverfew-client resume {site.directory} ends it")
    return 0


def _resume(arguments: argparse.Namespace) -> int:
    site = open_site(arguments.directory)
    rest.resume(site.state)
    print(f"{site.name} works again")
    return 0


def _leave(*_: Any) -> None:
    raise SystemExit(0)


def _log_to(site: Site, *, form: Format = "text", output: TextIO = sys.stdout) -> None:
    """Sends our log to the terminal and to the site's own file."""
    site.state.mkdir(mode=0o700, exist_ok=True)
    ours = logging.getLogger("feverfew")
    ours.setLevel(logging.INFO)
    for handler in (
        logging.StreamHandler(output),
        logging.handlers.WatchedFileHandler(site.state / "agent.log"),
    ):
        handler.setFormatter(log.formatter(form, "agent", site=site.name))
        ours.addHandler(handler)


def _plan(path: Path) -> Plan:
    return Plan.from_json(_text(path))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"Expected a readable file {path}, found: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UserError(f"Expected text in {path}, found something else.") from None


if __name__ == "__main__":
    main()
