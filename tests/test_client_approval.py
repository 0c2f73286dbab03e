from __future__ import annotations

import json
from pathlib import Path

import pytest

from client import approval
from client.site import Site
from common.errors import Refusal
from common.plan import Plan
from tests.plans import plan
from tests.sites import write_site


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return write_site(tmp_path / "north", num_patients=1, approve="none")


def refusal(site: Site, asked: Plan) -> str:
    with pytest.raises(Refusal) as caught:
        approval.require(site, asked)
    return caught.value.code


def test_plan_is_refused_until_a_person_approved_exactly_it(site: Site) -> None:
    assert refusal(site, plan()) == "not_approved"
    approval.approve(site, plan())
    approval.require(site, plan())
    assert approval.is_approved(site, plan())
    for other in (plan(seed=1), plan(rounds=21), plan(privacy__target_epsilon=3.1)):
        assert not approval.is_approved(site, other)
        assert refusal(site, other) == "not_approved"


def test_site_that_approves_all_needs_no_record(tmp_path: Path) -> None:
    site = write_site(tmp_path / "south", num_patients=1, approve="all")
    approval.require(site, plan())
    assert not approval.is_approved(site, plan())


def test_seeded_noise_is_refused_whatever_was_approved(tmp_path: Path, site: Site) -> None:
    seeded = plan(randomness="seeded")
    approval.approve(site, seeded)
    assert refusal(site, seeded) == "seeded_noise"
    assert refusal(write_site(tmp_path / "all", num_patients=1, approve="all"), seeded) == "seeded_noise"


def test_seeded_noise_is_taken_where_the_unsafe_setting_allows_it(tmp_path: Path) -> None:
    site = write_site(tmp_path / "lab", num_patients=1, unsafe_allow_seeded_noise=True)
    approval.require(site, plan(randomness="seeded"))


def test_unsafe_setting_is_no_approval(tmp_path: Path) -> None:
    site = write_site(tmp_path / "lab", num_patients=1, unsafe_allow_seeded_noise=True, approve="none")
    assert refusal(site, plan(randomness="seeded")) == "not_approved"


def test_plan_without_privacy_is_refused_whatever_was_approved(tmp_path: Path) -> None:
    """There is no budget for it."""
    exact = plan(privacy="none")
    careful = write_site(tmp_path / "careful", num_patients=1, unsafe_allow_no_privacy=False)
    approval.approve(careful, exact)
    assert refusal(careful, exact) == "no_privacy"
    approval.require(careful, plan())
    with_public_data = write_site(
        tmp_path / "open", num_patients=1, role="evaluation", data="public", unsafe_allow_no_privacy=False
    )
    approval.require(with_public_data, exact)


def test_record_shows_the_plan_and_can_be_read_by_its_owner_only(site: Site) -> None:
    approval.approve(site, plan())
    (path,) = (site.private / "approvals").iterdir()
    record = json.loads(path.read_text())
    assert record["plan_hash"] == plan().hash
    assert Plan.from_tree(record["plan"]) == plan()
    assert (site.private / "approvals").stat().st_mode & 0o077 == 0
