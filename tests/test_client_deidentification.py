"""Names are in headers, paths and tables; nothing that is sent, or written outside ``private/``, has one."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict

from client import frozen, log
from client.app import app
from client.site import Site, open_site
from common import exchange, flower, model
from common.exchange import Task
from common.plan import Plan
from tests import planted
from tests.plans import plan

BINARIES = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parents[1]
TYPES = {
    "prepare": exchange.PREPARE,
    "train": exchange.TRAIN,
    "evaluate": exchange.EVALUATE,
    "deliver": exchange.DELIVER,
}
ASKED = plan(
    preprocessing="grey28",
    rounds=1,
    quorum=1,
    training__local_steps=1,
    training__expected_batch=1000,
    evaluation__validation_every=1,
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted.plant(tmp_path_factory.mktemp("planted") / "north").directory


@pytest.fixture
def site(original: Path, tmp_path: Path) -> Iterator[Site]:
    shutil.copytree(original, tmp_path / "north")
    yield open_site(tmp_path / "north")


def inputs(directory: Path) -> set[Path]:
    return {path for path in directory.rglob("*") if path.is_file()}


def written(directory: Path, before: set[Path]) -> bytes:
    """Names and contents of all files that the product has made outside every ``private/``."""
    new = [path for path in sorted(inputs(directory) - before) if "private" not in path.parts]
    return b"\n".join(str(path.relative_to(directory)).encode() + b"\n" + path.read_bytes() for path in new)


def answered(site: Site, purpose: str, asked: Plan = ASKED) -> bytes:
    """The bytes of the real app's answer to a task."""
    flower.set_identity(1, node_id=1)
    task = Task(
        run="run-1",
        plan_hash=asked.hash,
        server_round=1,
        purpose=purpose,  # type: ignore[arg-type]
        part="test" if purpose == "evaluate" else "",
        parameters=model.flatten(model.build(asked)),
    )
    message = Message(exchange.task_record(task), 7, TYPES[purpose])
    flower.assign_id(message)
    context = Context(
        run_id=1,
        node_id=7,
        node_config={"site": str(site.directory)},
        state=RecordDict(),
        run_config={"plan": asked.to_json(), "run": "run-1"},
    )
    return flower.pack_message(app(message, context))


def command(*words: object, place: Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [BINARIES / str(words[0]), *map(str, words[1:])],
        cwd=place,
        capture_output=True,
        check=False,
        timeout=300,
    )


def test_names_are_in_every_place_where_they_are_said_to_be(original: Path) -> None:
    """Else the tests below could not fail."""
    everything = b"\n".join(
        str(path.relative_to(original)).encode() + path.read_bytes() for path in inputs(original)
    )
    assert planted.found(everything) == set(planted.WORDS.values())
    tagged = next(original.rglob("*-0.dcm")).read_bytes()
    assert tagged.lower().count(planted.HEADERS["tag"].lower().encode()) > 700, "every text tag"
    assert planted.found("Wolkenstein".encode("utf-16-le")) == {"Wolkenstein"}


@pytest.mark.slow
def test_check_neither_prints_nor_writes_a_name(site: Site) -> None:
    before = inputs(site.directory)
    asked = site.directory.parent / "plan.json"
    asked.write_text(ASKED.to_json())
    for words in (["--freeze"], ["--json"]):
        told = command("feverfew-client", "check", site.directory, "--plan", asked, *words, place=ROOT)
        assert told.returncode == 0 and b"truncated" in told.stdout, told
        assert planted.found(told.stdout + told.stderr) == set()
    assert planted.found(written(site.directory, before)) == set()
    assert b"Vogelweide" in (site.private / "quarantine.csv").read_bytes(), "the site itself is told"


def test_no_task_sends_writes_or_logs_a_name(
    site: Site, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = inputs(site.directory)
    caplog.set_level(logging.DEBUG)
    for purpose in TYPES:
        sent = answered(site, purpose)
        assert b"refused" not in sent and planted.found(sent) == set(), purpose
    captured = capfd.readouterr()
    assert planted.found((captured.out + captured.err + caplog.text).encode()) == set()
    made = written(site.directory, before)
    assert planted.found(made) == set() and b"charged" in made, "the ledger and the trail are in it"
    used = (site.runs / "run-1" / "used_cases.parquet").read_bytes()
    assert planted.LISTED["patient"].encode() in used, "the site itself is told"


@pytest.mark.slow
def test_rehearsal_neither_prints_nor_writes_a_name(site: Site) -> None:
    before = inputs(site.directory)
    asked = site.directory.parent / "plan.json"
    asked.write_text(ASKED.to_json())
    told = command("feverfew-client", "rehearse", site.directory, asked, place=ROOT)
    assert told.returncode == 0, told.stderr
    assert planted.found(told.stdout + told.stderr + written(site.directory, before)) == set()


@pytest.mark.slow
def test_whole_run_of_several_sites_writes_no_name(original: Path, tmp_path: Path) -> None:
    for name in ("north", "south"):
        directory = shutil.copytree(original, tmp_path / "sites" / name)
        text = (directory / "site.yaml").read_text()
        (directory / "site.yaml").write_text(text.replace("name: north", f"name: {name}"))
    before = inputs(tmp_path)
    told = command(
        *("feverfew-simulate", "data=directory", "data.directory=sites", "data.classes=[normal,opacity]"),
        *(
            "state=keep",
            "preprocessing=grey28",
            "plan.rounds=2",
            "training.local_steps=1",
            "engine.workers=2",
        ),
        place=tmp_path,
    )
    assert told.returncode == 0, told.stderr
    made = written(tmp_path, before)
    assert b"site_error" not in made and len(list((tmp_path / "sites").rglob("used_cases.parquet"))) == 2
    assert planted.found(told.stdout + told.stderr + made) == set()


def headless(site: Site) -> None:
    """A case table that begins with a patient's row."""
    table = site.directory / "cases.csv"
    rows = [line for line in table.read_text().splitlines() if planted.LISTED["patient"] in line]
    table.write_text("\n".join(rows) + "\n")


def doubled_quote(site: Site) -> None:
    with (site.directory / "cases.csv").open("a") as stream:
        stream.write(f'"{planted.LISTED["cell"]}"x,\n')


def not_utf8(site: Site) -> None:
    with (site.directory / "cases.csv").open("ab") as stream:
        stream.write(f"{planted.LISTED['cell']}\xfc\n".encode("latin-1"))


def damaged_history(site: Site) -> None:
    (site.private / "withdrawn.json").write_text(f'[{{"patient": "{planted.LISTED["patient"]}", "x": 1}}]')


def damaged_list(site: Site) -> None:
    frozen.freeze(site)
    path = site.private / "cohort.json"
    path.write_text(path.read_text().replace("0.png", planted.LISTED["file"]))


def half_headless(site: Site) -> None:
    """A header that has a name beside columns that are wanted, and lacks one."""
    table = site.directory / "cases.csv"
    lines = table.read_text().splitlines()
    lines[0] = f"image,label,{planted.LISTED['patient']}"
    table.write_text("\n".join(lines) + "\n")


FAILURES = (headless, half_headless, doubled_quote, not_utf8, damaged_history, damaged_list)


@pytest.mark.slow
@pytest.mark.parametrize("fail", FAILURES, ids=lambda fail: fail.__name__)
def test_no_failure_of_the_sites_own_files_tells_a_name(
    site: Site, caplog: pytest.LogCaptureFixture, fail: object
) -> None:
    assert callable(fail)
    fail(site)
    before = inputs(site.directory)
    sent = answered(site, "train")
    assert b"site_error" in sent and planted.found(sent) == set()
    assert "Expected" in caplog.text and planted.found(caplog.text.encode()) == set()
    asked = site.directory.parent / "plan.json"
    asked.write_text(ASKED.to_json())
    told = command("feverfew-client", "check", site.directory, "--plan", asked, place=ROOT)
    assert told.returncode in (1, 2) and b"Expected" in told.stderr
    assert planted.found(told.stdout + told.stderr + written(site.directory, before)) == set()


@pytest.mark.slow
@pytest.mark.parametrize("cells", ["long", "many"])
def test_label_column_that_holds_names_is_not_shown(site: Site, cells: str) -> None:
    table = site.directory / "cases.csv"
    name, lines = planted.LISTED["cell"], table.read_text().splitlines()
    label = f"{name} " * 12 if cells == "long" else name
    extra = [f"images/{n}.png,{label}{n if cells == 'many' else ''},P{n}" for n in range(1001)]
    width = lines[0].count(",") + 1
    table.write_text("\n".join([lines[0], *(row + "," * (width - 3) for row in extra)]) + "\n")
    before = inputs(site.directory)
    told = command("feverfew-client", "check", site.directory, place=ROOT)
    assert told.returncode == 2 and b"Expected at most 1000 labels" in told.stderr
    assert planted.found(told.stdout + told.stderr + written(site.directory, before)) == set()


EXHAUSTED = """
import errno, logging, sys
from pathlib import Path
from client import log
from client.app import app
from client.site import open_site
from tests.test_client_deidentification import answered
site = open_site(Path(sys.argv[1]))
site.state.mkdir(mode=0o700)
handler = logging.FileHandler(site.state / "agent.log")
handler.setFormatter(log.Formatter())
logging.getLogger().addHandler(handler)

def hold(event, arguments):
    if event == "open" and "Vogelweide" in str(arguments[0]):
        raise OSError(errno.EMFILE, "Too many open files", arguments[0])

sys.addaudithook(hold)
sys.stdout.buffer.write(answered(site, "train"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("when", ["freezing", "decoding"])
def test_error_of_the_machine_names_the_file_only_in_private(site: Site, when: str) -> None:
    """The system's own text names the file that could not be opened."""
    if when == "decoding":
        frozen.freeze(site)
    before = inputs(site.directory)
    told = subprocess.run(
        [sys.executable, "-c", EXHAUSTED, str(site.directory)], cwd=ROOT, capture_output=True, check=False
    )
    assert b"site_error" in told.stdout
    made = written(site.directory, before)
    assert b"OSError" in made and b"cohort.py" in made, "what went wrong, and where"
    assert planted.found(told.stdout + told.stderr + made) == set()
    kept = site.private / log.ERRORS
    assert "Vogelweide" in kept.read_text() and kept.stat().st_mode & 0o777 == 0o600
    if when == "decoding":
        (name,) = {line.split()[1] for line in kept.read_text().splitlines() if line.startswith("case ")}
        assert f"case {name} could not be read".encode() in made


def test_formatter_leaves_out_causes_and_what_another_handler_wrote() -> None:
    try:
        try:
            raise KeyError("Wolkenstein")
        except KeyError as error:
            raise ValueError("Oswald") from error
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "x", 1, "failed", None, sys.exc_info())
    assert "Wolkenstein" in logging.Formatter().format(record)
    line = log.Formatter().format(record)
    assert "builtins.ValueError" in line and "builtins.KeyError" in line
    assert "Wolkenstein" not in line and "Oswald" not in line


REMAINS = """
import gc, sys
from pathlib import Path
from client.site import open_site
from common.plan import Plan
from tests.test_client_usage import ask
site = open_site(Path(sys.argv[1]))
for purpose in ("prepare", "train"):
    assert ask(site, Plan.from_json(sys.stdin.readline()), purpose) == ""
words = [bytes(reversed(word.encode())) for word in sys.argv[2:]]
gc.collect()
seen = {id(word) for word in words}
for thing in gc.get_objects():
    for one in (thing, *gc.get_referents(thing)):
        if isinstance(one, str | bytes | bytearray) and id(one) not in seen:
            seen.add(id(one))
            content = one.encode("utf-8", "ignore") if isinstance(one, str) else bytes(one)
            for word in words:
                if word.lower() in content.lower():
                    print(word.decode(), content[:80], type(thing))
print("looked at", len(seen))
"""


@pytest.mark.slow
def test_no_text_of_a_header_is_left_in_memory_after_a_task(site: Site) -> None:
    """Words that are in headers alone; the texts that any living object of the process holds are read."""
    names = [*planted.HEADERS.values(), planted.NUMBER]
    told = subprocess.run(
        [sys.executable, "-c", REMAINS, str(site.directory), *(name[::-1] for name in names)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        input=f"{ASKED.to_json()}\n" * 2,
    )
    assert told.returncode == 0, told.stderr
    (last,) = told.stdout.splitlines()
    assert last.startswith("looked at") and int(last.split()[-1]) > 50_000, told.stdout
