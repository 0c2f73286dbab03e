"""The rules of the design, held by tests: who imports whom, where defaults live, what never appears."""

from __future__ import annotations

import ast
import importlib
import operator
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from common.config import plain, plan_of
from tests import fault_points

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("common", "client", "server", "simulations")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
CONF = sorted((ROOT / "conf").rglob("*.yaml"))

ALLOWED = {
    "common": {"common"},
    "client": {"client", "common"},
    "server": {"server", "common"},
    "simulations": {"simulations", "client", "server", "common"},
}
ONLY_IN = {
    "hydra": {"common/config.py", "simulations/run.py", "server/__main__.py", "client/__main__.py"},
    "omegaconf": {"common/config.py", "simulations/run.py", "server/__main__.py", "client/__main__.py"},
    "opacus": {
        "client/training.py",
        "client/clipping.py",
        "client/hooked.py",
        "common/model.py",
        "common/privacy.py",
    },
    "pydicom": {
        "client/dicom.py",
        "client/series.py",
        "client/grey.py",
        "client/declared.py",  # two tags, for check
        "client/codecs.py",  # in the child process in which compressed pixels are decoded
        "simulations/dicom_file.py",  # writes DICOM, never reads it
    },
    "gdcm": {"client/codecs.py"},
    "jpeg_ls": {"client/codecs.py"},
    "openjpeg": {"client/codecs.py"},
    "nibabel": {
        "client/nifti.py",
        "client/volume.py",
        "simulations/sources.py",  # writes NIfTI, never reads it
    },
    "PIL": {
        "client/raster.py",
        "simulations/sources.py",  # writes PNG, never reads it
    },
}
PUBLIC_FLOWER = {"flwr.app", "flwr.serverapp", "flwr.serverapp.strategy", "flwr.clientapp"}


def imports(path: Path) -> Iterator[str]:
    """Yields every module that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_packages_import_only_what_the_design_allows(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    ours = {module.split(".")[0] for module in imports(path)} & {*PACKAGES, "tests", "benchmarks"}
    assert ours <= ALLOWED[package]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_special_libraries_are_imported_only_in_their_places(path: Path) -> None:
    for module in imports(path):
        library = module.split(".")[0]
        assert name_of(path) in ONLY_IN.get(library, {name_of(path)}), module


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_private_modules_of_flower_are_imported_in_one_file(path: Path) -> None:
    found = {module for module in imports(path) if module.split(".")[0] == "flwr"}
    assert name_of(path) == "common/flower.py" or found <= PUBLIC_FLOWER


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_are_nouns_of_the_domain(path: Path) -> None:
    assert path.stem not in {"utils", "util", "helpers", "helper", "base", "manager", "misc", "tools"}


@pytest.mark.parametrize("path", CONF, ids=name_of)
def test_every_config_key_has_a_comment(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("#"), "expected a first line that says what the file is for"
    for number, line in enumerate(lines):
        key = re.match(r"\s*[\w-]+:(.*)", line)
        is_block = key is not None and not key.group(1).strip()
        if key is not None and not is_block:
            assert lines[number - 1].lstrip().startswith("#"), f"{path.name}:{number + 1}: {line}"


EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_into_a_plan(experiment: str) -> None:
    with initialize_config_module("conf", version_base="1.3"):
        missing = {"pneumonia": "data.file=x"} | dict.fromkeys(
            ("covid", "hippocampus", "hippocampus_private"), "data.directory=x"
        )
        extra = [missing[experiment]] if experiment in missing else []
        tree = plain(compose("simulation", overrides=[f"experiment={experiment}", "plan.sites=9", *extra]))
    assert plan_of(tree).hash


@pytest.mark.parametrize("model", sorted(path.stem for path in (ROOT / "conf" / "model").glob("*.yaml")))
def test_every_model_composes_into_a_plan(model: str) -> None:
    preprocessing = "rgb64" if model == "article_cnn" else "grey64"
    with initialize_config_module("conf", version_base="1.3"):
        overrides = [f"model={model}", f"preprocessing={preprocessing}", "plan.sites=2"]
        target = "mask" if model == "unet" else "class"
        chosen = ["plan.classes=[a,b]", f"plan.target={target}"]
        tree = plain(compose("server", overrides=[*overrides, *chosen]))
    assert plan_of(tree).model.name == model


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_module_works_at_import_time(path: Path) -> None:
    """Top-level statements define; none opens files, starts processes or threads, or prints. One module is
    imported for what it does, by the process from which others are forked."""
    if name_of(path) == "client/preloaded.py":
        return
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            pytest.fail(f"{name_of(path)}:{node.lineno} calls {ast.unparse(node.value.func)}")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_hydra_config_stops_at_the_door(path: Path) -> None:
    doors = {"common/config.py", "simulations/run.py", "server/__main__.py", "client/__main__.py"}
    text = path.read_text(encoding="utf-8")
    assert name_of(path) in doors or "DictConfig" not in text


@pytest.mark.parametrize("module", fault_points.PLACES)
def test_points_at_which_the_tests_end_processes_are_functions_of_the_product(module: str) -> None:
    for path, _, point in fault_points.PLACES[module]:
        assert callable(operator.attrgetter(path)(importlib.import_module(module))), point
