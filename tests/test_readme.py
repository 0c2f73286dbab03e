"""The README is followed to the letter: its commands parse, its keys exist, and its walk is walked."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra._internal.utils import get_args_parser

from client.__main__ import _parser as client_parser
from common.config import compose_plan, plain, plan_of
from server.__main__ import _parser as server_parser
from server.report import Report
from simulations.settings import settings_of, source_of
from tests.ports import free_port
from tests.test_docs import DOCUMENTS, quoted, table

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PORT = "8443"
HOSPITALS = ("north", "south")
ORDINARY = {"pip", "python3", ".", "cp", "ls"}
MARK = re.compile(r'<!-- run (?P<order>\d+): (?P<terminal>\w+)(?:, until "(?P<until>[^"]+)")? -->\s*')


@dataclass(frozen=True, kw_only=True)
class Block:
    """A shell block; ``order`` is 0 where it is only to be read, ``until`` what a daemon says when ready."""

    order: int
    terminal: str
    until: str
    script: str


def blocks() -> list[Block]:
    """Returns the shell blocks of the README, in its order."""
    found = []
    for match in re.finditer(r"(<!-- run [^\n]*-->\n)?```shell\n(.*?)```", TEXT, re.DOTALL):
        mark = MARK.fullmatch(match[1] or "")
        assert mark or not match[1], f"not a mark: {match[1]}"
        told = mark.groupdict() if mark else {}
        found.append(
            Block(
                order=int(told.get("order") or 0),
                terminal=told.get("terminal") or "",
                until=told.get("until") or "",
                script=match[2],
            )
        )
    return found


def commands() -> list[list[str]]:
    """Returns the words of every command in the README, variables replaced."""
    values = {"SITE": "north", "DATA": "sites/small/site-1", "NOMINAL": "60"}
    lines = [line for block in blocks() for line in block.script.splitlines()]
    words = [shlex.split(re.sub(r"\$(\w+)", lambda name: values[name[1]], line)) for line in lines]
    return [line for line in words if line and "=" not in line[0]]


COMMANDS = commands()


def of(program: str) -> list[list[str]]:
    return [words[1:] for words in COMMANDS if words[0] == program]


def test_only_commands_that_exist_are_named() -> None:
    ours = set(re.findall(r"^(feverfew-\w+) =", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    assert len(ours) == 3
    assert {words[0] for words in COMMANDS} == ours | ORDINARY | {"make"}


def verbs(parser: argparse.ArgumentParser) -> set[str]:
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return set(actions[0].choices)


@pytest.mark.parametrize("program", ["feverfew-server", "feverfew-client"])
def test_every_verb_is_shown_and_every_flag_known(program: str) -> None:
    parser = server_parser() if program == "feverfew-server" else client_parser()
    for words in of(program):
        arguments = parser.parse_args(words)
        if words[0] == "plan":
            assert compose_plan(arguments.overrides).hash
    assert {words[0] for words in of(program)} == verbs(parser)


def test_verbs_named_in_the_text_exist() -> None:
    for program, parser in (("feverfew-server", server_parser()), ("feverfew-client", client_parser())):
        for text in (TEXT, ARCHITECTURE, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")):
            assert set(re.findall(rf"`{program} (\w+)", text)) <= verbs(parser)


@pytest.mark.parametrize("words", of("feverfew-simulate"), ids=" ".join)
def test_every_simulation_composes(words: list[str]) -> None:
    asked = get_args_parser().parse_args(words)
    sweeps = [override.partition("=")[0::2] for override in asked.overrides]
    values = [value.split(",") if asked.multirun else [value] for _, value in sweeps]
    for chosen in product(*values):
        overrides = [f"{key}={value}" for (key, _), value in zip(sweeps, chosen, strict=True)]
        own = [override for override in overrides if not override.startswith("hydra.")]
        with initialize_config_module("conf", version_base="1.3"):
            tree = plain(compose("simulation", overrides=[*own, "plan.sites=200"]))
        assert plan_of(tree).hash and settings_of(tree) and source_of(tree["data"])


def test_targets_of_make_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for words in of("make"):
        assert re.search(rf"^{words[0]}:", makefile, re.MULTILINE)
        assert all(f"$({word.partition('=')[0]})" in makefile for word in words[1:])
        assert len(words) == 1 or shlex.split(words[1].partition("=")[2])


def overrides_of_make() -> list[str]:
    return [word for words in of("make") for value in words[1:] for word in value.partition("=")[2].split()]


def test_overrides_given_to_make_compose() -> None:
    with initialize_config_module("conf", version_base="1.3"):
        tree = plain(compose("simulation", overrides=[*overrides_of_make(), "plan.sites=4"]))
    assert overrides_of_make() and plan_of(tree).hash


def test_the_table_of_groups_is_conf() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (`[^|]*`) \|", TEXT, re.MULTILINE)
    documented = {group: set(quoted(choices)) for group, choices in rows}
    groups = [path for path in (ROOT / "conf").iterdir() if path.is_dir() and list(path.glob("*.yaml"))]
    assert documented == {path.name: {file.stem for file in path.glob("*.yaml")} for path in groups}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_keys_that_are_named_exist(path: Path) -> None:
    with initialize_config_module("conf", version_base="1.3"):
        tree = plain(compose("simulation", overrides=["plan.sites=4"]))
    text = path.read_text(encoding="utf-8")
    for key in re.findall(rf"`((?:{'|'.join(tree)})(?:\.\w+)+)", text):
        if key.endswith((".html", ".json", ".jsonl", ".safetensors", ".yaml", ".md", ".py")):
            continue
        place = tree
        for name in key.split("."):
            assert name in place, key
            place = place[name]


def test_the_picture_is_small() -> None:
    assert (ROOT / "docs" / "report.png").stat().st_size <= 200 * 1024


class Terminals:
    """Runs the README's blocks as people in several terminals of one directory would."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port(also_next=True)
        self.variables: dict[str, str] = {}
        self.daemons: list[subprocess.Popen[bytes]] = []
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}

    def run(self, block: Block) -> None:
        """Runs a block; in the terminal of each hospital, if it is a hospital's."""
        names = HOSPITALS if block.terminal == "hospital" else (block.terminal,)
        for name in names:
            if re.fullmatch(r"(\w+=\S+ ?)+\n", block.script):
                self.variables[name] = block.script
            elif block.until:
                self.start(block, name=name)
            else:
                self.finish(block, name=name)

    def script(self, block: Block, *, name: str) -> str:
        return self.variables.get(name, "") + block.script.replace(PORT, str(self.port))

    def finish(self, block: Block, *, name: str) -> None:
        done = subprocess.run(
            ["bash", "-euc", self.script(block, name=name)],
            cwd=self.directory,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        print(f"--- {name}: {block.script}{done.stdout}{done.stderr}")
        assert done.returncode == 0, f"{block.script}{done.stdout}{done.stderr}"

    def start(self, block: Block, *, name: str) -> None:
        log = self.directory / f"{block.order}-{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["bash", "-euc", self.script(block, name=name).replace("feverfew", "exec feverfew")],
                cwd=self.directory,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self.daemons.append(process)
        deadline = time.monotonic() + 90
        while block.until not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)

    def close(self) -> None:
        for process in reversed(self.daemons):
            process.send_signal(signal.SIGTERM)
            process.wait(60)


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory after every marked block has been run, in the order of the marks."""
    terminals = Terminals(tmp_path_factory.mktemp("walk"))
    try:
        for block in sorted((block for block in blocks() if block.order), key=lambda block: block.order):
            terminals.run(block)
        yield terminals.directory
    finally:
        terminals.close()


def test_marks_have_every_number_once_or_belong_together() -> None:
    orders = {block.order for block in blocks() if block.order}
    assert orders == set(range(1, max(orders) + 1))


@pytest.mark.slow
@pytest.mark.deployment
def test_the_walk_ends_with_a_report_that_every_site_took_part_in(walked: Path) -> None:
    (run,) = (walked / "coordinator" / "runs").iterdir()
    report = Report.read(run)
    assert report.status == "completed"
    assert {name: part.rounds_valid for name, part in report.participation.items()} == dict.fromkeys(
        HOSPITALS, len(report.rounds)
    )
    for name in HOSPITALS:
        delivered = walked / name / "state" / "models" / run.name / "model.safetensors"
        assert delivered.read_bytes() == (run / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.deployment
def test_the_files_that_the_documents_name_are_there(walked: Path) -> None:
    (deployed,) = (walked / "coordinator" / "runs").iterdir()
    (simulated,) = (walked / "runs").iterdir()
    places: Mapping[str, list[Path]] = {
        "site files": [walked / name for name in HOSPITALS],
        "coordinator files": [walked / "coordinator"],
        "run files": [deployed, simulated],
    }
    for name, directories in places.items():
        named = [path for row in table(ARCHITECTURE, name) for path in quoted(row[0])]
        assert named
        for directory, path in product(directories, named):
            assert (directory / path).exists(), directory / path
    assert (simulated / "sites.log").exists() and (deployed / "submission.json").exists()
    readme = re.findall(r"^\| `([\w.]+)` \| [^|]*\|$", TEXT.partition("runs/<time>")[2], re.MULTILINE)
    assert set(readme[:6]) == {path for row in table(ARCHITECTURE, "run files") for path in quoted(row[0])}
