from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from common.errors import DataError, StateError, UserError
from server import pack, sbom
from server.compliance import compliance
from server.home import Home
from tests.rounds import site, tiny_plan
from tests.test_docs import DOCS, ROOT, TESTS
from tests.test_server_report import Page
from tests.test_server_trail import RUN, carry, make_home, verb

NAMES = {
    *("plan.json", "approvals.json", "ledgers.json", "participation.json", "metrics.json", "report.json"),
    *("report.html", "sbom.cdx.json", "trail.jsonl", "trail.head", "trail.pem", "index.html"),
    *("SHA256SUMS", "SHA256SUMS.sig"),
}
pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    home = make_home(tmp_path_factory.mktemp("coordinator") / "home")
    plan = tiny_plan(sites=3, study="chest")
    nodes = {name: site(plan, name, 0.5) for name in ("north", "south")}
    nodes["west"] = site(plan, "west", 0.5, status="declined", reason="<b>no</b>")
    carry(home, plan, nodes)
    return home


@pytest.fixture(scope="module")
def exported(home: Home, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packs") / "pack.zip"
    assert verb("trail", "export", home.directory, RUN, "--output", path) == 0
    return path


@pytest.fixture
def unpacked(exported: Path, tmp_path: Path) -> Path:
    with zipfile.ZipFile(exported) as archive:
        archive.extractall(tmp_path / "pack")
    return tmp_path / "pack"


def test_the_pack_of_a_run_is_whole_signed_and_verified_offline(
    exported: Path, unpacked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {path.name for path in unpacked.iterdir()} == NAMES
    for path in (exported, unpacked):
        assert verb("trail", "verify", path) == 0
        told = capsys.readouterr()
        assert told.out.startswith("pack: unbroken, 14 files") and f"run {RUN}: unbroken" in told.out
        assert pack.fingerprint(path) in told.err


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here")
def test_the_commands_on_the_page_verify_the_pack_without_feverfew(unpacked: Path) -> None:
    commands = ["sha256sum --check SHA256SUMS"]
    commands.append("openssl dgst -sha384 -verify trail.pem -signature SHA256SUMS.sig SHA256SUMS")
    page = (unpacked / "index.html").read_text()
    for command in commands:
        assert command in page
        subprocess.run(command.split(), cwd=unpacked, check=True, capture_output=True)
    with (unpacked / "metrics.json").open("a") as file:
        file.write(" ")
    assert subprocess.run(commands[0].split(), cwd=unpacked, capture_output=True).returncode == 1


def test_the_pack_holds_what_the_coordinator_knows_and_no_total_of_a_site(unpacked: Path) -> None:
    approvals = json.loads((unpacked / "approvals.json").read_text())
    told = {one["site"]: (one["status"], one["reason"]) for one in approvals}
    assert told == {
        "north": ("approved", ""),
        "south": ("approved", ""),
        "west": ("declined", "<b>no</b>"),
    }
    assert (
        hashlib.sha256((unpacked / "plan.json").read_bytes()).hexdigest()
        == tiny_plan(sites=3, study="chest").hash
    )
    ledgers = (unpacked / "ledgers.json").read_text()
    assert "budget" not in ledgers and "total" not in ledgers
    assert set(json.loads((unpacked / "participation.json").read_text())) == set(told)
    assert len(json.loads((unpacked / "metrics.json").read_text())["rounds"]) == 2


CHANGES: dict[str, Callable[[Path], object]] = {
    "a file is changed": lambda place: (place / "report.json").write_text(
        (place / "report.json").read_text().replace('"north"', '"north "')
    ),
    "a file is missing": lambda place: (place / "approvals.json").unlink(),
    "a file is added": lambda place: (place / "more.txt").write_text("more"),
    "a sum is changed": lambda place: (place / "SHA256SUMS").write_text(
        (place / "SHA256SUMS").read_text().replace("  plan.json", "  plan.txt")
    ),
    "the trail is cut": lambda place: (place / "trail.jsonl").write_bytes(
        (place / "trail.jsonl").read_bytes()[:-1]
    ),
    "the signature is gone": lambda place: (place / "SHA256SUMS.sig").write_bytes(b""),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_pack_that_was_changed_is_found(
    unpacked: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    CHANGES[change](unpacked)
    assert verb("trail", "verify", unpacked) == 1
    assert "pack: broken: " in capsys.readouterr().out


def test_a_pack_that_was_signed_by_another_is_told_by_its_key_and_its_trail(
    exported: Path, tmp_path: Path
) -> None:
    other = make_home(tmp_path / "other")
    plan = tiny_plan(sites=1, quorum=1)
    carry(other, plan, {"north": site(plan, "north", 0.5)})
    pack.export(other, RUN, output=tmp_path / "other.zip")
    assert pack.fingerprint(tmp_path / "other.zip") != pack.fingerprint(exported)
    files = {**pack._read(tmp_path / "other.zip"), pack.KEY: pack._read(exported)[pack.KEY]}
    (tmp_path / "mixed.zip").write_bytes(pack._zipped(files))
    assert not any(found.is_unbroken for found in pack.verify(tmp_path / "mixed.zip"))


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x05\x06" + bytes(18)])
def test_a_file_that_is_no_pack_is_the_users_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "pack.zip").write_bytes(content)
    with pytest.raises(DataError, match="Expected a pack"):
        pack.verify(tmp_path / "pack.zip")


def test_a_pack_that_would_fill_the_memory_is_refused_unread(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("bomb", "w") as bomb:
        for _ in range(pack.MAX_BYTES // 2**24 + 1):
            bomb.write(bytes(2**24))
    (tmp_path / "pack.zip").write_bytes(stream.getvalue())
    with pytest.raises(DataError, match="at most"):
        pack.verify(tmp_path / "pack.zip")


def test_a_run_without_a_report_an_unknown_one_and_a_file_that_exists_are_refused(
    home: Home, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home.runs / "waiting").mkdir()
    try:
        for run, output, told in (
            ("waiting", tmp_path / "new.zip", "a run that has ended"),
            ("unknown", tmp_path / "new.zip", "none of the id"),
            (RUN, exported, "name another file"),
        ):
            assert verb("trail", "export", home.directory, run, "--output", output) == 2
            assert told in capsys.readouterr().err
    finally:
        shutil.rmtree(home.runs / "waiting")
    assert not (tmp_path / "new.zip").exists()


def test_a_broken_trail_is_not_exported_as_if_it_were_whole(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    plan = tiny_plan(sites=1, quorum=1)
    carry(home, plan, {"north": site(plan, "north", 0.5)})
    path = home.runs / RUN / "events.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"north"', b'"south"'))
    with pytest.raises(StateError, match="broken at line"):
        pack.export(home, RUN, output=tmp_path / "pack.zip")
    with pytest.raises(UserError):
        pack.export(home, "none", output=tmp_path / "pack.zip")


def test_what_a_killed_process_left_unsigned_is_signed_at_the_export(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    plan = tiny_plan(sites=1, quorum=1)
    carry(home, plan, {"north": site(plan, "north", 0.5)})
    path = home.runs / RUN / "events.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    (home.heads / f"{RUN}.trail").unlink()
    found = pack.export(home, RUN, output=tmp_path / "pack.zip")
    assert found.is_unbroken and found.signed_to == found.lines


def test_the_page_works_offline_and_escapes_what_comes_from_outside(unpacked: Path) -> None:
    text = (unpacked / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert (
        not {"script", "img", "link", "iframe"} & set(page.tags)
        and "http:" not in text
        and "https:" not in text
    )
    assert "<b>no</b>" not in text and "declined &lt;b&gt;no" in text
    for law in compliance().laws:
        assert all(row.heading in text for row in law.rows)
    assert "No privacy." in text and "epsilon" in text


def test_the_bill_of_software_is_valid_by_the_official_schema_and_complete(unpacked: Path) -> None:
    from cyclonedx.schema import SchemaVersion  # takes seconds, of each process that collects tests
    from cyclonedx.validation.json import JsonStrictValidator

    text = (unpacked / "sbom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    tree = json.loads(text)
    assert tree["metadata"]["component"]["version"] == version("feverfew")
    found = {component["name"]: component for component in tree["components"]}
    for name in ("torch", "flwr", "opacus", "monai", "pydicom"):
        assert found[name]["version"] == version(name)
    assert (
        found["numpy"]["purl"] == f"pkg:pypi/numpy@{version('numpy')}" and "+" not in found["torch"]["purl"]
    )
    assert found["flwr"]["licenses"] == [{"expression": "Apache-2.0"}] and "feverfew" not in found
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text.replace('"library"', '"libary"', 1))
    assert sbom.bill() != text, "every bill has a serial number of its own"


def test_the_document_and_the_page_have_one_source() -> None:
    text = (DOCS / "compliance.md").read_text(encoding="utf-8")
    assert text == compliance().to_markdown(), "run: make docs"


def test_every_claim_of_the_table_is_shown_and_every_row_says_what_is_not_done() -> None:
    for law in compliance().laws:
        for row in law.rows:
            assert row.lacks and bool(row.shown_by) == (row.does != "Nothing."), row.heading
            for name in row.shown_by:
                assert name in TESTS if name.startswith("test_") else (ROOT / name).exists(), name


def test_every_heading_that_was_asked_for_is_in_the_table() -> None:
    headings = [row.heading for law in compliance().laws for row in law.rows]
    for number in ("Art. 25", "Art. 32", "Art. 35", "164.308", "164.310", "164.312"):
        assert sum(heading.startswith(number) for heading in headings) >= 3, number
