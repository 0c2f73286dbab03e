"""The pack of a run that a data-protection officer asks for: one zip file, read and verified offline."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from common import durable, keys, seal, trail
from common.errors import DataError, StateError, UserError
from common.keys import PublicKey
from common.seal import Finding
from common.template import template
from server import sbom
from server import trail as trails
from server.compliance import compliance
from server.home import Home
from server.report import HTML_NAME, JSON_NAME, Report
from server.run_record import PLAN

PAGE: Final = "index.html"
SUMS, SIGNATURE = "SHA256SUMS", "SHA256SUMS.sig"
LINES, HEAD, KEY = "trail.jsonl", "trail.head", "trail.pem"
MAX_BYTES: Final = 2**28
"""A pack has a few megabytes; one that unpacks to more was not made here."""
_ALGORITHM: Final = ec.ECDSA(hashes.SHA384())

Files = Mapping[str, bytes]


def export(home: Home, run: str, *, output: Path) -> Finding:
    """Writes the pack of a run that has ended; returns what was found of its trail.

    Raises:
        UserError: there is no such run, it has no report yet, or the output exists.
        StateError: the trail is broken.
    """
    if output.exists():
        raise UserError(f"Expected no {output}, found one; name another file with --output.")
    (found,) = trails.verify(home, run=run)
    if not found.is_unbroken:
        raise StateError(f"Expected an unbroken trail, found {found.to_text()}.")
    trails.sign_run(home, run)  # what was added since, or all of a run whose process was killed at its end
    (found,) = trails.verify(home, run=run)
    files = _files(home, run, found)
    sums = _sums(files)
    files |= {SUMS: sums, SIGNATURE: keys.own(home.trail_key).sign(sums, _ALGORITHM)}
    durable.write(output, _zipped(files))
    return found


def verify(path: Path) -> list[Finding]:
    """Says whether a pack is as it was written: its files, their sums, the signature, and the trail in it.

    Whose key it is, the pack cannot prove: its fingerprint has to be compared with the coordinator.

    Raises:
        DataError: not a pack.
    """
    files = _read(path)
    try:
        key = keys.from_pem(files[KEY])
        run = str(json.loads(files[JSON_NAME])["run"])
    except (KeyError, ValueError, UserError, TypeError):
        raise DataError(f"Expected a pack in {path}, found no {KEY} or {JSON_NAME} in it.") from None
    problem = _problem(files, key)
    number = len(files)
    pack = Finding(trail="pack", lines=number, signed_to=number, line=0, problem=problem, unit="files")
    remembered = seal.parse_head(files.get(HEAD, b""))
    lines = list(io.BytesIO(files.get(LINES, b"")))
    return [pack, seal.examine(lines, name=trails.run_name(run), key=key, head=remembered)]


def is_pack(path: Path) -> bool:
    """Says whether this is a pack, as a file or unpacked, and not a coordinator's directory."""
    return path.is_file() or (path / SUMS).is_file()


def fingerprint(path: Path) -> str:
    """Returns the fingerprint of the key in a pack, to be compared with the coordinator's word."""
    return keys.fingerprint(keys.from_pem(_read(path)[KEY]))


def _files(home: Home, run: str, found: Finding) -> dict[str, bytes]:
    directory = home.runs / run
    try:
        report = Report.read(directory)
    except StateError:
        raise UserError(
            f"Expected a run that has ended, found no {JSON_NAME} in {directory}; wait, or let it go on with "
            "feverfew-server submit --run."
        ) from None
    events, key = directory / trail.FILE, keys.own(home.trail_key).public_key()
    head = trails.run_head(home.heads, run).read_bytes()  # before the lines: it must not be ahead
    files = {name: (directory / name).read_bytes() for name in (PLAN, JSON_NAME, HTML_NAME)}
    tree = report.model_dump(mode="json", exclude_none=True)
    files |= {
        "approvals.json": _json(approvals(events)),
        "ledgers.json": _json(tree["privacy"]),
        "participation.json": _json(tree["participation"]),
        "metrics.json": _json({"rounds": tree["rounds"], "final": tree["final"]}),
        "sbom.cdx.json": sbom.bill().encode(),
        LINES: events.read_bytes(),
        HEAD: head,
        KEY: keys.public_pem(key),
    }
    page = _page(report, found, approvals=approvals(events), key=key, names=sorted(files))
    return files | {PAGE: page}


def approvals(path: Path) -> list[dict[str, Any]]:
    """Returns what each site answered when it was asked to prepare, as far as the coordinator knows it."""
    wanted = ("time", "event", "site", "status", "reason", "code")
    answers = [event for event in trail.read(path) if event["event"] in ("site_prepared", "site_rejected")]
    return [{name: event[name] for name in wanted if name in event} for event in answers]


def _page(
    report: Report, found: Finding, *, approvals: list[dict[str, Any]], key: PublicKey, names: list[str]
) -> bytes:
    page = template(Path(__file__).with_name("pack.html")).render(
        report=report,
        found=asdict(found),
        approvals=approvals,
        fingerprint=keys.fingerprint(key),
        compliance=compliance(),
        names=names,
    )
    return page.encode()


def _json(tree: object) -> bytes:
    return (json.dumps(tree, indent=1) + "\n").encode()


def _sums(files: Files) -> bytes:
    """Returns the sums in the form that ``sha256sum --check`` reads."""
    lines = (f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files))
    return "".join(lines).encode("ascii")


def _zipped(files: Files) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            archive.writestr(name, files[name])
    return stream.getvalue()


def _read(path: Path) -> Files:
    """Reads a pack, a zip file or the directory that it was unpacked into; names lead nowhere else."""
    if path.is_dir():
        return {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > MAX_BYTES:
                raise DataError(f"Expected a pack of at most {MAX_BYTES} bytes, found more in {path}.")
            return {entry.filename: archive.read(entry) for entry in archive.infolist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"Expected a pack in {path}, found: {error}.") from None


def _problem(files: Files, key: PublicKey) -> str:
    """Returns what is wrong with the files of a pack, "" if nothing is."""
    sums = files.get(SUMS, b"")
    try:
        key.verify(files.get(SIGNATURE, b""), sums, _ALGORITHM)
    except InvalidSignature:
        return f"{SUMS} is not signed by the key {KEY}"
    expected = _sums({name: content for name, content in files.items() if name not in (SUMS, SIGNATURE)})
    different = sorted(set(expected.splitlines()) ^ set(sums.splitlines()))
    return f"{different[0].decode('ascii', 'replace')[66:]} is not as it was written" if different else ""
