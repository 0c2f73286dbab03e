"""Signed ends of trails: they prove that no line was changed, removed, added or moved, and none cut off.

``sign`` appends a line that signs all lines before it, and writes number and hash of this line, signed too,
to a second file, the *head*, which has another name (``.coming``) until the line is on the disk. A trail that
no longer has the head's line was cut. What came after the last signed line is chained, but whoever may write
the file can cut it or write it anew.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from common import chain, durable, keys, schema, trail
from common.chain import GENESIS
from common.errors import SchemaError, StateError
from common.keys import PrivateKey, PublicKey
from common.trail import LINE_CLOSED, End, Event, Trail, line_hash, parse

SIGNED: Final = "signed"
Problem = tuple[int, str]


@dataclass(frozen=True, kw_only=True)
class Head:
    """A line of a trail, as the second file remembers it; signed together with the trail's name."""

    number: int
    hash: str
    signature: str


@dataclass(frozen=True, kw_only=True)
class Seal:
    """With what a trail is signed.

    name: says which trail it is, so that none can be put in the place of another. key_file: made at the first
    signature. head: the second file.
    """

    name: str
    key_file: Path
    head: Path

    @property
    def key(self) -> PrivateKey:
        """The private key, read when it is needed: to parse one takes as long as to sign.

        Raises:
            UserError: readable by others, or not a P-384 key.
        """
        return keys.own(self.key_file)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was found of a trail. ``line``, ``problem``: the first that is wrong; 0 and "" if nothing is.

    signed_to: all lines up to this one are proven; 0 where nothing was ever signed. unit: what is counted.
    """

    trail: str
    lines: int
    signed_to: int
    line: int
    problem: str
    unit: str = "lines"

    @property
    def is_unbroken(self) -> bool:
        return not self.problem

    def to_text(self) -> str:
        """Returns one line for a person."""
        if self.problem and not self.line:
            return f"{self.trail}: broken: {self.problem}"
        if self.problem:
            return f"{self.trail}: broken at line {self.line}: {self.problem}"
        since = self.lines - self.signed_to
        more = f", and {since} not signed yet" if since else ""
        return f"{self.trail}: unbroken, {self.signed_to} {self.unit} signed{more}"


def sign(path: Path, seal: Seal) -> None:
    """Signs a trail up to its last line and remembers it; does nothing where nothing was added since.

    Raises:
        StateError: the trail is broken; a signature would hide it.
        UserError: the key cannot be used.
    """
    if not path.exists() and not seal.head.exists():
        return
    with Trail(path).locked() as descriptor:
        found = verify(path, name=seal.name, key=seal.key.public_key(), head=seal.head)
        if not found.is_unbroken:
            raise StateError(
                f"Expected an unbroken trail in {path}, found line {found.line}: {found.problem}; look at "
                f"what happened, then move it away together with {seal.head}: a new one begins."
            )
        if found.signed_to and not seal.head.exists():  # whoever signed first was killed before the end
            durable.move(_coming(seal.head), seal.head)
        if found.lines == found.signed_to:
            return
        last = trail.end(descriptor)
        signature = chain.signature(_text(seal.name, last), key=seal.key)
        fields = {"trail": seal.name, "key": keys.fingerprint(seal.key.public_key()), "signature": signature}
        line, signed = trail.line(SIGNED, fields, after=last)
        durable.write(_coming(seal.head), _remembering(seal, signed))  # none beside a signed line is a loss
        trail.write(descriptor, line)
        durable.sync(descriptor)  # the head must never be ahead of it
        durable.move(_coming(seal.head), seal.head)


def verify(path: Path, *, name: str, key: PublicKey, head: Path) -> Finding:
    """Checks every line, every signature, and that the trail still has the line that was signed last."""
    remembered = read_head(head)  # before the lines: another process may be adding some
    lines = _lines(path) if path.exists() else []
    if remembered is None:  # the first signature may be on its way, or have come meanwhile
        remembered = _of_these(lines, read_head(_coming(head))) or read_head(head)
    if remembered is None and head.exists():
        problem = f"{head.name}, which remembers the last signed line, is damaged"
        return Finding(trail=name, lines=len(lines), signed_to=0, line=max(1, len(lines)), problem=problem)
    return examine(lines, name=name, key=key, head=remembered)


def examine(lines: Sequence[bytes], *, name: str, key: PublicKey, head: Head | None) -> Finding:
    """Checks the lines of a trail, each with its end; see ``verify``."""
    texts = [line.removesuffix(b"\n") for line in lines]
    events = [parse(text) for text in texts]
    hashes = [GENESIS, *map(line_hash, texts)]
    problems = itertools.chain(
        _of_the_schema(lines),
        _of_the_chain(events, hashes),
        _of_the_signatures(events, hashes, name=name, key=key),
        _of_the_head(events, hashes, name=name, key=key, head=head),
        [(len(lines), "its end is missing")] if head and _is_cut(lines, head) else [],
    )
    line, problem = next(problems, (0, ""))
    signed_to = head.number if head and not problem else 0
    return Finding(trail=name, lines=len(lines), signed_to=signed_to, line=line, problem=problem)


def report(findings: Sequence[Finding], *, as_json: bool) -> int:
    """Prints what was found of trails, a line for each; returns the exit code: 1 where any is broken."""
    is_unbroken = all(found.is_unbroken for found in findings)
    if as_json:
        print(json.dumps({"unbroken": is_unbroken, "trails": [asdict(found) for found in findings]}))
    else:
        print("\n".join(found.to_text() for found in findings))
    return 0 if is_unbroken else 1


def _of_the_schema(lines: Sequence[bytes]) -> Iterator[Problem]:
    try:
        for line in lines[:1]:
            schema.require(trail.schema_of(line), newest=trail.SCHEMA, what="a trail")
    except SchemaError as error:
        yield 1, str(error)


def _of_the_chain(events: Sequence[Event | None], hashes: Sequence[str]) -> Iterator[Problem]:
    for number, event in enumerate(events, start=1):
        if event is None:
            if number < len(events) and (events[number] or {}).get("event") != LINE_CLOSED:
                yield number, "it is no event"
        elif event.get("number") != number:
            yield number, f"it says to be line {event.get('number')}; lines were removed, added or moved"
        elif event.get("previous") != hashes[number - 1]:
            yield max(1, number - 1), f"it is not the line that line {number} was written after"


def _of_the_signatures(
    events: Sequence[Event | None], hashes: Sequence[str], *, name: str, key: PublicKey
) -> Iterator[Problem]:
    for number in _signed(events):
        claimed = str((events[number - 1] or {}).get("signature"))
        text = _text(name, End(number=number - 1, hash=hashes[number - 1]))
        if not chain.is_signature(claimed, key=key, text=text):
            yield number, "its signature is not that of this trail's key over the lines before it"


def _of_the_head(
    events: Sequence[Event | None], hashes: Sequence[str], *, name: str, key: PublicKey, head: Head | None
) -> Iterator[Problem]:
    if head is None:
        yield from ((number, "it is signed, but nothing remembers it") for number in _signed(events))
    elif not chain.is_signature(
        head.signature, key=key, text=_text(name, End(number=head.number, hash=head.hash))
    ):
        yield max(1, len(events)), "what remembers the last signed line is not signed by this trail's key"
    elif head.number > len(events):
        yield len(events) + 1, f"it is missing, and all after it; the trail once had {head.number} lines"
    elif head.hash != hashes[head.number]:
        yield max(1, head.number), "it is not the line that was signed last"


def _signed(events: Sequence[Event | None]) -> Iterator[int]:
    return (number for number, event in enumerate(events, 1) if event and event.get("event") == SIGNED)


def _is_cut(lines: Sequence[bytes], head: Head) -> bool:
    """A line is signed only after its end is on the disk."""
    return 0 < len(lines) <= head.number and not lines[-1].endswith(b"\n")


def _lines(path: Path) -> list[bytes]:
    with path.open("rb") as file:
        return list(file)


def read_head(path: Path) -> Head | None:
    """Returns what the second file remembers; None where it is missing or not such a file."""
    try:
        return parse_head(path.read_bytes())
    except OSError:
        return None


def parse_head(content: bytes) -> Head | None:
    """Returns what such a file holds; None where it is something else."""
    try:
        tree = json.loads(content)
        return Head(number=int(tree["number"]), hash=str(tree["hash"]), signature=str(tree["signature"]))
    except (ValueError, KeyError, TypeError):
        return None


def _of_these(lines: Sequence[bytes], head: Head | None) -> Head | None:
    """Returns a head if the line that it remembers is one of these."""
    if head is None or not 0 < head.number <= len(lines):
        return None
    return head if line_hash(lines[head.number - 1].removesuffix(b"\n")) == head.hash else None


def _remembering(seal: Seal, end: End) -> bytes:
    """Returns what the second file has to hold."""
    signature = chain.signature(_text(seal.name, end), key=seal.key)
    return json.dumps(asdict(Head(number=end.number, hash=end.hash, signature=signature))).encode("ascii")


def _coming(head: Path) -> Path:
    """Returns the file that becomes the second one when the line that it remembers is on the disk."""
    return head.with_name(f"{head.name}.coming")


def _text(name: str, end: End) -> str:
    """Not the text of ``common.chain``, whose rows the same key signs: neither passes for the other."""
    return f"feverfew trail/{name}/{end.number}/{end.hash}"
