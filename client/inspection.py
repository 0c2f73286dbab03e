"""What ``feverfew-client check`` tells besides the data: connection, budget, and what a plan would cost."""

from __future__ import annotations

import itertools

import httpx

from client import content, coordinator, credential, frozen
from client.case import Case
from client.check import Line
from client.cost import planned_spends
from client.patience import reason
from client.proxy import ENVIRONMENT, Proxy, is_overruled, proxy_to
from client.release import open_ledger
from client.route import Barred, Route
from client.site import Site
from common import certificates
from common.asked import Asked, Preprocessing
from common.config import compose_plan
from common.errors import DataError, Refusal, UnusableCase, UserError
from common.plan import Plan

TIMEOUT_SECONDS = 10.0
FIRST = 32  # cases that are looked at where no plan says what they are
MOST_NUMBERS = 64  # in a mask; more is a picture
MOST_LABELS, LONGEST_LABEL = 1000, 64  # what a plan can name: common.asked.Classes
REFUSED = 403
"""What the gateway says to whoever asks for anything but its nine paths: so it is the gateway."""


def lines(site: Site, plan: Plan | None) -> list[Line]:
    """Returns all that is told beside the data."""
    told = [*connection_lines(site), *certificate_lines(site), budget_line(site)]
    return told if plan is None else [*told, plan_line(site, plan)]


def budget_line(site: Site) -> Line:
    """Returns what the ledger has left; a site that never released anything has all of it."""
    settings = site.settings
    spent = 0.0
    if (site.state / "ledger.sqlite").exists():
        with open_ledger(site) as ledger:
            spent = ledger.spent().value
    text = f"epsilon {spent:.2f} of {settings.max_epsilon:g} spent, at delta {settings.delta:g}"
    return Line(name="budget", text=text, level="ok" if spent < settings.max_epsilon else "error")


def plan_line(site: Site, plan: Plan) -> Line:
    """Says what a run of the plan would cost, and whether this site can and may pay it."""
    try:
        spends = planned_spends(site, plan)
        with open_ledger(site) as ledger:
            alone, total = ledger.projected(spends)
            ledger.require_affordable(spends, study=plan.study)
    except (UserError, Refusal) as error:
        return Line(name="plan", text=f"this site would decline: {error}", level="error")
    text = f"a run would cost epsilon {alone.value:.2f}; the ledger would then be at {total.value:.2f}"
    return Line(name="plan", text=text, level="ok")


def connection_lines(site: Site) -> list[Line]:
    """Tries to reach the coordinator's gateway, through the proxy if there is one."""
    name = "connection"
    try:
        invitation = coordinator.open_coordinator(site.directory)
        proxy = proxy_to(invitation.address, site.settings.proxy, directory=site.directory)
        tls = credential.require(site.directory).tls(invitation.certificate)
    except UserError as error:
        return [Line(name=name, text=str(error), level="warning")]
    route = Route(invitation.address, authority=invitation.certificate, tls=tls, proxy=proxy)
    told = _proxy_line(site, proxy, address=invitation.address)
    with httpx.Client(transport=route, timeout=TIMEOUT_SECONDS, trust_env=False) as client:
        try:
            status = client.get(f"https://{invitation.address}/").status_code
        except httpx.HTTPError as error:
            text = reason(error)
            if not isinstance(error, Barred):
                text = f"{invitation.address} is not reached over TLS ({text})"
            return [told, Line(name=name, text=text, level="error")]
    if status != REFUSED:
        text = f"{invitation.address} answers as no gateway does (status {status})"
        return [told, Line(name=name, text=text, level="error")]
    way = "" if proxy is None else " through the proxy, which lets us pass and looks at nothing"
    return [told, Line(name=name, text=f"{invitation.address} is reached over TLS{way}")]


def _proxy_line(site: Site, proxy: Proxy | None, *, address: str) -> Line:
    """Says what is gone through, and who said so."""
    if proxy is None:
        overruled = is_overruled(site.settings.proxy)
        text = "; HTTPS_PROXY is set, but site.yaml wins" if overruled else ""
        return Line(name="proxy", text=f"none, straight to {address}{text}")
    text = str(proxy)
    if proxy.source == ENVIRONMENT:
        text += "; the daemon takes this from its own environment: is it set there too?"
    return Line(name="proxy", text=text)


def certificate_lines(site: Site) -> list[Line]:
    """Says until when the coordinator lets this site in; nothing before it ever did."""
    admitted = credential.current(site.private)
    if admitted is None:
        return []
    left = certificates.days_left(admitted.certificate)
    text = f"valid until {admitted.certificate.not_valid_after_utc:%Y-%m-%d}"
    if left >= certificates.NOTICE_DAYS:
        return [Line(name="certificate", text=text)]
    text = f"{text}, {left:.0f} days from now" if left >= 0 else f"{text}, which is past"
    text += f"; feverfew-client renew {site.directory} makes a request for the coordinator"
    return [Line(name="certificate", text=text, level="warning" if left >= 0 else "error")]


def usual(site: Site) -> Asked:
    """Returns what the plan of ``conf/`` would ask of the site's cases, before any plan is known.

    Slices or volumes, as the first case is that can be read. Where only a plan names the classes of masks,
    they are those of the first cases, by their numbers.

    Raises:
        DataError: the listing cannot be used.
    """
    listed = site.settings.cases
    asked = compose_plan(["plan.classes=[a,b]", "plan.sites=1", "plan.quorum=1"]).preprocessing
    shape, num_numbers = _first(site)
    wanted = {"inputs": listed.inputs, "size": (asked.size[0],) * (len(shape) or len(asked.size))}
    masks = listed.targets == ("mask",)
    named = tuple(str(number) for number in range(num_numbers)) if masks else _labels(site)
    return Asked(
        target=listed.targets[0],
        classes=named if len(named) > 1 else (*named, "another class", "a third")[:2],
        clinical=(),
        preprocessing=Preprocessing.model_validate(asked.model_dump() | wanted),
    )


def _first(site: Site) -> tuple[tuple[int, ...], int]:
    """Returns the spatial shape of the first readable image, () if there is none, and one more than the
    largest number in the masks of the first cases."""
    from client import images  # its decoders take long to import

    shape: tuple[int, ...] = ()
    largest = 0
    cases = (row for row in frozen.listed_rows(site) if isinstance(row, Case))
    for case in itertools.islice(cases, FIRST):
        try:
            loaded = content.load(case, directory=site.directory)
            shape = shape or images.decode(*loaded.images[0]).array.shape[1:]
            if loaded.mask is not None:
                largest = max(largest, int(images.decode(loaded.mask).array.max()))
        except UnusableCase:
            continue
        if shape and not case.mask:
            break
    return shape, min(largest, MOST_NUMBERS - 1) + 1


def _labels(site: Site) -> tuple[str, ...]:
    """Returns the labels of the listing. Where a column holds no classes its cells are not to be shown."""
    rows = frozen.listed_rows(site)
    found = {name for row in rows if isinstance(row, Case) for name in row.labels or ()}
    longest = max(map(len, found), default=0)
    if len(found) > MOST_LABELS or longest > LONGEST_LABEL:
        raise DataError(
            f"Expected at most {MOST_LABELS} labels of at most {LONGEST_LABEL} characters, found "
            f"{len(found)} of up to {longest}; name the column of the label in site.yaml, or say in classes "
            "what its values mean."
        )
    return tuple(sorted(found))
