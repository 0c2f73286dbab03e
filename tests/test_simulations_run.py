"""feverfew-simulate as its user meets it: a command with exit codes and one clear line for a mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from server.report import Report
from tests.mistakes import require_one_clear_line
from tests.sites import write_site

COMMAND = str(Path(sys.executable).with_name("feverfew-simulate"))
SMALL = [
    "preprocessing=grey28",
    "plan.rounds=2",
    "plan.evaluation.validation_every=1",
    "training.local_steps=1",
    "engine.workers=2",
    "data=directory",
    "data.classes=[normal,opacity]",
    "state=keep",
]


def simulate(place: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *overrides], cwd=place, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sites")
    for name in ("a", "b"):
        write_site(directory / name, name=name, num_patients=30, unsafe_allow_seeded_noise=True)
    return directory


MISTAKES = {
    "unknown key": (["training.learning_rat=1"], "learning_rat"),
    "unknown added key": (["+training.learning_rat=1"], "training.learning_rat"),
    "unknown group choice": (["model=resnet9000"], "resnet9000"),
    "wrong type": (["plan.rounds=many"], "rounds"),
    "wrong type of data": (["data.patients_per_site=many"], "data.patients_per_site"),
    "range violation": (["training.learning_rate=-1"], "training.learning_rate"),
    "range violation of delta": (["privacy.delta=0.5"], "privacy"),
    "effectless setting": (["privacy=none", "plan.evaluation.noise_multiplier=1"], "noise_multiplier"),
    "impossible quorum": (["plan.sites=2", "plan.quorum=3"], "quorum"),
    "unknown engine": (["engine.name=spark"], "engine.name"),
    "missing file": (["experiment=pneumonia", "data.file=nowhere.npz"], "nowhere.npz"),
    "file not given": (["experiment=pneumonia"], "data.file"),
    "missing directory": (
        ["data=directory", "data.directory=nowhere", "data.classes=[a,b]", "state=keep"],
        "nowhere",
    ),
    "deleting the state of others": (
        ["data=directory", "data.directory=.", "data.classes=[a,b]"],
        "state=keep",
    ),
    "nothing to resume": (["resume=true", "data.patients_per_site=4"], "resume"),
}


@pytest.mark.usefixtures("fork_server_again")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gives_one_clear_line_and_exit_code_2(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides, named = MISTAKES[mistake]
    require_one_clear_line(overrides, named, place=tmp_path, monkeypatch=monkeypatch, capsys=capsys)


@pytest.mark.slow
def test_an_impossible_privacy_target_gives_one_clear_line_and_exit_code_2(
    sites: Path, tmp_path: Path
) -> None:
    done = simulate(tmp_path, *SMALL, f"data.directory={sites}", "privacy.target_epsilon=1e-9")
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "target_epsilon" in done.stderr


@pytest.mark.slow
def test_a_case_table_without_a_patient_column_gives_one_clear_line_and_exit_code_2(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_site(tmp_path / "sites" / name, name=name, num_patients=4)
        (tmp_path / "sites" / name / "cases.csv").write_text("image,label\nimages/0.png,normal\n")
    done = simulate(tmp_path, *SMALL, "data.directory=sites")
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "patient_id" in done.stderr


@pytest.mark.slow
def test_a_run_leaves_its_files_and_a_table_and_can_be_resumed(sites: Path, tmp_path: Path) -> None:
    done = simulate(tmp_path, *SMALL, f"data.directory={sites}", "hydra.run.dir=out")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    for name in ("plan.json", "report.json", "report.html", "model.safetensors", "events.jsonl"):
        assert (out / name).is_file(), name
    report = Report.read(out)
    assert report.engine == "local" and report.privacy.unit == "patient"
    assert 0 < (report.privacy.max_epsilon or 0) <= 3.0
    assert {name: entry.used for name, entry in report.participation.items()} == {"a": 60, "b": 60}
    assert "epsilon" in done.stdout and "report:" in done.stdout
    over = simulate(tmp_path, *SMALL, f"data.directory={sites}", "hydra.run.dir=out")
    assert over.returncode == 2 and "Expected a folder without a run" in over.stderr
    assert Report.read(out) == report
    again = simulate(tmp_path, *SMALL, f"data.directory={sites}", "hydra.run.dir=out", "resume=true")
    assert again.returncode == 0, again.stderr
    assert Report.read(out).run == report.run
    assert Report.read(out).privacy.per_site["a"].total_epsilon == pytest.approx(
        report.privacy.per_site["a"].total_epsilon
    )


@pytest.mark.slow
def test_without_privacy_every_output_says_so(sites: Path, tmp_path: Path) -> None:
    done = simulate(tmp_path, *SMALL, f"data.directory={sites}", "privacy=none", "hydra.run.dir=out")
    assert done.returncode == 0, done.stderr
    tree = json.loads((tmp_path / "out" / "report.json").read_text())
    assert tree["privacy"]["unit"] == "none"
    assert "NO PRIVACY" in done.stdout
    assert "NO PRIVACY" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_a_multirun_runs_every_combination(sites: Path, tmp_path: Path) -> None:
    done = simulate(
        tmp_path, *SMALL, f"data.directory={sites}", "privacy=none", "plan.seed=1,2", "--multirun"
    )
    assert done.returncode == 0, done.stderr
    reports = sorted(tmp_path.glob("runs/*/*/report.json"))
    assert [json.loads(path.read_text())["plan"]["seed"] for path in reports] == [1, 2]


def test_the_composed_config_is_printed_without_running(tmp_path: Path) -> None:
    done = simulate(tmp_path, "--cfg", "job")
    assert done.returncode == 0 and "learning_rate" in done.stdout
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_updates_in_fewer_bytes_are_counted_and_the_result_is_what_arrived(
    sites: Path, tmp_path: Path
) -> None:
    """With a model so large that what is said about the arrays weighs little."""
    wide = ["model.channels=[64,64]", "plan.randomness=seeded", "privacy=none"]
    kinds = {"full": ("fp32", 2), "half": ("fp16", 2), "quarter": ("int8", 2), "again": ("int8", 1)}
    reports, models = {}, {}
    for name, (form, workers) in kinds.items():
        chosen = [f"exchange.update={form}", f"engine.workers={workers}", f"hydra.run.dir={name}"]
        done = simulate(tmp_path, *SMALL, *wide, f"data.directory={sites}", *chosen)
        assert done.returncode == 0, done.stderr
        reports[name] = Report.read(tmp_path / name)
        models[name] = load_file(tmp_path / name / "model.safetensors")
    for key, value in models["quarter"].items():
        assert models["again"][key].tobytes() == value.tobytes(), "with any number of workers"
    for site, full in reports["full"].participation.items():
        for name, most in (("half", 0.51), ("quarter", 0.27)):
            part = reports[name].participation[site]
            assert part.bytes_up <= most * full.bytes_up
            assert part.bytes_down <= most * full.bytes_down
        state = sites / site / "state"
        kept = load_file(next((state / "models").glob("quarter-*/model.safetensors")))
        assert all(kept[key].tobytes() == value.tobytes() for key, value in models["quarter"].items())
        assert not list((state / "feedback").iterdir())
