from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from client import skeleton, spreadsheet, table
from client.case import Case, PatientIs, Refused
from client.table import Table
from common.errors import DataError

USUAL = yaml.safe_load(skeleton.settings_text(name="north", nominal_patients=1))["cases"]


def settings(**changes: Any) -> Table:
    return Table.model_validate(USUAL | changes)


def read(
    tmp_path: Path, text: str | bytes, *, patient_is: PatientIs = "column", **changes: Any
) -> list[Case | Refused]:
    asked = settings(**changes)
    (tmp_path / asked.file).write_bytes(text.encode() if isinstance(text, str) else text)
    return list(table.rows(asked, directory=tmp_path, patient_is=patient_is))


def refusal(tmp_path: Path, text: str | bytes, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(tmp_path, text, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def case(image: str, *labels: str, patient: str, **more: Any) -> Case:
    return Case(images=(image,), labels=labels, patient=patient, **more)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_rows_become_cases_whatever_the_order_of_columns(tmp_path: Path, mark: bytes) -> None:
    text = (
        mark
        + 'note,patient_id,image,label\r\n"a, b",P1 ,./x/ä.dcm,normal\r\n\r\n,P2,y.png,opacity\r\n'.encode()
    )
    assert read(tmp_path, text) == [
        case("x/ä.dcm", "normal", patient="P1"),
        case("y.png", "opacity", patient="P2"),
    ]


def test_every_image_is_its_own_patient_only_when_that_is_said(tmp_path: Path) -> None:
    text = "image,label\na.png,x\n./b.png,y\n"
    found = read(tmp_path, text, patient_is="case")
    assert [case.patient for case in found if isinstance(case, Case)] == ["a.png", "b.png"]
    message = refusal(tmp_path, text)
    assert "patient_id" in message and "patient_is: case" in message


def test_patient_column_that_contradicts_patient_is_case_is_an_error(tmp_path: Path) -> None:
    text = "image,label,patient_id\na.png,x,P1\nb.png,x,P2\nc.png,y,P1\n"
    message = refusal(tmp_path, text, patient_is="case")
    assert "line 4" in message and "P1" not in message
    distinct = text.replace("c.png,y,P1", "c.png,y,P3")
    assert len(read(tmp_path, distinct, patient_is="case")) == 3


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ("/etc/a.png,x,P", "bad_path"),
        ("../a.png,x,P", "bad_path"),
        ("b/../../a.png,x,P", "bad_path"),
        ("a\0.png,x,P", "bad_path"),
        (",x,P", "missing_image"),
        ("a.png,x,", "missing_patient"),
        ("a.png,x", "malformed_row"),
        ("a.png,x,P,more", "malformed_row"),
        ("first.png,x,P", "duplicate_row"),
        ("./first.png,x,P", "duplicate_row"),
        ("first.png,y,P", "contradictory_rows"),
        ("first.png,x,Q", "contradictory_rows"),
    ],
)
def test_a_bad_row_is_refused_with_a_code_and_the_next_one_read(tmp_path: Path, row: str, code: str) -> None:
    found = read(tmp_path, f"image,label,patient_id\nfirst.png,x,P\n{row}\nlast.png,x,P\n")
    assert isinstance(found[1], Refused) and found[1].code == code
    assert [case.image for case in found if isinstance(case, Case)] == ["first.png", "last.png"]


def test_empty_label_is_a_case_about_which_nothing_is_said(tmp_path: Path) -> None:
    (found,) = read(tmp_path, "image,label,patient_id\na.png, ,P\n")
    assert isinstance(found, Case) and found.labels is None


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "an empty file"),
        ("image,label,patient_id,label\n", "more than once"),
        ("image,diagnosis,patient_id\n", "column label"),
        (b"image,label,patient_id\n\xe4.png,x,P\n", "UTF-8"),
        ('image,label,patient_id\n"a.png,x,P\n', "line 2"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_clear_line(tmp_path: Path, text: str | bytes, word: str) -> None:
    assert word in refusal(tmp_path, text)


@pytest.mark.parametrize("name", ["cases.xlsx", "cases.parquet"])
def test_a_damaged_table_is_one_clear_line(tmp_path: Path, name: str) -> None:
    assert "save it again" in refusal(tmp_path, b"PK\3\4 broken", file=name)


def test_a_table_of_an_unknown_kind_is_an_error(tmp_path: Path) -> None:
    assert ".parquet" in refusal(tmp_path, "image\n", file="cases.ods")


def test_missing_table_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found none"):
        next(table.rows(settings(), directory=tmp_path, patient_is="column"))


def test_rows_are_streamed(tmp_path: Path) -> None:
    path = tmp_path / "cases.csv"
    path.write_text("image,label,patient_id\n" + "".join(f"{n}.png,x,P\n" for n in range(100_000)) + '"')
    stream = table.rows(settings(), directory=tmp_path, patient_is="column")
    assert sum(isinstance(next(stream), Case) for _ in range(100_000)) == 100_000
    with pytest.raises(DataError):  # the broken end is met last, so nothing had read ahead to it
        next(stream)


ROWS: list[list[Any]] = [
    ["image", "label", "patient_id", "age"],
    ["a.png", 1, 7, 61.5],
    ["b.png", 0, 8, None],
]


def write_csv(path: Path, delimiter: str) -> None:
    with path.open("w", newline="") as stream:
        csv.writer(stream, delimiter=delimiter).writerows(ROWS)


def write_excel(path: Path) -> None:
    from openpyxl import Workbook

    book = Workbook()
    book.active.append(["another", "sheet"])
    sheet = book.create_sheet("Fälle")
    for row in [*ROWS, [None] * 4]:
        sheet.append(row)
    book.save(path)


def write_parquet(path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    columns = {name: [row[place] for row in ROWS[1:]] for place, name in enumerate(ROWS[0])}
    parquet.write_table(pyarrow.table(columns | {"label": [1.0, 0.0]}), path)


@pytest.mark.parametrize("name", ["c.csv", "semicolons.csv", "c.tsv", "c.xlsx", "c.parquet"])
def test_every_kind_of_table_says_the_same(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    match path.suffix:
        case ".xlsx":
            write_excel(path)
        case ".parquet":
            write_parquet(path)
        case _:
            write_csv(path, {"c.csv": ",", "semicolons.csv": ";", "c.tsv": "\t"}[name])
    asked = settings(
        file=name,
        sheet="Fälle" if path.suffix == ".xlsx" else None,
        classes={1: "ill", 0: "well"},
        values={"years": "age"},
    )
    assert list(table.rows(asked, directory=tmp_path, patient_is="column")) == [
        case("a.png", "ill", patient="7", values=("61.5",)),
        case("b.png", "well", patient="8", values=("",)),
    ]


def test_columns_that_site_yaml_does_not_name_are_not_read(tmp_path: Path) -> None:
    write_csv(tmp_path / "c.csv", ",")
    (row, _) = spreadsheet.rows(tmp_path / "c.csv", columns=["image"])
    assert row.cells == {"image": "a.png"}


def test_sheet_that_is_not_there_and_sheet_of_no_workbook_are_errors(tmp_path: Path) -> None:
    write_excel(tmp_path / "c.xlsx")
    with pytest.raises(DataError, match="Expected a sheet 'cases'"):
        list(spreadsheet.rows(tmp_path / "c.xlsx", columns=["image"], sheet="cases"))
    write_csv(tmp_path / "c.csv", ",")
    with pytest.raises(DataError, match="sheet: null"):
        list(spreadsheet.rows(tmp_path / "c.csv", columns=["image"], sheet="cases"))


def test_values_mean_classes_and_others_are_unknown(tmp_path: Path) -> None:
    found = read(
        tmp_path, "image,label,patient_id\na.png,1,P\nb.png,pneumonia,P\n", classes={"1": "pneumonia"}
    )
    assert found == [
        case("a.png", "pneumonia", patient="P"),
        Refused(image="b.png", code="unknown_label"),
    ]


def test_several_labels_stand_in_one_cell(tmp_path: Path) -> None:
    text = "image,label,patient_id\na.png,Edema|Effusion,P\nb.png,No Finding,P\nc.png,,P\n"
    classes = {"Edema": "oedema", "Effusion": "effusion", "No Finding": None}
    found = read(tmp_path, text, separator="|", classes=classes)
    assert [one.labels for one in found if isinstance(one, Case)] == [("effusion", "oedema"), (), None]


def test_several_labels_stand_in_columns_of_their_own(tmp_path: Path) -> None:
    text = "image,Edema,Effusion,patient_id\na.png,1,yes,P\nb.png,0.0,False,P\nc.png,-1,0,P\n"
    text = text.replace("0.0", "0")
    found = read(tmp_path, text, label=None, label_columns={"Edema": "oedema", "Effusion": "effusion"})
    assert found == [
        case("a.png", "effusion", "oedema", patient="P"),
        case("b.png", patient="P"),
        Refused(image="c.png", code="unclear_label"),
    ]


def test_images_masks_and_paths_are_found_by_their_columns(tmp_path: Path) -> None:
    text = "t1,t2,seg,who\n001,002,m/001.nii,P\n003,,m/003.nii,P\n004,005,../m,P\n"
    found = read(
        tmp_path,
        text,
        images={"t1": "t1", "t2": "t2"},
        image_path="img/{}.nii.gz",
        label=None,
        mask="seg",
        patient="who",
    )
    assert found == [
        Case(images=("img/001.nii.gz", "img/002.nii.gz"), patient="P", mask="m/001.nii"),
        Refused(image="003", code="missing_image"),
        Refused(image="004", code="bad_path"),
    ]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"label": None}, "label, label_columns or mask"),
        ({"label_columns": {"a": "b"}}, "found both"),
        ({"classes": {"No": None}}, "separator"),
        ({"classes": {True: "x"}}, "quotes"),
        ({"image_path": "images/"}, "image_path"),
        ({"images": {}}, "images"),
        ({"label": None, "mask": "m", "separator": "|"}, "no effect"),
    ],
)
def test_settings_that_say_nothing_certain_are_refused(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        settings(**changes)
