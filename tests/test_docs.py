"""What the documents state is true of the code: fields that leave, codes, tests, files, links."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import pytest
import yaml
from flwr.app import Context, Message, RecordDict
from pydantic import TypeAdapter

from client import app, leaving, rehearsal, skeleton, worker
from client.agent import NOT_READABLE, SUPERSEDED
from client.bids import Bids
from client.folders import Folders
from client.listing import Listing
from client.pairs import Pairs
from client.policies import Conditions, Policy
from client.site import SiteSettings
from client.table import Table
from common import exchange, flower, metrics
from common.bins import bin_edges
from common.calibration import noise_multiplier
from common.exchange import Task
from common.metrics import Histogram
from common.plan import Plan
from common.privacy import Spend, epsilon
from tests import plans
from tests.sites import write_site
from tests.test_common_landmarks import ASKED

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PRIVACY = (DOCS / "privacy.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
NODE_ID = 7


def table(text: str, name: str) -> list[list[str]]:
    """Returns the cells of the rows of the table that is marked with its name."""
    lines = text.partition(f"<!-- table: {name} -->\n")[2].splitlines()
    rows = [line for line in lines[: lines.index("")] if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def quoted(cell: str) -> list[str]:
    """Returns the words in backticks of a cell."""
    return re.findall(r"`([^`]+)`", cell)


def test_a_table_is_read_by_its_mark() -> None:
    text = "x\n<!-- table: codes -->\n| a | b |\n|---|---|\n| `c`, `d` | e |\n\n| f |\n"
    assert table(text, "codes") == [["`c`, `d`", "e"]] and quoted("`c`, `d`") == ["c", "d"]


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> set[tuple[str, str]]:
    """Message and field of everything that left a site: rehearsals of every kind, a refusal, an error."""
    directory = tmp_path_factory.mktemp("sites")
    north = write_site(directory / "north", unsafe_allow_no_privacy=True)
    public = {"train": 0.0, "validation": 0.0, "test": 1.0}
    east = write_site(directory / "east", name="east", role="evaluation", data="public", split=public)
    west = write_site(directory / "west", name="west", masks=True, unsafe_allow_no_privacy=True)
    quick = {"preprocessing": "grey28", "training__local_steps": 1, "training__expected_batch": 4}
    private, exact = plans.plan(**quick), plans.plan(**quick, privacy="none")
    short = plans.plan(**quick, exchange__update="int8")
    landmarks = plans.plan(**ASKED, preprocessing="grey28")
    drawn = {**quick, "target": "mask", "classes": ("background", "square"), "model": "unet"}
    masks, exact_masks = plans.plan(**drawn), plans.plan(**drawn, privacy="none")
    found = set()
    for site, plan in (
        *((north, private), (north, exact), (north, short), (east, private), (north, landmarks)),
        *((west, masks), (west, exact_masks)),
    ):
        rehearsed = rehearsal.rehearse(site, plan)
        assert rehearsed.status == "approved", rehearsed.reason
        found |= {(field.message.partition(" ")[0], field.field) for field in rehearsed.fields}
    refusal = asked(write_site(directory / "south", name="south", policies=[]).directory, private)
    found |= {("refused", field.field) for field in rehearsal.fields("refused", refusal.content)}
    error = worker.error_reply(refusal, worker.APP_FAILED).error
    return found | {("error", f"error.{name.removeprefix('_')}") for name in vars(error)}


def asked(site: Path, plan: Plan) -> Message:
    """Returns a site's real reply to a training task."""
    flower.set_identity(1, node_id=1)
    parameters = np.zeros(3, np.float32)
    task = Task(run="r", plan_hash=plan.hash, server_round=1, purpose="train", part="", parameters=parameters)
    message = Message(exchange.task_record(task), NODE_ID, exchange.TRAIN, group_id="1", ttl=60)
    flower.assign_id(message)
    context = Context(
        run_id=1,
        node_id=NODE_ID,
        node_config={"site": str(site)},
        state=RecordDict(),
        run_config={"plan": plan.to_json(), "run": "r"},
    )
    reply: Message = app.app(message=message, context=context)
    return reply


def test_the_table_of_fields_is_what_leaves_a_site(left: set[tuple[str, str]]) -> None:
    documented = {(row[0], *quoted(row[1])) for row in table(PRIVACY, "fields")}
    assert documented == left


def test_what_a_hospital_is_shown_before_it_approves_is_in_the_words_of_the_table(tmp_path: Path) -> None:
    north = write_site(tmp_path / "north")
    public = {"train": 0.0, "validation": 0.0, "test": 1.0}
    east = write_site(tmp_path / "east", name="east", role="evaluation", data="public", split=public)
    drawn = {"target": "mask", "classes": ("background", "square"), "model": "unet"}
    shown = [
        one
        for plan in (
            *(plans.plan(), plans.plan(exchange__update="fp16"), plans.plan(**drawn)),
            plans.plan(**(plans.TINY | ASKED)),
        )
        for site in (north, east)
        for one in leaving.leaving(site, plan)
    ]
    documented = {(row[0], *quoted(row[1])): (row[2], row[4]) for row in table(PRIVACY, "fields")}
    assert {(one.message, one.field): (one.what, one.mechanism) for one in shown} == documented


def test_the_table_of_conditions_is_what_rules_can_have() -> None:
    text = (DOCS / "approval.md").read_text(encoding="utf-8")
    documented = [name for row in table(text, "conditions") for name in quoted(row[0])]
    assert documented == list(Conditions.model_fields)
    example = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0])
    assert [Policy.model_validate(rule).decision for rule in example["policies"]] == ["approve", "refuse"]


def test_every_field_states_sensitivity_mechanism_and_charge() -> None:
    for row in table(PRIVACY, "fields"):
        assert len(row) == 6 and all(row), row


def test_the_table_of_metadata_is_what_crosses_the_wire(tmp_path: Path) -> None:
    reply = asked(write_site(tmp_path / "north", policies=[]).directory, plans.plan())
    flower.assign_id(reply)
    sent = {field.name for field, _ in flower.message_to_proto(reply).metadata.ListFields()}
    every = {field.name for field in flower.message_to_proto(reply).metadata.DESCRIPTOR.fields}
    documented = {name for row in table(PRIVACY, "metadata") for name in quoted(row[0])}
    assert sent <= documented == every


def literals(function: str, *, of: list[Path]) -> set[str]:
    """Returns the texts that a function is called with first, in these files; ``...`` for what is put in."""
    found = set()
    for call in calls(of):
        if call.args and ast.unparse(call.func).rpartition(".")[2] == function:
            found |= texts(call.args[0])
    return found


def calls(files: list[Path]) -> Iterator[ast.Call]:
    for path in files:
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        yield from (node for node in nodes if isinstance(node, ast.Call))


def texts(node: ast.expr) -> set[str]:
    match node:
        case ast.Constant(value=str(text)):
            return {text}
        case ast.IfExp(body=first, orelse=second):
            return texts(first) | texts(second)
        case ast.JoinedStr(values=[ast.Constant(value=str(text)), *_]):
            return {f"{text}..."}
        case _:
            return set()


def test_every_code_that_a_site_sends_is_explained() -> None:
    files = [*sorted((ROOT / "client").glob("*.py")), ROOT / "common" / "exchange.py"]
    sent = literals("Refusal", of=files) | literals("refusal_record", of=files)
    sent |= set(worker.CODES) | {SUPERSEDED, NOT_READABLE}
    documented = [name for row in table(PRIVACY, "site codes") for name in quoted(row[0])]
    assert set(documented) == sent and len(documented) == len(sent)


def test_every_code_that_the_coordinator_writes_is_explained() -> None:
    files = [
        *sorted((ROOT / "server").glob("*.py")),
        *(ROOT / "common" / name for name in ("exchange.py", "received.py")),
    ]
    written = literals("InvalidReply", of=files)
    text = (ROOT / "server" / "rounds.py").read_text(encoding="utf-8")
    written |= set(re.findall(r'isinstance\(problem, InvalidReply\) else "(\w+)"', text))
    documented = [name for row in table(PRIVACY, "server codes") for name in quoted(row[0])]
    assert set(documented) == written and len(documented) == len(written)


def test_the_table_of_rounds_is_what_the_accountant_says() -> None:
    rows = table(PRIVACY, "rounds")
    assert {int(row[4]) for row in rows} == {1, 3, 10, 50, 100}
    for row in rows:
        noise, rate, steps, delta, rounds, alone, true = map(float, row)
        for count, documented in ((1, alone), (rounds, true)):
            spend = Spend(noise_multiplier=noise, sample_rate=rate, steps=int(steps * count))
            assert epsilon([spend], delta=delta).value == pytest.approx(documented, abs=0.0051), row


PATIENTS = (50, 100, 200, 500, 1000, 5000)
AUROC = 0.9


def expected_counts(patients: float) -> npt.NDArray[np.float64]:
    """Expected histogram (2, 10) of a calibrated model: logits of both classes normal, patients in halves."""
    distance = NormalDist().inv_cdf(AUROC) * math.sqrt(2)
    edges = bin_edges(10)[1:-1]
    logits = np.log(edges / (1 - edges))
    counts = []
    for mean in (-(distance**2) / 2, distance**2 / 2):
        below = [NormalDist(mean, distance).cdf(logit) for logit in logits]
        counts.append(np.diff([0.0, *below, 1.0]) * patients / 2)
    return np.array(counts)


def half_width(patients: float, *, noise_std: float) -> float:
    """1.96 standard errors of the AUROC: Hanley and McNeil's for the patients, and the noise by hand."""
    (negatives, positives), size = expected_counts(patients), patients / 2
    kernel = np.tril(np.ones((10, 10)), -1) + np.eye(10) / 2 + (np.eye(10, k=-1) - np.eye(10, k=1)) / 12
    off = kernel - AUROC
    noise = noise_std**2 * (np.square(off @ negatives).sum() + np.square(positives @ off).sum())
    noise += noise_std**4 * np.square(off).sum()
    first, second = AUROC / (2 - AUROC) - AUROC**2, 2 * AUROC**2 / (1 + AUROC) - AUROC**2
    sampling = (AUROC * (1 - AUROC) + (size - 1) * (first + second)) / size**2
    return 1.96 * math.sqrt(sampling + noise / size**4)


def std_of(cost: str) -> float:
    """Noise in each count of a release that costs so much; two classes have one head."""
    if cost == "no noise":
        return 0.0
    return noise_multiplier(target_epsilon=float(cost), delta=1e-4, sample_rate=1.0, steps=1)


def test_the_table_of_what_a_charge_buys_is_computed() -> None:
    rows = table(PRIVACY, "auroc")
    assert [row[0] for row in rows] == ["0.5", "1", "3", "8", "no noise"]
    for cost, *cells in rows:
        for patients, cell in zip(PATIENTS, cells, strict=True):
            width = half_width(patients, noise_std=std_of(cost))
            assert cell == ("-" if width > 0.25 else f"±{width:.3f}"), (cost, patients)
    text = " ".join(PRIVACY.split())
    together, alone = (half_width(n, noise_std=std_of("3") * math.sqrt(n / 100)) for n in (1000, 100))
    assert f"ten sites of 100 patients reach ±{together:.3f}, one alone ±{alone:.3f}" in text


@pytest.mark.parametrize(("cost", "patients"), [("1", 500), ("3", 100), ("8", 200), ("no noise", 1000)])
def test_the_table_of_what_a_charge_buys_is_what_reports_show(cost: str, patients: int) -> None:
    """Draws patients and noise; the report's own interval adds a little for the width of the bins."""
    rng = np.random.default_rng(0)
    std, widths, points = std_of(cost), [], []
    shares = expected_counts(patients) / (patients / 2)
    for _ in range(300):
        counts = np.array([rng.multinomial(patients // 2, share) for share in shares])
        released = Histogram(counts=(counts + std * rng.normal(size=counts.shape))[None])
        limits, point = metrics.interval(released, noise_std=std), metrics.auroc(released)
        assert limits is not None and point is not None
        widths.append((limits[1] - limits[0]) / 2)
        points.append(point)
    expected = half_width(patients, noise_std=std)
    assert abs(float(np.median(widths)) - expected) < 0.003 + 0.05 * expected
    assert 1.96 * float(np.std(points)) == pytest.approx(expected, rel=0.25)


def test_decision_on_shared_noise_states_what_a_tenth_of_the_noise_is_worth() -> None:
    decision = " ".join((DOCS / "decisions" / "013-shared-noise.md").read_text(encoding="utf-8").split())
    sigma = noise_multiplier(target_epsilon=3.0, delta=1e-4, sample_rate=0.2, steps=100)
    tenth = Spend(noise_multiplier=sigma / math.sqrt(10), sample_rate=0.2, steps=100)
    worth = epsilon([tenth], delta=1e-4).value
    assert f"a tenth of the variance would be worth an epsilon of {worth:.1f}" in decision


TESTS = {
    node.name
    for path in (ROOT / "tests").glob("test_*.py")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    if isinstance(node, ast.FunctionDef)
}


def test_every_pitfall_has_a_severity_and_a_test_that_exists() -> None:
    lines = (DOCS / "pitfalls.md").read_text(encoding="utf-8").splitlines()
    rows = [line.strip("|").split("|") for line in lines if line.startswith("|") and "`test_" in line]
    assert len(rows) > 40
    for _, severity, _, test in rows:
        assert severity.strip() in {"patients", "result", "run", "people"}
        assert set(quoted(test)) <= TESTS, test


def test_decisions_are_numbered_without_gap_and_short() -> None:
    decisions = sorted((DOCS / "decisions").glob("*.md"))
    for number, path in enumerate(decisions, start=1):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert path.name.startswith(f"{number:03d}-") and lines[0].startswith(f"# {number:03d} ")
        assert len(lines) <= 30, path.name


def test_listings_in_the_documents_are_settings_of_a_site() -> None:
    blocks = re.findall(r"```yaml\n(cases:.*?)```", (DOCS / "tables.md").read_text(encoding="utf-8"), re.S)
    kinds = {type(TypeAdapter(Listing).validate_python(yaml.safe_load(block)["cases"])) for block in blocks}
    assert kinds == {Table, Folders, Pairs, Bids}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_that_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert target.startswith("https://") or (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_of_ours_that_are_named_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    pattern = r"(?<![\w/.-])((?:client|server|common|simulations|conf|tests|docs|benchmarks)/[\w./-]*\w)"
    for name in re.findall(pattern, text):
        assert (ROOT / name).exists(), name


def test_settings_of_a_site_in_conf_are_those_that_init_writes(tmp_path: Path) -> None:
    template = (ROOT / "conf" / "client.yaml").read_text(encoding="utf-8")
    settings = yaml.safe_load(template.format(name="north", nominal_patients=84))
    skeleton.complete(tmp_path / "north", name="north", nominal_patients=84)
    assert settings == yaml.safe_load((tmp_path / "north" / "site.yaml").read_text(encoding="utf-8"))
    assert set(settings) == {"schema", *SiteSettings.model_fields}
