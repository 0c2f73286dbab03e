from __future__ import annotations

import hashlib
import io
import json
import math
import re
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser

import numpy as np
import pytest
from pydantic import ValidationError
from rich.console import Console

from common import metrics
from common.errors import StateError
from common.metrics import Histogram, Scores
from common.value import canonical_json
from server import figures, page
from server.figures import MOST_BARS
from server.report import (
    Participation,
    Privacy,
    Report,
    Round,
    SitePrivacy,
    Timing,
    Versions,
)
from server.result import Result, SiteResult
from server.summary import MOST_ROWS, summary_table

NAMES = ["aspen", "birch", "cedar", "elder", "hazel", "juniper"]
STARTED = datetime(2026, 3, 2, 9, 30, tzinfo=UTC)

DP_SGD = {
    "mechanism": "dp_sgd",
    "target_epsilon": 3.0,
    "noise_multiplier": None,
    "delta": 1e-4,
    "max_grad_norm": 1.0,
    "loss_bound": 2.0,
    "loss_noise_ratio": 8.0,
    "clipping": "auto",
}


def plan(*, rounds, sites, privacy):
    return {
        "schema_version": 3,
        "target": "class",
        "clinical": [],
        "study": "chest-opacity",
        "classes": ["normal", "opacity"],
        "randomness": "secure",
        "seed": 7,
        "rounds": rounds,
        "sites": sites,
        "quorum": max(1, sites - 2),
        "node_deadline_seconds": 120.0,
        "reply_deadline_seconds": 600.0,
        "grace_seconds": 60.0,
        "model": {"name": "cnn", "channels": [16, 32, 64], "groups": 8},
        "preprocessing": {
            "inputs": ["image"], "channels": 1, "size": [64, 64], "precision": "uint8",
            "steps": [{"name": "percentile", "lower": 1.0, "upper": 99.0}, {"name": "resize"}],
        },
        "training": {
            "local_steps": 4, "expected_batch": 48, "cases_per_patient": 2, "physical_batch": 64,
            "learning_rate": 0.5, "momentum": 0.0, "weight_decay": 0.0, "proximal_mu": 0.0,
        },
        "privacy": DP_SGD if privacy else {"mechanism": "none"},
        "evaluation": {
            "bins": 10, "validation_every": 4, "test_at_end": True,
            "noise_multiplier": 3.0 if privacy else None,
        },
        "strategy": {"name": "fedavg", "weights": "equal", "server_learning_rate": 1.0,
            "server_momentum": 0.0, "update_bound": 64.0},
    }  # fmt: skip


def site_scores(rng, *, positives, negatives, shift):
    latent = np.concatenate([rng.normal(size=negatives), rng.normal(size=positives) + shift]) * 1.6
    targets = np.repeat([0, 1], [negatives, positives])
    return Scores(
        scores=1 / (1 + np.exp(0.8 * shift - latent))[:, None],
        targets=targets[:, None],
        weights=np.ones(targets.size),
    )


def participation(name, *, done, tells):
    facts = {"offered": 412, "used": 405, "quarantined": 7, "reasons": {"truncated": 4, "no_pixel_data": 3}}
    return Participation(
        status="trained",
        role="training",
        rounds_valid=done,
        rounds_late=0,
        rounds_rejected=0,
        tasks_sent_again=0,
        bytes_down=done * 90_000,
        bytes_up=done * 23_000,
        story=f"answered all {done} rounds",
        patient_is="column",
        **(facts if tells else {}),
    )


def example(
    *, names=NAMES, private=True, seeded=False, status="completed", rounds=20, done=None, tells=False, seed=0
):
    """A report such as a run would write; ``tells``: with what only a simulation knows."""
    rng = np.random.default_rng(seed)
    done = rounds if done is None else done
    tree = plan(rounds=rounds, sites=len(names), privacy=private)
    noise = 3.0 if private else 0.0
    exact = {
        name: site_scores(
            rng, positives=30 + 9 * (i % 4), negatives=52 + 7 * (i % 5), shift=2.0 + 0.2 * (i % 3)
        )
        for i, name in enumerate(names)
    }
    released = {
        name: Histogram(counts=(counts := found.histogram(10).counts) + noise * rng.normal(size=counts.shape))
        if private
        else found
        for name, found in exact.items()
    }
    tested = status == "completed"
    report = Report(
        plan_hash=hashlib.sha256(canonical_json(tree).encode()).hexdigest(),
        run="chest-opacity-20260302-093000",
        study="chest-opacity",
        engine="local" if tells else "deployment",
        versions=Versions(feverfew="0.1.0", flwr="1.41.0", torch="2.13.0", monai="1.6.1", opacus="1.6.0"),
        started=STARTED,
        finished=STARTED + timedelta(seconds=1234),
        status=status,
        rounds=[
            training_round(n, rng, num_sites=len(names), last=not tested and n == done)
            for n in range(1, done + 1)
        ],
        final=Result.merged(released, noise_std=dict.fromkeys(names, noise), bins=10)
        if tested
        else Result.merged({}, noise_std={}, bins=10),
        privacy=costs(names, seeded=seeded) if private else no_privacy(seeded=seeded),
        participation={name: participation(name, done=done, tells=False) for name in names},
        timing=Timing(wall_seconds=1234.0, training_seconds=1011.2, overhead_seconds=222.8),
        restarts={},
        plan=tree,
        notes=[],
    )  # fmt: skip
    if not tells:
        return report
    return report.with_exact(exact).with_site_facts(
        privacy={
            name: {"budget": 3.0 + i % 2, "total_epsilon": 2.981 - 0.21 * (i % 3) + 0.5 * (i % 2)}
            for i, name in enumerate(names)
        }
        if private
        else {},
        participation={
            name: participation(name, done=done, tells=True).model_dump(
                include={"offered", "used", "quarantined", "reasons"}
            )
            for name in names
        },
    )


def training_round(number, rng, *, num_sites, last):
    progress = 1 - math.exp(-number / 6)
    valid = 1 if last else num_sites - (number in (4, 5))
    auroc = round(0.5 + 0.42 * progress + 0.01 * rng.normal(), 4) if number % 4 == 0 else None
    return Round(
        round=number,
        seconds=51.0 + rng.random(),
        sites_asked=num_sites,
        sites_valid=valid,
        train_loss=0.72 - 0.4 * progress + 0.02 * rng.normal(),
        auroc=auroc,
        auroc_interval=(auroc - 0.07, min(1.0, auroc + 0.05)) if auroc else None,
        accuracy=auroc - 0.08 if auroc else None,
    )


def costs(names, *, seeded):
    per_site = {
        name: SitePrivacy(
            epsilon=2.981 - 0.21 * (i % 3),
            noise_multiplier=1.31 + 0.1 * (i % 3),
            sample_rate=48 / (180 + 40 * (i % 3)),
            steps=80,
            nominal_patients=180 + 40 * (i % 3),
        )
        for i, name in enumerate(names)
    }
    return Privacy(
        unit="patient", delta=1e-4, max_epsilon=2.981, seeded=seeded, accountant="PRV", per_site=per_site
    )


def no_privacy(*, seeded=False):
    return Privacy(unit="none", delta=None, max_epsilon=None, seeded=seeded, accountant=None, per_site={})


@pytest.fixture(scope="module")
def report():
    return example()


@pytest.fixture(scope="module")
def simulated():
    return example(tells=True)


@pytest.fixture(scope="module")
def bare():
    """A report without figures, which are what takes time."""
    return example(private=False, status="failed", done=0)


@pytest.fixture(scope="module")
def private_page(report):
    return page.render(report)


@pytest.fixture(scope="module")
def simulated_page(simulated):
    return page.render(simulated)


class Page(HTMLParser):
    """Collects what a browser would see: tags, attributes, ids, visible text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]

    def handle_data(self, data):
        self.text += data


# --- report.json --------------------------------------------------------------------------------------------


def test_json_has_the_documented_keys(report):
    tree = json.loads(report.to_json())
    assert set(tree) == {
        "plan_hash", "run", "study", "engine", "versions", "started", "finished", "status", "rounds", "final",
        "privacy", "participation", "timing", "restarts", "plan", "notes",
    }  # fmt: skip
    assert set(tree["versions"]) == {"feverfew", "flwr", "torch", "monai", "opacus"}
    assert set(tree["rounds"][0]) == {"round", "seconds", "sites_asked", "sites_valid", "train_loss"}
    assert set(tree["rounds"][3]) - set(tree["rounds"][0]) == {"auroc", "auroc_interval", "accuracy"}
    values = {"auroc", "accuracy", "sensitivity", "specificity", "calibration_error"}
    measures = values | {f"{name}_interval" for name in values}
    assert set(tree["final"]) == measures | {"roc", "per_site"}
    assert set(tree["final"]["per_site"]) == set(NAMES)
    assert set(tree["final"]["per_site"]["aspen"]) == measures
    assert set(tree["privacy"]) == {"unit", "delta", "max_epsilon", "seeded", "accountant", "per_site"}
    assert set(tree["privacy"]["per_site"]["aspen"]) == {
        "epsilon", "noise_multiplier", "sample_rate", "steps", "nominal_patients",
    }  # fmt: skip
    assert set(tree["participation"]["aspen"]) == {
        "status", "role", "rounds_valid", "rounds_late", "rounds_rejected", "tasks_sent_again", "story",
        "bytes_down", "bytes_up", "patient_is",
    }  # fmt: skip
    assert set(tree["timing"]) == {"wall_seconds", "training_seconds", "overhead_seconds"}


def test_json_has_the_simulations_keys_only_where_they_are_known(simulated):
    tree = json.loads(simulated.to_json())
    assert 0.5 < tree["final"]["auroc_exact"] <= 1
    assert 0.5 < tree["final"]["per_site"]["birch"]["auroc_exact"] <= 1
    assert tree["privacy"]["per_site"]["birch"]["budget"] == 4.0
    assert tree["participation"]["birch"]["reasons"] == {"truncated": 4, "no_pixel_data": 3}


def test_unknown_required_values_are_written_as_null():
    tree = json.loads(example(status="quorum_not_reached", done=3).to_json())
    assert tree["final"]["auroc"] is None and tree["final"]["auroc_interval"] is None
    assert tree["final"]["roc"] == [] and tree["final"]["per_site"] == {}
    assert "auroc_exact" not in tree["final"] and "loss" not in tree["final"]
    assert json.loads(example(private=False).to_json())["privacy"]["max_epsilon"] is None


def test_plan_travels_whole_with_its_hash(report):
    tree = json.loads(report.to_json())
    assert tree["plan"]["privacy"] == DP_SGD
    assert tree["plan_hash"] == hashlib.sha256(canonical_json(tree["plan"]).encode()).hexdigest()


def test_report_is_read_back_as_it_was_written(simulated, tmp_path):
    simulated.write(tmp_path)
    assert Report.read(tmp_path) == simulated


def test_reading_something_else_raises_state_error(tmp_path):
    with pytest.raises(StateError, match="Expected a report"):
        Report.read(tmp_path)
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(StateError, match="Expected a report"):
        Report.read(tmp_path)


def test_nan_is_refused(report):
    with pytest.raises(ValidationError):
        Round(round=1, seconds=math.nan, sites_asked=1, sites_valid=1, train_loss=None)
    with pytest.raises(ValidationError):
        Report.model_validate({**report.model_dump(), "unknown": 1})


def test_write_replaces_both_files_and_leaves_nothing_else(bare, tmp_path):
    for content in (bare, bare.model_copy(update={"notes": ("second",)})):
        content.write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]
    assert json.loads((tmp_path / "report.json").read_text())["notes"] == ["second"]
    assert "second" in (tmp_path / "report.html").read_text()


def test_failed_write_leaves_the_old_report(bare, tmp_path, monkeypatch):
    bare.write(tmp_path)
    before = (tmp_path / "report.json").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
        bare.model_copy(update={"notes": ("second",)}).write(tmp_path)
    assert (tmp_path / "report.json").read_bytes() == before


# --- values from statistics ---------------------------------------------------------------------------------


def test_result_pools_the_sites_with_their_noise():
    rng = np.random.default_rng(0)
    exact = {name: site_scores(rng, positives=40, negatives=60, shift=2.0) for name in NAMES[:4]}
    binned = {name: found.histogram(10) for name, found in exact.items()}
    silent = Result.merged(binned, noise_std={}, bins=10)
    noised = Result.merged(binned, noise_std=dict.fromkeys(binned, 3.0), bins=10)
    pooled = Histogram(counts=sum(found.counts for found in binned.values()))
    assert silent.auroc == SiteResult.of(pooled, noise_std=0, bins=10).auroc
    with_noise = SiteResult.of(pooled, noise_std=6.0, bins=10)  # 3 times the root of 4
    assert SiteResult(**{name: getattr(noised, name) for name in SiteResult.model_fields}) == with_noise
    assert noised.per_site["aspen"] == SiteResult.of(binned["aspen"], noise_std=3.0, bins=10)
    for name in ("accuracy", "sensitivity", "specificity"):
        interval = getattr(metrics, f"{name}_interval")(binned["aspen"], noise_std=3.0)
        assert getattr(noised.per_site["aspen"], f"{name}_interval") == interval
    error = metrics.calibration_error_interval(binned["aspen"], bins=10, noise_std=3.0)
    assert noised.per_site["aspen"].calibration_error_interval == error
    assert silent.roc[0] == (0.0, 0.0) and silent.roc[-1] == (1.0, 1.0)


def test_public_scores_of_one_site_stand_beside_histograms_of_others():
    rng = np.random.default_rng(0)
    found = site_scores(rng, positives=40, negatives=60, shift=2.0)
    result = Result.merged({"north": found.histogram(10), "public": found}, noise_std={"north": 2.0}, bins=10)
    assert result.per_site["public"].loss is not None and result.per_site["north"].loss is None
    assert result.loss is None


def test_page_shows_the_interval_of_every_rate(report, tmp_path):
    report.write(tmp_path)
    shown = (tmp_path / "report.html").read_text(encoding="utf-8")
    cards = shown[shown.index('<dl class="cards">') : shown.index("</dl>")]
    assert cards.count("95 % interval") == 5
    for name in ("accuracy", "sensitivity", "specificity", "calibration_error"):
        assert page.bounds(getattr(report.final, f"{name}_interval")) in cards


def test_facts_about_an_unknown_site_or_key_are_refused(report):
    with pytest.raises(ValueError, match="nowhere"):
        report.with_site_facts(privacy={"nowhere": {"budget": 1.0}}, participation={})
    with pytest.raises(ValidationError):
        report.with_site_facts(privacy={}, participation={"aspen": {"patients": ["Smith"]}})


# --- report.html --------------------------------------------------------------------------------------------


def test_page_refers_to_nothing_outside_itself(simulated_page):
    text, found = simulated_page, Page(simulated_page)
    assert "http:" not in text and "https:" not in text and "@import" not in text
    for _, name, value in found.attributes:
        assert name not in {"src", "srcset", "action", "data"}
        assert name not in {"href", "xlink:href"} or value.startswith("#")
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(found.tags)
    assert set(re.findall(r"url\((.)", text)) == {"#"}


def test_references_inside_the_page_lead_somewhere_and_ids_are_unique(simulated_page):
    found = Page(simulated_page)
    ids = [value for _, name, value in found.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    wanted = [value[1:] for _, name, value in found.attributes if name in {"href", "xlink:href"}]
    labels = [
        word for _, name, value in found.attributes if name == "aria-labelledby" for word in value.split()
    ]
    clips = [
        match
        for _, name, value in found.attributes
        if value
        for match in re.findall(r"url\(#([^)]+)\)", value)
    ]
    assert len(labels) == 12 + 4 and clips and set(wanted + labels + clips) <= set(ids)


def test_hostile_names_are_shown_as_text(simulated_page):
    evil = "--><script>alert(1)</script>\"'&<b>$x_y$\x00💥"
    base = example(names=[evil, "birch"], tells=True)
    hostile = base.model_copy(
        update={
            **dict.fromkeys(["study", "run", "engine"], evil),
            "notes": (evil,),
            "plan": {**base.plan, evil: {evil: evil}, "classes": [evil, evil]},
        }
    )
    found = Page(page.render(hostile))
    assert "script" not in found.tags
    assert set(found.tags) <= set(Page(simulated_page).tags) | {"ul", "li"}
    assert "<script>alert(1)</script>" in found.text
    assert not [name for _, name, _ in found.attributes if name.startswith("on")]


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("seeded", [True, False])
def test_page_and_table_warn_exactly_when_there_is_no_valid_epsilon(private, seeded):
    made = example(private=private, seeded=seeded, status="failed", done=0)
    screen = io.StringIO()
    Console(file=screen, width=120).print(summary_table(made))
    drawn = page.render(made)
    assert ('<strong class="head">NO PRIVACY</strong>' in drawn) == (not private)
    assert ('<strong class="head">epsilon: not valid (seeded)</strong>' in drawn) == (private and seeded)
    for text in (Page(drawn).text, screen.getvalue()):
        assert ("NO PRIVACY" in text) == (not private)
        assert ("epsilon: not valid (seeded)" in text) == seeded


def test_page_of_a_private_run_states_unit_epsilon_rounded_up_and_delta(private_page):
    text = Page(private_page).text
    assert "Unit: the patient. ε ≤ 2.99 at δ = 0.0001" in text
    assert "19.8 times as likely" in text
    assert "Computed by: PRV" in text


def test_page_of_a_run_without_quorum_tells_where_it_stopped():
    made = example(status="quorum_not_reached", done=3)
    text = Page(page.render(made)).text
    assert "Stopped: quorum not reached" in text
    assert (
        "Round 3 of 20 had valid updates from 1 of the 6 sites asked, fewer than the quorum of 4. The model"
        in text
    )
    assert "Unknown: the run ended before the final model was tested." in text


def test_page_of_a_run_that_failed_before_its_first_round_renders(bare):
    text = Page(page.render(bare)).text
    assert "The run ended after 0 of 20 rounds. There is no trained model." in text
    assert "No round was finished." in text


def test_page_renders_with_a_plan_that_lacks_everything(report):
    assert "chest-opacity" in page.render(report.model_copy(update={"plan": {}}))


def test_page_shows_notes_stories_plan_and_versions(report, bare):
    made = bare.model_copy(
        update={
            "notes": ("each image is its own patient at site aspen",),
            "plan": report.plan,
            "plan_hash": report.plan_hash,
            "participation": report.participation,
        }
    )
    text = Page(page.render(made)).text
    for words in (
        "each image is its own patient at site aspen",
        "answered all 20 rounds",
        made.plan_hash,
        "max_grad_norm",
        "opacus 1.6.0",
    ):
        assert words in text


def test_every_figure_has_a_title_and_a_description(simulated_page):
    text = simulated_page
    assert text.count("<svg") == 6
    for part in text.split("<svg")[1:]:
        assert re.search(r"<title [^>]*>[^<]+</title>\s*<desc [^>]*>[^<]+</desc>", part)


def test_a_figure_of_very_many_rounds_is_drawn_in_one_piece():
    """A hundred bars took six times as long to draw."""
    few, many = (figures.answers_by_round(example(rounds=MOST_BARS * times)) for times in (1, 10))
    assert few.count("<path") > 2 * MOST_BARS > many.count("<path")


def test_same_report_gives_the_same_bytes(report, private_page):
    assert page.render(report) == private_page


def test_long_and_strange_site_names_are_plain_in_figures_but_whole_in_tables():
    long, strange = "the-university-hospital-of-the-far-north", "h\u00f4pital 💥 $x$"
    text = page.render(example(names=[long, strange]))
    assert text.count(">the-university-...<") == 2 and text.count(">h?pital ? $x$<") == 2
    assert f'<th scope="row">{long}</th>' in text and f'<th scope="row">{strange}</th>' in text


# --- closing table ------------------------------------------------------------------------------------------


def test_closing_table_has_cases_auroc_and_epsilon_of_budget(simulated):
    screen = io.StringIO()
    Console(file=screen, width=120).print(summary_table(simulated))
    row = next(line for line in screen.getvalue().splitlines() if "birch" in line)
    assert "405" in row and "3.28 of 4.00" in row
    assert page.number(simulated.final.per_site["birch"].auroc) in row
    assert "epsilon of budget" in screen.getvalue()


def test_closing_table_of_very_many_sites_shows_the_first_and_says_how_many_there_are_more():
    names = [f"site-{number:03}" for number in range(MOST_ROWS + 7)]
    screen = io.StringIO()
    Console(file=screen, width=120).print(summary_table(example(names=names, rounds=4)))
    shown = [name for name in names if name in screen.getvalue()]
    assert shown == names[:MOST_ROWS] and "and 7 more" in screen.getvalue()
    screen = io.StringIO()
    Console(file=screen, width=120).print(summary_table(example(names=names[:MOST_ROWS], rounds=4)))
    assert names[MOST_ROWS - 1] in screen.getvalue() and "more" not in screen.getvalue()


def test_closing_table_does_not_take_a_name_for_markup():
    screen = io.StringIO()
    Console(file=screen, width=120).print(summary_table(example(names=["[red]x[/red]", "birch"], rounds=4)))
    assert "[red]x[/red]" in screen.getvalue()
