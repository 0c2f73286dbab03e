"""What this hospital decided about a plan, signed with the site's key: a file for each plan.

A person's decision is ``<hash>.json``, that of a rule ``<hash>.rule.json``: neither replaces the other.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationError

from client.files import write_private
from client.site import Site
from common import chain, keys
from common.plan import Plan
from common.value import Value, canonical_json

logger = logging.getLogger("feverfew.site")

Verdict = Literal["approved", "refused", "withdrawn"]
Author = Literal["person", "rule"]
MAX_REASON: Final = 1000
MOST_BY_RULES: Final = 256
"""A coordinator may send as many plans as it likes; of what rules decided, the oldest makes way."""
_SUFFIX: Final[dict[Author, str]] = {"person": ".json", "rule": ".rule.json"}


class Decision(Value):
    """One decision about exactly one plan.

    ``who`` is the account of the person, or the name of the rule; ``reason`` stays at the site.
    """

    site: str
    plan_hash: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    verdict: Verdict
    by: Author
    who: str
    reason: Annotated[str, Field(max_length=MAX_REASON)]
    time: str
    plan: Plan
    signature: str

    @property
    def text(self) -> str:
        """What is signed: everything else, and what kind of thing it is."""
        return f"feverfew decision/{canonical_json(self.model_dump(mode='json', exclude={'signature'}))}"


def record(site: Site, plan: Plan, verdict: Verdict, *, by: Author, who: str, reason: str = "") -> Decision:
    """Signs a decision and writes it, in the place of an earlier one of the same author."""
    unsigned = Decision(
        site=site.name,
        plan_hash=plan.hash,
        verdict=verdict,
        by=by,
        who=who,
        reason=reason,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        plan=plan,
        signature="",
    )
    signature = chain.signature(unsigned.text, key=keys.own(_key(site)))
    signed = unsigned.model_copy(update={"signature": signature})
    content = json.dumps(signed.model_dump(mode="json"), indent=1).encode()
    write_private(_path(site, plan.hash, by=by), content=content)
    by_rules = sorted(site.approvals.glob(f"*{_SUFFIX['rule']}"), key=lambda path: path.stat().st_mtime_ns)
    for old in by_rules[:-MOST_BY_RULES]:
        old.unlink(missing_ok=True)
    return signed


def find(site: Site, plan_hash: str, *, by: Author) -> Decision | None:
    """Returns what a person, or a rule, decided about a plan; None if nothing, or nothing that is valid."""
    path = _path(site, plan_hash, by=by)
    return _read(site, path) if path.exists() else None


def noted(site: Site, plan_hash: str) -> tuple[str, str] | None:
    """Returns verdict and rule that the note of a rule's decision names; None where there is no such note.

    Whether it is genuine takes a millisecond to see and is not looked at: nothing rests on it, for what the
    rules decide they decide each time.
    """
    try:
        tree: Any = json.loads(_path(site, plan_hash, by="rule").read_bytes())
        return str(tree["verdict"]), str(tree["who"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def changed_at(site: Site, plan_hash: str, *, by: Author) -> int:
    """Returns when the file of a decision was changed last, in nanoseconds; 0 where there is none."""
    path = _path(site, plan_hash, by=by)
    return path.stat().st_ctime_ns if path.exists() else 0


def every(site: Site) -> list[Decision]:
    """Returns all valid decisions, the oldest first."""
    found = [told for path in _files(site) if (told := _read(site, path)) is not None]
    return sorted(found, key=lambda told: told.time)


def invalid(site: Site) -> list[Path]:
    """Returns the files that hold no decision of this site: forged, changed, or of an older version."""
    return [path for path in _files(site) if _read(site, path) is None]


def _files(site: Site) -> Iterator[Path]:
    return iter(sorted(site.approvals.glob("*.json")))


def _path(site: Site, plan_hash: str, *, by: Author) -> Path:
    return site.approvals / f"{plan_hash}{_SUFFIX[by]}"


def _key(site: Site) -> Path:
    return site.private / "site.key"


def _read(site: Site, path: Path) -> Decision | None:
    """Returns the decision in a file if it is of this site, of the plan and author that the file's name says,
    and signed with the site's key."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        text = ""
    key = keys.read_private(_key(site)).public_key() if _key(site).exists() else None
    found = _understood(text, path.name, site.name, None if key is None else keys.public_pem(key))
    if found is None:
        logger.warning("%s holds no decision of this site and counts for nothing", path)
    return found


@lru_cache(maxsize=4)  # a task asks several times
def _understood(text: str, file: str, site: str, key_pem: bytes | None) -> Decision | None:
    try:
        tree: Any = json.loads(text)
        found = Decision.model_validate(tree)
    except (ValueError, RecursionError, ValidationError):
        return None
    fits = (
        found.site == site
        and found.plan.hash == found.plan_hash
        and file == f"{found.plan_hash}{_SUFFIX[found.by]}"
        and key_pem is not None
        and chain.is_signature(found.signature, key=keys.from_pem(key_pem), text=found.text)
    )
    return found if fits else None
