"""The commands of docs/operation.md for a site's backup, run as they stand there."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from client import release, restoration
from client.site import Site, open_site
from common.errors import LedgerError, UserError
from tests.plans import plan
from tests.sites import write_site
from tests.test_client_restoration import FIRST, SECOND, cost_of, release_round, release_run, spent

ROOT = Path(__file__).resolve().parents[1]
THIRD = plan(study="knee", rounds=40, training__expected_batch=1000)


def commands(title: str) -> list[str]:
    """The commands under a title in docs/operation.md."""
    text = (ROOT / "docs" / "operation.md").read_text(encoding="utf-8")
    (block,) = re.findall(rf"<!-- commands: {title} -->\n```sh\n(.*?)```", text, re.DOTALL)
    return str(block).splitlines()


def does(command: str, *, place: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    shell = ["bash", "-c", command]
    return subprocess.run(shell, cwd=place, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return write_site(tmp_path / "north", max_epsilon=100.0)


@pytest.mark.slow
def test_a_site_that_comes_back_from_its_backup_declines_until_its_ledger_is_restored(site: Site) -> None:
    place = site.directory.parent
    release_run(site, FIRST, run="a")
    release_round(site, SECOND, server_round=1, run="b")
    (back_up,) = commands("back up a site")
    assert does(back_up, place=place).returncode == 0
    for server_round in (2, 3):
        release_round(site, SECOND, server_round=server_round, run="b")
    before = spent(site)
    with release.open_ledger(site) as ledger:
        remembered = ledger.head
    shutil.rmtree(site.directory)

    extract, restore, check, run = commands("bring a site back")
    assert does(extract, place=place).returncode == 0
    back = open_site(site.directory)
    assert (back.private / "site.key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(LedgerError, match="ledger restore"):
        release_round(back, SECOND, server_round=3, run="b")
    refused = does(run, place=place)
    assert refused.returncode == 1 and "ledger restore" in refused.stderr
    told = does(restore, place=place)
    assert told.returncode == 0 and SECOND.hash in told.stdout and FIRST.hash not in told.stdout, told.stderr
    assert does(check, place=place).returncode == 0
    assert spent(back) >= before
    assert spent(back) >= cost_of(back, FIRST, SECOND)
    with release.open_ledger(back) as ledger:
        ledger.require_known(remembered)  # the coordinator is content
    release_round(back, SECOND, server_round=3, run="c")


def test_what_came_after_the_backup_stops_the_site_until_it_is_named(site: Site) -> None:
    """The coordinator remembers more rows than the plans of the backup can have made."""
    place = site.directory.parent
    release_run(site, FIRST, run="a")
    (back_up,) = commands("back up a site")
    assert does(back_up, place=place).returncode == 0
    for server_round in range(1, 13):
        release_round(site, THIRD, server_round=server_round, run="b")
    before = spent(site)
    with release.open_ledger(site) as ledger:
        remembered = ledger.head
    shutil.rmtree(site.directory)
    assert does(commands("bring a site back")[0], place=place).returncode == 0
    back = open_site(site.directory)
    restoration.restore(back)
    assert spent(back) < before, "the backup knows nothing of that plan"
    with release.open_ledger(back) as ledger, pytest.raises(LedgerError):
        ledger.require_known(remembered)
    with pytest.raises(LedgerError):
        release_round(back, FIRST, server_round=1, run="c")
    with pytest.raises(UserError, match="missing rows"):
        restoration.restore(back)
    restoration.restore(back, plans=[THIRD])
    assert spent(back) >= before
    with release.open_ledger(back) as ledger:
        ledger.require_known(remembered)


WORKING = """
import sys
from pathlib import Path
from client.site import open_site
from tests.test_client_backup import THIRD
from tests.test_client_restoration import release_round

site = open_site(Path(sys.argv[1]))
for server_round in range(1, THIRD.rounds + 1):
    release_round(site, THIRD, server_round=server_round, run="w")
    print(server_round, flush=True)
"""


@pytest.mark.slow
def test_a_backup_that_is_made_while_the_site_works_refunds_nothing(site: Site, tmp_path: Path) -> None:
    release_run(site, FIRST, run="a")
    process = subprocess.Popen(
        [sys.executable, "-c", WORKING, site.directory], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "1\n"
    (back_up,) = commands("back up a site")
    copies = []
    while process.poll() is None and len(copies) < 6:
        done = does(back_up, place=tmp_path)
        assert done.returncode in (0, 1), done.stderr  # 1: a file changed meanwhile
        copies.append((tmp_path / "north.tar").rename(tmp_path / f"{len(copies)}.tar"))
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = spent(site)
    for number, copy in enumerate(copies):
        place = tmp_path / str(number)
        place.mkdir()
        copy.rename(place / "north.tar")
        assert does(commands("bring a site back")[0], place=place).returncode == 0
        back = open_site(place / "north")
        assert restoration.restore(back).num_kept > 0
        assert spent(back) >= before
        with release.open_ledger(back) as ledger:
            ledger.verify_signatures()
    assert len(copies) > 1


def test_a_site_that_was_moved_whole_goes_on_without_a_charge(site: Site, tmp_path: Path) -> None:
    release_run(site, FIRST, run="a")
    before = spent(site)
    moved = tmp_path / "other computer"
    assert does(f"cp --archive north '{moved}'", place=tmp_path).returncode == 0
    shutil.rmtree(site.directory)
    back = open_site(moved)
    assert spent(back) == before
    with pytest.raises(UserError, match="found an intact one"):
        restoration.restore(back)
