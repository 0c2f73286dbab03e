from __future__ import annotations

from pathlib import Path

import pytest

from client.table import Case, PatientIs, Refused, rows
from common.errors import DataError


def read(tmp_path: Path, text: str | bytes, *, patient_is: PatientIs = "column") -> list[Case | Refused]:
    path = tmp_path / "cases.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return list(rows(path, patient_is=patient_is))


def refusal(tmp_path: Path, text: str | bytes, *, patient_is: PatientIs = "column") -> str:
    with pytest.raises(DataError) as caught:
        read(tmp_path, text, patient_is=patient_is)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_rows_become_cases_whatever_the_order_of_columns(tmp_path: Path, mark: bytes) -> None:
    text = (
        mark
        + 'note,patient_id,image,label\r\n"a, b",P1 ,./x/ä.dcm,normal\r\n\r\n,P2,y.png,opacity\r\n'.encode()
    )
    assert read(tmp_path, text) == [
        Case(image="x/ä.dcm", label="normal", patient="P1"),
        Case(image="y.png", label="opacity", patient="P2"),
    ]


def test_every_image_is_its_own_patient_only_when_that_is_said(tmp_path: Path) -> None:
    text = "image,label\na.png,x\n./b.png,y\n"
    assert [case.patient for case in read(tmp_path, text, patient_is="case") if isinstance(case, Case)] == [
        "a.png",
        "b.png",
    ]
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
        ("a.png, ,P", "missing_label"),
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


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "an empty file"),
        ("image;label;patient_id\n", "commas"),
        ("image,label,patient_id,label\n", "more than once"),
        ("image,diagnosis,patient_id\n", "column label"),
        (b"image,label,patient_id\n\xe4.png,x,P\n", "UTF-8"),
        ('image,label,patient_id\n"a.png,x,P\n', "line 2"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_clear_line(tmp_path: Path, text: str | bytes, word: str) -> None:
    assert word in refusal(tmp_path, text)


def test_missing_table_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found none"):
        next(rows(tmp_path / "cases.csv", patient_is="column"))


def test_rows_are_streamed(tmp_path: Path) -> None:
    path = tmp_path / "cases.csv"
    path.write_text("image,label,patient_id\n" + "".join(f"{n}.png,x,P\n" for n in range(100_000)) + '"')
    stream = rows(path, patient_is="column")
    assert sum(isinstance(next(stream), Case) for _ in range(100_000)) == 100_000
    with pytest.raises(DataError):  # the broken end is met last, so nothing had read ahead to it
        next(stream)
