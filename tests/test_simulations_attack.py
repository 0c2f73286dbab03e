"""The audit as a whole: the product passes, every planted defect is caught by the check named for it."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client import clinical
from client.cohort import Part
from client.noise import Key, secure_key
from client.training import train_by_plan
from common import model
from common.calibration import Mechanism
from common.errors import ConfigError
from common.plan import Plan
from simulations import attack, attack_page, auditor
from simulations.attack import AttackReport
from simulations.auditor import Audit
from simulations.canaries import Canaries, CanaryGradient, nobody, toss
from simulations.checks import Silence, dispersion, kolmogorov, kolmogorov_limit, participation, sensitivity
from simulations.implementation import PRODUCT, Implementation
from simulations.inversion import Inversion, Likeness
from simulations.membership import Attack as MembershipAttack
from simulations.membership import Attacked, Membership
from simulations.settings import Attack
from tests.defects import CAUGHT_BY, EPOCHS, FIXED_BATCHES, IMAGES_CLIPPED_APART
from tests.mistakes import require_one_clear_line
from tests.plans import TINY, plan

COMMAND = str(Path(sys.executable).with_name("feverfew-simulate"))
KEY = Key(secret=bytes(range(32)))
ATTACK = Attack(
    num_canaries=2000,
    num_guesses=300,
    confidence=0.95,
    false_alarm_prob=1e-4,
    membership=None,
    inversion=None,
)


def asked(**changes: Any) -> Plan:
    """A plan whose network has 2,801 parameters."""
    small: dict[str, Any] = {
        **TINY,
        "model__channels": (16, 16),
        "model__pool_sizes": (2, 1),
        "privacy__delta": 1e-5,
        "training__expected_batch": ATTACK.num_canaries,
        "training__local_steps": 1,
        "rounds": 16,
    }
    return plan(**(small | changes))


def part_of(num_patients: int = 40, *, cases: int = 2, seed: int = 7) -> Part:
    """Random images, the same number of each patient."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (num_patients * cases, 1, 8, 8), dtype=np.uint8)
    patients = tuple(np.arange(num_patients * cases).reshape(num_patients, cases))
    targets = rng.integers(0, 2, num_patients * cases)
    return Part(images=images, targets=targets, values=clinical.none(len(images)), patients=patients)


def mechanism(noise_multiplier: float = 1.0, *, sample_rate: float = 1.0) -> Mechanism:
    return Mechanism(
        sample_rate=sample_rate, noise_multiplier=noise_multiplier, evaluation_noise_multiplier={}
    )


def three_canaries(**changes: Any) -> Canaries:
    fields: dict[str, Any] = {
        "coordinates": np.array([3, 1000, 5]),
        "included": np.array([True, False, True]),
        "first_label": 2,
    }
    return Canaries(**(fields | changes))


def update_of(
    asked_plan: Plan, part: Part, canaries: Canaries, how: Implementation = PRODUCT, **changes: Any
) -> np.ndarray:
    return how.train(
        model.build(asked_plan),
        part,
        plan=asked_plan,
        mechanism=mechanism(**changes),
        canaries=canaries,
        key=KEY,
    ).update


SILENT = Implementation(noise=lambda stream: Silence())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training__momentum": 0.9, "training__local_steps": 3},
        {"training__precision": "bf16"},
    ],
)
def test_what_is_audited_trains_to_the_bits_of_the_product(changes: dict[str, Any]) -> None:
    one, part, how = asked(**changes), part_of(), mechanism(1.3, sample_rate=0.6)
    expected = train_by_plan(model.build(one), part, plan=one, mechanism=how, key=KEY)
    found = PRODUCT.train(
        model.build(one), part, plan=one, mechanism=how, canaries=nobody(first_label=2), key=KEY
    )
    np.testing.assert_array_equal(found.update, expected.update)
    assert found.train_loss == expected.train_loss


@pytest.mark.parametrize("physical_batch", [1, 7, 128])
def test_canary_moves_its_own_coordinate_by_the_clipping_bound_and_nothing_else(physical_batch: int) -> None:
    one = asked(
        training__expected_batch=1,
        training__learning_rate=1.0,
        training__physical_batch=physical_batch,
        privacy__max_grad_norm=0.25,
    )
    canaries, part = three_canaries(), part_of(10)
    moved = update_of(one, canaries.joined(part), canaries, SILENT)
    moved = moved - update_of(one, part, nobody(first_label=2), SILENT)
    expected = np.zeros(len(moved))
    expected[[3, 5]] = -0.25
    np.testing.assert_allclose(moved, expected, atol=2e-6)
    assert canaries.scores(moved) == pytest.approx([0.25, 0.0, 0.25], abs=2e-6)


def test_canaries_and_patients_are_drawn_clipped_and_noised_by_the_products_own_code() -> None:
    """The gradient function changes what a patient's gradient is before the clip, and nothing after it."""
    own = {name for name in vars(CanaryGradient) if not name.startswith("_")}
    assert own == {"contributions"}
    assert vars(PRODUCT)["sampler"].__module__ == "client.training"


def test_coins_are_fair_and_coordinates_distinct_and_quiet() -> None:
    loud = np.arange(2000) % 2 * 5.0
    tossed = toss(1000, ranking=loud, first_label=2, key=secure_key())
    assert sorted(tossed.coordinates) == list(range(0, 2000, 2))
    assert abs(tossed.included.sum() - 500) < 5 * np.sqrt(250)
    again = toss(1000, ranking=loud, first_label=2, key=secure_key())
    assert 400 < (again.included == tossed.included).sum() < 600


def test_more_canaries_than_parameters_are_refused() -> None:
    settings = ATTACK.model_copy(update={"num_canaries": 3000})
    with pytest.raises(ConfigError, match="num_canaries <= 2801"):
        auditor.run(asked(), [part_of()], attack=settings, implementation=PRODUCT)


def test_an_audit_by_a_way_without_gradients_of_single_patients_is_refused() -> None:
    ghost = asked(privacy__clipping="ghost", training__cases_per_patient=1)
    with pytest.raises(ConfigError, match="privacy.clipping=ghost"):
        auditor.run(ghost, [part_of()], attack=ATTACK, implementation=PRODUCT)


def audited(implementation: Implementation, *, randomness: str = "seeded", **changes: Any) -> Audit:
    """One run; seeded, so that what is true of most runs is true of this one every time."""
    one = asked(randomness=randomness, **changes)
    return auditor.run(one, [part_of()], attack=ATTACK, implementation=implementation)


def failed(found: Audit) -> set[str]:
    names = {check.name for check in found.checks if not check.passed}
    over = found.findings[0].lower_bound > found.ledger_epsilon
    return names | ({"audit"} if over else set())


@pytest.fixture(scope="module")
def healthy() -> Audit:
    return audited(PRODUCT)


def test_product_passes_and_the_audit_has_something_to_say(healthy: Audit) -> None:
    assert healthy.passed and not failed(healthy)
    assert healthy.ledger_epsilon == pytest.approx(3.0, rel=0.01)
    assert 0.6 < healthy.findings[0].lower_bound < 3.0, "five standard deviations below its mean of 1.1"


def test_with_one_site_the_final_model_tells_what_the_updates_tell(healthy: Audit) -> None:
    updates, final = healthy.findings
    assert final.guesses.num_right == pytest.approx(updates.guesses.num_right, abs=6), "but for rounding"


@pytest.mark.parametrize("defect", CAUGHT_BY)
@pytest.mark.slow
def test_planted_defect_is_caught_by_the_check_that_is_named_for_it(defect: str) -> None:
    implementation, check = CAUGHT_BY[defect]
    stronger = {"privacy__target_epsilon": 4.0} if defect == "no noise" else {}
    found = audited(implementation, **stronger)
    assert check in failed(found)
    assert not found.passed


@pytest.mark.slow
@pytest.mark.parametrize("defect", [None, *CAUGHT_BY])
def test_product_passes_and_defects_are_caught_in_five_of_six_runs(defect: str | None) -> None:
    """``python -m benchmarks.audit`` makes 20 of each."""
    implementation, check = CAUGHT_BY[defect] if defect else (PRODUCT, "")
    stronger = {"privacy__target_epsilon": 4.0} if defect == "no noise" else {}
    found = [failed(audited(implementation, randomness="secure", **stronger)) for _ in range(6)]
    good = sum(check in one if defect else not one for one in found)
    assert good >= 5


def test_ledger_of_the_audit_adds_up_all_rounds_and_the_reset_one_does_not(healthy: Audit) -> None:
    reset = audited(CAUGHT_BY["accounting reset each round"][0])
    assert reset.noise_multiplier == healthy.noise_multiplier
    assert reset.ledger_epsilon < healthy.ledger_epsilon / 4


def test_sensitivity_of_the_product_is_the_bound_and_no_less() -> None:
    """A check that measured too little would pass everything."""
    found = sensitivity(asked(), part_of(), implementation=PRODUCT, key=KEY)
    assert found.measured == pytest.approx(1.0, abs=1e-4)


def test_sensitivity_of_images_clipped_apart_is_the_number_of_images() -> None:
    one = asked(training__cases_per_patient=3)
    found = sensitivity(one, part_of(), implementation=IMAGES_CLIPPED_APART, key=KEY)
    assert found.measured == pytest.approx(3.0, abs=1e-3)
    assert not found.passed


@pytest.mark.parametrize("rate", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("implementation", [FIXED_BATCHES, EPOCHS], ids=["fixed", "epochs"])
def test_participations_that_vary_too_little_are_found_at_any_rate(
    implementation: Implementation, rate: float
) -> None:
    def found(how: Implementation) -> bool:
        return participation(
            asked(),
            part_of(200, cases=1),
            implementation=how,
            mechanism=mechanism(sample_rate=rate),
            key=secure_key(),
            level=1e-4,
        ).passed

    assert found(PRODUCT)
    assert not found(implementation)


def test_a_sampler_at_another_rate_is_found() -> None:
    def at_twice_the_rate(*, sample_rate: float, **streams: Any) -> Any:
        return PRODUCT.sampler(sample_rate=2 * sample_rate, **streams)

    found = participation(
        asked(),
        part_of(200, cases=1),
        implementation=Implementation(sampler=at_twice_the_rate),
        mechanism=mechanism(sample_rate=0.1),
        key=secure_key(),
        level=1e-4,
    )
    assert not found.passed


def test_p_values_of_the_spread_are_uniform_for_binomial_counts() -> None:
    rng = np.random.default_rng(3)
    found = np.array([dispersion(rng.binomial(200, 0.2, 500), trials=200, rate=0.2) for _ in range(1000)])
    ordered = np.sort(found)
    distance = np.abs(ordered - np.arange(1, 1001) / 1000).max() * np.sqrt(1000)
    assert distance < kolmogorov_limit(1e-4)


def test_kolmogorov_limit_is_exceeded_as_rarely_as_stated() -> None:
    rng = np.random.default_rng(4)
    limit = kolmogorov_limit(0.05)
    share = np.mean([kolmogorov(rng.standard_normal(500), std=1.0) > limit for _ in range(2000)])
    assert 0.03 < share < 0.05 + 4 * np.sqrt(0.05 * 0.95 / 2000)


def attacked(auc: float) -> Attacked:
    one = MembershipAttack(auc=auc, tpr_at_1_percent=auc / 10, num_members=640, num_non_members=641)
    sharper = replace(one, auc=auc + 0.01)
    return Attacked(loss_threshold=one, likelihood_ratio=sharper, accuracy=auc - 0.1, epsilon=2.9871)


MEMBERSHIP = Membership(private=attacked(0.521), none=attacked(0.871))
INVERSION = Inversion(
    original=np.eye(8, dtype=np.float32),
    recovered_without_privacy=np.eye(8, dtype=np.float32),
    recovered_with_privacy=np.zeros((8, 8), dtype=np.float32),
    without_privacy=Likeness(correlation=0.934, psnr_db=23.0, rank=1),
    with_privacy=Likeness(correlation=0.043, psnr_db=7.0, rank=37),
    num_patients=50,
    others_correlation=0.41,
    epsilon=2.9951,
)


@pytest.fixture
def report(healthy: Audit) -> AttackReport:
    return AttackReport(
        study="chest <demo>",
        plan_hash="ab" * 32,
        seeded=False,
        audit=healthy,
        membership=MEMBERSHIP,
        inversion=INVERSION,
    )


def test_json_holds_bounds_checks_and_the_verdict(report: AttackReport, tmp_path: Path) -> None:
    report.write(tmp_path)
    tree = json.loads((tmp_path / "attack.json").read_text())
    assert tree["audit"]["passed"] is True
    assert tree["audit"]["ledger_epsilon"] == report.audit.ledger_epsilon
    bounds = [finding["lower_bound"] for finding in tree["audit"]["findings"]]
    assert bounds == [finding.lower_bound for finding in report.audit.findings]
    assert [check["passed"] for check in tree["audit"]["checks"]] == [True, True, True]


def test_page_shows_both_bounds_and_neither_scripts_nor_foreign_markup(report: AttackReport) -> None:
    text = attack_page.render(report)
    assert "<script" not in text and "http" not in text.replace("http-equiv", "")
    assert "chest &lt;demo&gt;" in text and "<demo>" not in text
    assert "Nothing found against the ledger" in text
    lower = f"{report.audit.findings[0].lower_bound:.2f}"
    assert f">{lower}<" in text and ">3.00<" in text
    assert "not valid (seeded)" not in text
    assert "not valid (seeded)" in attack_page.render(replace(report, seeded=True))


def test_bars_are_as_long_as_their_values(report: AttackReport) -> None:
    upper, updates, _ = attack_page.bars(report.audit)
    assert upper.share == 1.0
    assert updates.share == pytest.approx(report.audit.findings[0].lower_bound / report.audit.ledger_epsilon)
    widths = [float(width) for width in re.findall(r'width="([\d.]+)"', attack_page.render(report))]
    assert widths[:2] == pytest.approx([640.0, 640 * updates.share], abs=0.06)


def test_other_attacks_stand_beside_each_other_with_and_without_privacy(
    report: AttackReport, tmp_path: Path
) -> None:
    report.write(tmp_path)
    page = (tmp_path / "attack.html").read_text()
    for cell in ("0.521", "0.531", "0.871", "0.881", "5.2 %", "8.7 %"):
        assert f">{cell}<" in page
    assert "0.93 without privacy, 0.04 at epsilon 3.00" in page
    assert "place 1 without privacy, 37 with it" in page
    picture = (tmp_path / "inversion.png").read_bytes()
    assert base64.b64encode(picture).decode() in page
    tree = json.loads((tmp_path / "attack.json").read_text())
    assert tree["membership"]["none"]["likelihood_ratio"]["auc"] == pytest.approx(0.881)
    assert tree["inversion"] == {
        "without_privacy": {"correlation": 0.934, "psnr_db": 23.0, "rank": 1},
        "with_privacy": {"correlation": 0.043, "psnr_db": 7.0, "rank": 37},
        "num_patients": 50,
        "others_correlation": 0.41,
        "epsilon": 2.9951,
    }
    assert list(report.comparisons())[0] == ("membership by loss: AUC", "0.521", "0.871")


def test_attacks_that_were_left_out_are_on_no_page(report: AttackReport, tmp_path: Path) -> None:
    bare = replace(report, membership=None, inversion=None)
    bare.write(tmp_path)
    page = (tmp_path / "attack.html").read_text()
    assert "Membership inference" not in page and "Gradient inversion" not in page
    assert not (tmp_path / "inversion.png").exists()
    assert not list(bare.comparisons())


def broken_reports(report: AttackReport) -> Iterator[AttackReport]:
    """Reports of a ledger that says too little, and of a mechanism that fails a test."""
    audit = report.audit
    yield replace(report, audit=replace(audit, ledger_epsilon=0.1))
    worse = replace(audit.checks[0], measured=99.0)
    yield replace(report, audit=replace(audit, checks=(worse, *audit.checks[1:])))


def test_page_table_and_json_of_a_broken_ledger_say_so(report: AttackReport) -> None:
    for broken in broken_reports(report):
        assert "The ledger is wrong" in attack_page.render(broken)
        assert "THE LEDGER IS WRONG" in str(attack.summary_table(broken).title)
        assert json.loads(broken.to_json())["audit"]["passed"] is False


MISTAKES = {
    "attack without the experiment": (["attack.num_canaries=2000"], "attack"),
    "unknown key": (["experiment=attack", "attack.canaries=2000"], "attack.canaries"),
    "odd number of guesses": (["experiment=attack", "attack.num_guesses=7"], "attack.num_guesses"),
    "more guesses than canaries": (["experiment=attack", "attack.num_guesses=6000"], "num_guesses"),
    "nothing to attack": (["experiment=attack", "privacy=none"], "privacy=dp_sgd"),
    "workers without effect": (["experiment=attack", "engine.workers=2"], "engine.workers"),
    "engine without effect": (["experiment=attack", "engine=flower"], "engine"),
    "resume without effect": (["experiment=attack", "resume=true"], "resume"),
    "evaluation without effect": (["experiment=attack", "plan.evaluation.test_at_end=true"], "test_at_end"),
}


@pytest.mark.usefixtures("fork_server_again")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gives_one_clear_line_and_exit_code_2(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides, named = MISTAKES[mistake]
    require_one_clear_line(overrides, named, place=tmp_path, monkeypatch=monkeypatch, capsys=capsys)


@pytest.mark.slow
def test_the_command_writes_its_files_and_prints_a_table(tmp_path: Path) -> None:
    overrides = ["attack.num_canaries=1000", "data.patients_per_site=10", "data.num_sites=2"]
    overrides += ["attack.membership=null", "attack.inversion.iterations=3"]
    done = subprocess.run(
        [COMMAND, "experiment=attack", "hydra.run.dir=out", *overrides],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    tree = json.loads((tmp_path / "out" / "attack.json").read_text())
    assert tree["audit"]["findings"][0]["guesses"]["num_canaries"] == 1000
    assert tree["audit"]["num_sites"] == 2
    assert (tmp_path / "out" / "attack.html").is_file()
    assert "epsilon from the released updates" in done.stdout and "report:" in done.stdout
