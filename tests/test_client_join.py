from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from client import frozen, pacs, skeleton, table
from client.case import Case, Refused
from client.pacs import Series
from client.site import Site
from client.table import Table
from tests.sites import write_site

USUAL = yaml.safe_load(skeleton.settings_text(name="north", nominal_patients=1))["cases"]
JOIN: dict[str, Any] = {"by": "accession", "series": {"image": "*"}, "case": "series"}
SERIES = Series(
    study="1.2",
    series="1.2.3",
    accession="A1",
    patient="P1",
    modality="MR",
    description="T1 sag",
    directory="private/pacs/1.2/1.2.3",
    num_instances=2,
    num_expected=2,
)
T2 = replace(SERIES, series="1.2.4", description="T2 sag", directory="private/pacs/1.2/1.2.4")


def settings(**join: Any) -> Table:
    return Table.model_validate(USUAL | {"pacs": JOIN | join})


def joined(tmp_path: Path, asked: Table, *fetched: Series, cell: str = "A1") -> list[Case | Refused]:
    (tmp_path / "cases.csv").write_text(f"image,label,patient_id\n{cell},x,P1\n")
    return list(table.rows(asked, directory=tmp_path, patient_is="column", fetched=fetched))


def test_row_is_joined_by_accession_study_or_patient(tmp_path: Path) -> None:
    expected = Case(images=("private/pacs/1.2/1.2.3",), labels=("x",), patient="P1")
    for by, cell in (("accession", "A1"), ("study", "1.2"), ("patient", "P1")):
        assert joined(tmp_path, settings(by=by), SERIES, cell=cell) == [expected]


def test_row_without_its_series_with_several_or_with_a_part_of_one_is_refused(tmp_path: Path) -> None:
    found = [
        *joined(tmp_path, settings(), SERIES, cell="A2"),
        *joined(tmp_path, settings(), SERIES, T2),
        *joined(tmp_path, settings(), replace(SERIES, num_instances=1)),
        *joined(tmp_path, settings(series={"image": "T3*"}), SERIES),
        *joined(tmp_path, settings(), SERIES, cell=""),
    ]
    codes = ["not_in_pacs", "ambiguous_series", "incomplete_series", "not_in_pacs", "missing_image"]
    assert [one.code for one in found if isinstance(one, Refused)] == codes and len(found) == 5


def test_description_chooses_the_series_of_each_image(tmp_path: Path) -> None:
    join = JOIN | {"series": {"t1": "T1*", "t2": "T2*"}}
    images = {"t1": "image", "t2": "image"}
    asked = Table.model_validate(USUAL | {"images": images, "pacs": join})
    (found,) = joined(tmp_path, asked, T2, SERIES)
    assert isinstance(found, Case) and found.images == (SERIES.directory, T2.directory)


def test_every_instance_is_a_case_where_that_is_said(tmp_path: Path) -> None:
    folder = tmp_path / SERIES.directory
    folder.mkdir(parents=True)
    for name in ("b.dcm", "a.dcm", ".part"):
        (folder / name).touch()
    found = joined(tmp_path, settings(case="instance"), SERIES)
    assert [one.image for one in found] == [f"{SERIES.directory}/a.dcm", f"{SERIES.directory}/b.dcm"]
    assert {one.patient for one in found if isinstance(one, Case)} == {"P1"}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"image_path": "x/{}"}, "image_path has no effect"),
        ({"images": {"t1": "a", "t2": "b"}}, "every image"),
        (
            {
                "images": {"t1": "a", "t2": "b"},
                "pacs": JOIN | {"series": {"t1": "*", "t2": "*"}, "case": "instance"},
            },
            "one image",
        ),
    ],
)
def test_join_that_does_not_fit_the_table_is_refused(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        Table.model_validate(USUAL | {"pacs": JOIN} | changes)


def test_what_was_fetched_since_the_freeze_is_a_change_of_the_listing(tmp_path: Path) -> None:
    site: Site = write_site(tmp_path / "north", num_patients=1, cases=USUAL | {"pacs": JOIN})
    pacs.write(site, [SERIES])
    frozen.freeze(site)
    assert not frozen.has_changed(site)
    pacs.write(site, [SERIES, T2])
    assert frozen.has_changed(site)
