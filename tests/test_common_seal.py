from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import keys, seal, trail
from common.errors import SchemaError, StateError
from common.seal import Finding, Seal
from common.trail import End, Trail

KEY, OTHER = keys.generate(), keys.generate()
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def seal_of(path: Path) -> Seal:
    file = path.with_name("trail.key")
    if not file.exists():
        keys.write_private(file, KEY)
    return Seal(name="run a", key_file=file, head=path.with_name("trail.head"))


def written(path: Path, *, runs: int = 2, events: int = 3) -> list[bytes]:
    """Writes a trail that is signed after every run; returns its lines."""
    for run in range(runs):
        for number in range(events):
            Trail(path).record("reply", run=run, round=number, site="north")
        seal.sign(path, seal_of(path))
    return lines_of(path)


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def verified(path: Path, **changed: object) -> Finding:
    known = {"name": "run a", "key": KEY.public_key(), "head": seal_of(path).head}
    return seal.verify(path, **{**known, **changed})  # type: ignore[arg-type]


def test_a_signed_trail_is_unbroken(path: Path) -> None:
    assert len(written(path)) == 8
    found = verified(path)
    assert found == Finding(trail="run a", lines=8, signed_to=8, line=0, problem="")
    assert found.to_text() == "run a: unbroken, 8 lines signed"


def test_signing_again_adds_nothing_until_something_has_happened(path: Path) -> None:
    before = written(path)
    seal.sign(path, seal_of(path))
    assert lines_of(path) == before
    Trail(path).record("late")
    assert verified(path).to_text() == "run a: unbroken, 8 lines signed, and 1 not signed yet"
    seal.sign(path, seal_of(path))
    assert verified(path).signed_to == 10


def test_a_trail_that_never_began_is_neither_signed_nor_broken(path: Path) -> None:
    seal.sign(path, seal_of(path))
    assert not path.exists() and verified(path).to_text() == "run a: unbroken, 0 lines signed"


@cache
def example() -> tuple[list[bytes], seal.Head]:
    """The lines of a signed trail of two runs, and what is remembered of it."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "events.jsonl"
        lines, head = written(path), seal.read_head(seal_of(path).head)
    assert head is not None
    return lines, head


def examined(content: bytes, head: seal.Head) -> Finding:
    return seal.examine(list(io.BytesIO(content)), name="run a", key=KEY.public_key(), head=head)


EDITS: dict[str, Callable[[list[bytes], int, int], list[bytes]]] = {
    "removed": lambda lines, i, j: lines[:i] + lines[i + 1 :],
    "swapped": lambda lines, i, j: [lines[{i: j, j: i}.get(k, k)] for k in range(len(lines))],
    "repeated": lambda lines, i, j: [*lines[:j], lines[i], *lines[j:]],
    "moved": lambda lines, i, j: (rest := lines[:i] + lines[i + 1 :])[:j] + [lines[i]] + rest[j:],
    "cut": lambda lines, i, j: lines[:i],
    "emptied": lambda lines, i, j: [*lines[:i], b"\n", *lines[i + 1 :]],
    "added": lambda lines, i, j: [*lines[:i], b'{"event": "reply"}\n', *lines[i:]],
}
POSITION = st.integers(0, 7)


@given(edit=st.sampled_from(sorted(EDITS)), first=POSITION, second=POSITION)
def test_lines_that_were_removed_moved_added_or_cut_are_found(edit: str, first: int, second: int) -> None:
    lines, head = example()
    changed = EDITS[edit](lines, first, second)
    found = examined(b"".join(changed), head)
    assert found.is_unbroken == (changed == lines)
    if changed != lines:
        different = next(
            (n for n, pair in enumerate(zip(changed, lines, strict=False), 1) if pair[0] != pair[1]),
            len(changed) + 1,
        )
        assert abs(found.line - different) <= 1 and f"line {found.line}" in found.to_text()


@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_every_bit_that_is_changed_is_found_at_its_line(place: int, bit: int) -> None:
    lines, head = example()
    content = bytearray(b"".join(lines))
    place %= len(content)
    content[place] ^= 1 << bit
    found = examined(bytes(content), head)
    line = content[:place].count(b"\n") + 1
    assert not found.is_unbroken and abs(found.line - line) <= 1


def test_a_cut_at_any_byte_is_found() -> None:
    lines, head = example()
    content = b"".join(lines)
    for kept in range(len(content)):
        assert not examined(content[:kept], head).is_unbroken, kept
    assert examined(content, head).is_unbroken


def test_a_trail_that_is_gone_is_found(path: Path) -> None:
    written(path)
    path.unlink()
    assert verified(path).line == 1


def forged(lines: list[bytes], *, line: int) -> bytes:
    """A line is changed, and all later hashes are put right: what somebody without the key can do."""
    text, previous = b"", trail.GENESIS
    for number, raw in enumerate(lines, start=1):
        event = json.loads(raw) | {"previous": previous} | ({"site": "south"} if number == line else {})
        made = json.dumps(event).encode()
        text, previous = text + made + b"\n", trail.line_hash(made)
    return text


@pytest.mark.parametrize("line", [1, 3, 5, 7])
def test_a_forger_without_the_key_is_found_at_the_next_signature(path: Path, line: int) -> None:
    path.write_bytes(forged(written(path), line=line))
    found = verified(path)
    assert found.line == (4 if line < 4 else 8) and "signature" in found.problem


def test_a_signature_of_another_key_or_of_another_trail_is_found(path: Path) -> None:
    written(path)
    assert "signature" in verified(path, key=OTHER.public_key()).problem
    assert "signature" in verified(path, name="run b").problem


def test_a_trail_that_is_put_back_to_an_earlier_signed_end_is_found(path: Path) -> None:
    early = b"".join(written(path, runs=1))
    written(path, runs=1)
    path.write_bytes(early)
    found = verified(path)
    assert found.to_text() == (
        "run a: broken at line 5: it is missing, and all after it; the trail once had 8 lines"
    )


@pytest.mark.parametrize("content", [None, b"", b"{}", b'{"number": 8, "hash": "0", "signature": ""}'])
def test_a_head_that_is_gone_or_damaged_is_found(path: Path, content: bytes | None) -> None:
    written(path)
    head = seal_of(path).head
    head.unlink() if content is None else head.write_bytes(content)
    assert not verified(path).is_unbroken
    with pytest.raises(StateError, match="Expected an unbroken trail"):
        seal.sign(path, seal_of(path))


def test_signing_does_not_hide_that_lines_are_missing(path: Path) -> None:
    lines = written(path)
    path.write_bytes(b"".join(lines[:-2]))
    Trail(path).record("the trail goes on")
    with pytest.raises(StateError, match="move it away together"):
        seal.sign(path, seal_of(path))
    assert not verified(path).is_unbroken


def test_text_of_a_trail_and_of_the_ledger_never_pass_for_each_other(path: Path) -> None:
    """One key of a site signs both; a coordinator could else present a line of a trail as a ledger's row."""
    from common.chain import Head

    written(path)
    remembered = seal.read_head(seal_of(path).head)
    assert remembered is not None
    assert not Head(**vars(remembered)).is_signed_by(KEY.public_key())


WRITER = """
import sys
from pathlib import Path
from common.trail import End, Trail
log = Trail(Path(sys.argv[1]))
for number in range(int(sys.argv[3])):
    log.record("reply", writer=sys.argv[2], of_writer=number)
    print(number, flush=True)
"""


def writer(path: Path, name: str, *, events: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), name, str(events)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_several_processes_write_one_chain(path: Path) -> None:
    writers = [writer(path, name, events=200) for name in "abc"]
    assert [one.communicate(timeout=60) and one.returncode for one in writers] == [0, 0, 0]
    seal.sign(path, seal_of(path))
    assert verified(path).signed_to == 601
    for name in "abc":
        told = [event["of_writer"] for event in trail.read(path) if event.get("writer") == name]
        assert told == list(range(200))


@pytest.mark.slow
def test_what_was_recorded_before_a_kill_is_there_and_the_chain_goes_on(path: Path) -> None:
    for kill in range(8):
        killed, other = writer(path, f"killed-{kill}", events=10**6), writer(path, f"other-{kill}", events=50)
        assert killed.stdout is not None
        said = [killed.stdout.readline() for _ in range(20 + 13 * kill)]
        os.kill(killed.pid, signal.SIGKILL)
        said += killed.stdout.readlines()
        killed.wait()
        killed.stdout.close()
        other.communicate(timeout=60)
        recorded = [e["of_writer"] for e in trail.read(path) if e.get("writer") == f"killed-{kill}"]
        assert recorded[: len(said)] == list(range(len(said))) and len(recorded) <= len(said) + 1
    seal.sign(path, seal_of(path))
    assert verified(path).is_unbroken


KILLED_WITHIN = """
import os, signal, sys
from pathlib import Path
from common import seal, trail
from common.seal import Seal
from common.trail import End, Trail
path, bytes_written, what = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
write = os.write
def half(descriptor, text):
    write(descriptor, text[:bytes_written])
    os.kill(os.getpid(), signal.SIGKILL)
os.write = half
if what == "record":
    Trail(path).record("reply", site="north")
else:
    seal.sign(path, Seal(name="run a", key_file=Path(what), head=path.with_name("trail.head")))
"""


def killed_within(path: Path, *, bytes_written: int, what: str) -> bytes:
    """A process is killed in the middle of a write; returns what it had written."""
    before = path.stat().st_size
    command = [sys.executable, "-c", KILLED_WITHIN, str(path), str(bytes_written), what]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    return path.read_bytes()[before:]


@pytest.mark.parametrize("bytes_written", [0, 1, 40, 10**6])
def test_a_half_written_line_is_kept_closed_and_told(path: Path, bytes_written: int) -> None:
    written(path, runs=1)
    half = killed_within(path, bytes_written=bytes_written, what="record")
    assert verified(path).is_unbroken
    half += killed_within(path, bytes_written=0, what="record")  # again, before anybody has closed it
    Trail(path).record("next")
    seal.sign(path, seal_of(path))
    found, content = verified(path), path.read_bytes()
    assert found.is_unbroken and half in content, "nothing is lost"
    events = [event["event"] for event in trail.read(path)][4:]
    whole = [] if bytes_written == 0 else ["reply"] if bytes_written == 10**6 else ["line_closed"]
    assert events == [*whole, "next", "signed"]
    path.write_bytes(content.replace(b"next", b"nexT"))
    assert not verified(path).is_unbroken


def test_a_half_line_that_was_only_given_its_end_is_told_too(path: Path) -> None:
    """Killed between the two writes of closing, and then in the middle of the second."""
    written(path, runs=1)
    with path.open("ab") as file:
        file.write(b'{"number": 5, "ti\n{"number": 6')
    Trail(path).record("next")
    assert [(e["number"], e["event"]) for e in trail.read(path)][4:] == [(7, "line_closed"), (8, "next")]


@pytest.mark.parametrize("bytes_written", [0, 50, 10**6])
def test_a_process_that_is_killed_while_it_signs_leaves_an_unbroken_trail(
    path: Path, bytes_written: int
) -> None:
    written(path, runs=1)
    keys.write_private(path.with_name("key"), KEY)
    Trail(path).record("more")
    killed_within(path, bytes_written=bytes_written, what=str(path.with_name("key")))
    assert verified(path).is_unbroken
    seal.sign(path, seal_of(path))
    assert verified(path).is_unbroken and verified(path).signed_to == len(lines_of(path))


@pytest.mark.parametrize(("bytes_written", "lines"), [(0, 2), (50, 4), (10**6, 2)])
def test_a_first_signature_that_was_interrupted_is_made_good(
    path: Path, bytes_written: int, lines: int
) -> None:
    Trail(path).record("first")
    keys.write_private(path.with_name("key"), KEY)
    killed_within(path, bytes_written=bytes_written, what=str(path.with_name("key")))
    assert verified(path).is_unbroken and not seal_of(path).head.exists()
    seal.sign(path, seal_of(path))
    found = verified(path)
    assert found.is_unbroken and found.signed_to == len(lines_of(path)) == lines
    assert [file.name for file in path.parent.glob("*head*")] == ["trail.head"]


def test_a_first_signature_that_comes_while_a_trail_is_verified_is_no_loss(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Trail(path).record("first")
    read = seal._lines

    def signed_meanwhile(path: Path) -> list[bytes]:
        monkeypatch.setattr(seal, "_lines", read)
        seal.sign(path, seal_of(path))
        return read(path)

    monkeypatch.setattr(seal, "_lines", signed_meanwhile)
    assert verified(path).signed_to == 2


def test_what_a_killed_signature_left_stands_in_for_no_lost_head(path: Path) -> None:
    written(path, runs=1)
    Trail(path).record("more")
    keys.write_private(path.with_name("key"), KEY)
    killed_within(path, bytes_written=0, what=str(path.with_name("key")))
    head, lines = seal_of(path).head, path.read_bytes()
    assert head.with_name("trail.head.coming").exists() and verified(path).is_unbroken
    head.rename(path.with_name("kept"))
    assert "nothing remembers it" in verified(path).problem
    path.with_name("kept").rename(head)
    path.write_bytes(lines[: lines.index(b"signed")])
    assert not verified(path).is_unbroken


def test_what_an_event_costs_does_not_grow_with_the_trail(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(path, runs=1)
    with path.open("ab") as file:
        file.write(lines_of(path)[-1] * 20_000)
    read, original = [], os.pread

    def counted(descriptor: int, size: int, place: int) -> bytes:
        read.append(size)
        return original(descriptor, size, place)

    monkeypatch.setattr(os, "pread", counted)
    Trail(path).record("next")
    assert path.stat().st_size > 5e6 and sum(read) <= 2 * 4096


def test_a_trail_of_a_newer_version_is_refused_and_left_as_it_is(path: Path) -> None:
    written(path)
    path.write_bytes(path.read_bytes().replace(b'"schema": 1', b'"schema": 2', 1))
    before = path.read_bytes()
    with pytest.raises(SchemaError, match="a newer Feverfew wrote it; update this one"):
        Trail(path).record("next")
    with pytest.raises(SchemaError):
        seal.sign(path, seal_of(path))
    assert path.read_bytes() == before
    assert "a newer Feverfew" in verified(path).problem


def test_a_trail_from_before_schemas_were_noted_goes_on(path: Path) -> None:
    """Its first line is signed as it is, without one."""
    with patch.object(trail, "line", _without_schema):
        written(path)
    assert b"schema" not in path.read_bytes()
    Trail(path).record("next")
    seal.sign(path, seal_of(path))
    assert verified(path).is_unbroken


def _without_schema(event: str, fields: Mapping[str, Any], *, after: End) -> tuple[bytes, End]:
    """As the former software wrote a line."""
    tree = {"number": after.number + 1, "time": "2026-11-24T12:00:00.000+00:00", "event": event, **fields}
    text = json.dumps(tree | {"previous": after.hash}).encode()
    return text + b"\n", End(number=after.number + 1, hash=trail.line_hash(text))


def test_a_trail_of_an_older_version_goes_on_and_is_told_apart(path: Path) -> None:
    path.write_text('{"time": "2026-01-01", "event": "charged"}\n' * 3)
    Trail(path).record("next")
    assert [event.get("number") for event in trail.read(path)] == [None, None, None, 4]
    found = verified(path)
    assert found.line == 1 and "None" in found.problem


def test_the_name_in_a_head_cannot_be_changed(path: Path) -> None:
    written(path)
    with pytest.raises(StateError):
        seal.sign(path, replace(seal_of(path), name="run b"))
