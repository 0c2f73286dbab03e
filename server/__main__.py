"""Verbs of the coordinator: ``feverfew-server --help`` lists them."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from functools import partial
from pathlib import Path

from common import logline, seal
from common.command import exit_code
from common.config import compose_plan
from common.errors import DataError, UserError
from common.plan import Plan
from server import enrolment, pack, renewal, submission
from server import trail as trails
from server.home import create_home, open_home
from server.progress import Progress
from server.status import Status, status
from server.supervisor import Supervisor

COMMAND = "feverfew-server"


def main() -> None:
    """Entry point of ``feverfew-server``."""
    arguments = _parser().parse_args()
    tell = logline.tell_errors("supervisor") if getattr(arguments, "log_format", "text") == "json" else None
    sys.exit(exit_code(lambda: arguments.verb(arguments), command=COMMAND, tell=tell))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=COMMAND, description="The coordinator's side of a federation.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    init = verbs.add_parser("init", help="make a coordinator's directory with keys and certificates")
    init.add_argument("home", type=Path)
    init.add_argument("--host", required=True, help="DNS name or IP address under which hospitals reach it")
    init.add_argument("--port", type=int, default=8443, help="of the gateway (default 8443)")
    init.add_argument("--internal-port", type=int, help="of the SuperLink, loopback only (default: port + 1)")
    init.set_defaults(verb=_init)

    enroll = verbs.add_parser("enroll", help="admit a hospital by its signing request")
    enroll.add_argument("home", type=Path)
    enroll.add_argument("name", help="the hospital's name: a-z, 0-9 and '-'")
    enroll.add_argument("request", type=Path, help="the file NAME.csr that the hospital sent")
    enroll.add_argument("--renew", action="store_true", help="the hospital is enrolled, and has a new key")
    enroll.add_argument("--invitation", type=Path, help="write the invitation here (default: print it)")
    enroll.set_defaults(verb=_enroll)

    revoke = verbs.add_parser("revoke", help="let a hospital in no more; a run goes on without it")
    revoke.add_argument("home", type=Path)
    revoke.add_argument("name", help="the hospital's name")
    revoke.set_defaults(verb=_revoke)

    renew = verbs.add_parser("renew", help="make a new server key and certificate; sites notice nothing")
    renew.add_argument("home", type=Path)
    renew.set_defaults(verb=_renew)

    start = verbs.add_parser("start", help="run the coordinator in the foreground until stopped")
    start.add_argument("home", type=Path)
    start.add_argument(
        "--log-format", choices=logline.FORMATS, default="text", help="of every line (default: text)"
    )
    start.set_defaults(verb=_start)

    plan = verbs.add_parser("plan", help="compose a plan from conf/ and overrides")
    plan.add_argument("overrides", nargs="*", help="such as plan.classes=[normal,pneumonia] plan.sites=4")
    plan.add_argument("--output", type=Path, help="write the plan here (default: print it)")
    plan.set_defaults(verb=_plan)

    submit = verbs.add_parser("submit", help="run a plan and follow it to its end")
    submit.add_argument("home", type=Path)
    submit.add_argument("plan", type=Path, help="a plan as JSON")
    submit.add_argument("--run", help="our id of the run; an earlier one goes on (default: a new one)")
    submit.add_argument(
        "--export",
        type=Path,
        metavar="FILE",
        help="start nothing: write what would be sent, for hospitals to approve, and keep it for this run",
    )
    submit.add_argument("--follow", action=argparse.BooleanOptionalAction, default=True)
    submit.add_argument("--json", action="store_true", help="print the outcome as JSON on standard output")
    submit.set_defaults(verb=_submit)

    stop = verbs.add_parser("stop", help="end a run for good; its last good model stays")
    stop.add_argument("home", type=Path)
    stop.add_argument("run", help="our id of the run")
    stop.set_defaults(verb=_stop)

    trail = verbs.add_parser("trail", help="prove that the logs of what was done are unbroken, or export one")
    actions = trail.add_subparsers(required=True, metavar="ACTION")
    verify = actions.add_parser("verify", help="check every line and every signature")
    verify.add_argument("path", type=Path, help="a coordinator's directory, or a pack that was exported")
    verify.add_argument("--run", help="of this run only (default: the coordinator's own and all runs')")
    verify.add_argument("--json", action="store_true", help="print JSON instead of lines")
    verify.set_defaults(verb=_verify)
    export = actions.add_parser("export", help="write the pack of a run for a data-protection officer")
    export.add_argument("home", type=Path)
    export.add_argument("run", help="our id of the run")
    export.add_argument("--output", type=Path, required=True, metavar="FILE.zip")
    export.set_defaults(verb=_export)

    show = verbs.add_parser("status", help="show processes, sites and runs")
    show.add_argument("home", type=Path)
    show.add_argument("--json", action="store_true")
    show.set_defaults(verb=_status)
    return parser


def _init(arguments: argparse.Namespace) -> int:
    internal_port = arguments.internal_port or arguments.port + 1
    home = create_home(arguments.home, host=arguments.host, port=arguments.port, internal_port=internal_port)
    print(f"made {home.directory} for a gateway at {home.invitation.address}")
    print(f"the fingerprint of its certificate is {home.invitation.fingerprint}")
    print(f"the fingerprint of the key that signs its trails is {trails.fingerprint(home)}")
    return 0


def _enroll(arguments: argparse.Namespace) -> int:
    home = open_home(arguments.home)
    request = _text(arguments.request)
    site = enrolment.admit(home, arguments.name, request=request, renewed=arguments.renew)
    when = "now" if enrolment.settle_now(home) else "when the coordinator starts"
    invitation = enrolment.invitation(home, site).to_text()
    if arguments.invitation is None:
        print(invitation, end="")
    else:
        arguments.invitation.write_text(invitation, encoding="ascii")
    told = f"{site.name} is admitted {when}; its fingerprint is {site.fingerprint}"
    print(f"{told}; valid until {site.certificate.not_valid_after_utc:%Y-%m-%d}", file=sys.stderr)
    return 0


def _revoke(arguments: argparse.Namespace) -> int:
    home = open_home(arguments.home)
    for fingerprint in enrolment.revoke(home, arguments.name):
        print(f"{arguments.name} is revoked; the gateway refuses {fingerprint}")
    if not enrolment.settle_now(home):
        print("the SuperLink does not run; the site is unregistered there when the coordinator starts")
    return 0


def _renew(arguments: argparse.Namespace) -> int:
    home = open_home(arguments.home)
    made = renewal.renew(home)
    trails.record(home, "certificate_renewed", until=f"{made.not_valid_after_utc:%Y-%m-%d}")
    trails.sign(home)
    when = "is taken up now" if submission.is_running(home) else "is used from the next start on"
    print(f"the new server certificate is valid until {made.not_valid_after_utc:%Y-%m-%d} and {when}")
    return 0


def _start(arguments: argparse.Namespace) -> int:
    supervisor = Supervisor(home=open_home(arguments.home), log_format=arguments.log_format)
    if arguments.log_format == "json":
        with logline.own_output(partial(logline.wrapped, process="supervisor")) as output:
            logline.start("supervisor", form="json", output=output)
            supervisor.run(say=logging.getLogger("feverfew.supervisor").info)
    else:
        logline.start("supervisor", form="text", output=sys.stdout)
        supervisor.run(say=lambda text: print(text, flush=True))
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    plan = compose_plan(arguments.overrides)
    if arguments.output is None:
        print(plan.to_json())
    else:
        arguments.output.write_text(plan.to_json(), encoding="utf-8")
        print(f"wrote plan {plan.hash} to {arguments.output}")
    return 0


def _submit(arguments: argparse.Namespace) -> int:
    home = open_home(arguments.home)
    plan = Plan.from_json(_text(arguments.plan))
    run = arguments.run or submission.new_run_id()
    if arguments.export is not None:
        submission.reserve(home, plan.to_json(), run)
        arguments.export.write_text(plan.to_json(), encoding="utf-8")
        if arguments.json:
            print(json.dumps({"run": run, "plan_hash": plan.hash}))
        begin = f"feverfew-server submit {home.directory} {arguments.export} --run {run}"
        print(f"wrote plan {plan.hash} to {arguments.export}; begin with: {begin}", file=sys.stderr)
        return 0
    submitted = submission.submit(home, plan.to_json(), run)
    print(f"run {run} of plan {plan.hash[:12]} was submitted", file=sys.stderr)
    if not arguments.follow:
        if arguments.json:
            print(json.dumps({"run": run}))
        return 0
    try:
        with Progress(num_rounds=plan.rounds) as progress:
            outcome = submission.follow(home, submitted, show=progress.show)
    except KeyboardInterrupt:
        print(f"run {run} goes on; see feverfew-server status {home.directory}", file=sys.stderr)
        raise
    if arguments.json:
        print(outcome.to_json())
    print(outcome.to_text(), file=sys.stderr)
    return 0 if outcome.is_success else 1


def _stop(arguments: argparse.Namespace) -> int:
    submission.stop(open_home(arguments.home), arguments.run)
    print(f"run {arguments.run} was stopped")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    path: Path = arguments.path
    if pack.is_pack(path):
        if arguments.run is not None:
            raise UserError("Expected --run with a coordinator's directory, found it with a pack.")
        findings = pack.verify(path)
        print(f"the key of this pack is {pack.fingerprint(path)}; is it the coordinator's?", file=sys.stderr)
    else:
        findings = trails.verify(open_home(path), run=arguments.run)
    return seal.report(findings, as_json=arguments.json)


def _export(arguments: argparse.Namespace) -> int:
    home = open_home(arguments.home)
    found = pack.export(home, arguments.run, output=arguments.output)
    print(found.to_text())
    print(f"wrote {arguments.output}; it is signed by the key {trails.fingerprint(home)}")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    found: Status = status(open_home(arguments.home))
    print(found.to_json() if arguments.json else found.to_text())
    return 0


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"Expected a readable file {path}, found: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise DataError(f"Expected text in {path}, found something else.") from None


if __name__ == "__main__":
    main()
