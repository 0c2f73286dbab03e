"""Answers of several parts are read however they arrive, and a DICOM file says which one it is."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from pydicom import dcmread

from client import multipart, part10
from client.multipart import Malformed, Parts
from tests.dicomweb import FILES


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 10_000])
@pytest.mark.parametrize("boundary", [b"x", b"a b", b"-" * 70])
def test_parts_are_the_same_however_they_arrive(size: int, boundary: bytes) -> None:
    like = b"\r\n--" + boundary  # what only begins as a boundary does is content
    bodies = [b"\r\n--", b"", like[2:-1], b"\r\n" * 50, like + b"y", bytes(range(256)) * 3]
    text = b"preamble"
    for body in bodies:
        text += b"\r\n--" + boundary + b"  \r\nContent-Type: application/dicom\r\nX:y\r\n\r\n" + body
    text += b"\r\n--" + boundary + b"--\r\nepilogue"
    reader = Parts(iter([text[at : at + size] for at in range(0, len(text), size)]), boundary=boundary)
    found = []
    while (headers := reader.next_part()) is not None:
        assert headers == {"content-type": "application/dicom", "x": "y"}
        found.append(b"".join(reader.body()))
    assert found == bodies


def test_answer_that_ends_early_is_malformed_wherever_it_ends() -> None:
    text = b"--xyz\r\nA: b\r\n\r\ncontent\r\n--xyz--"
    for end in range(len(text)):
        reader = Parts(iter([text[:end]]), boundary=b"xyz")
        with pytest.raises(Malformed):
            while reader.next_part() is not None:
                pass


def test_headers_without_end_are_malformed() -> None:
    def endless() -> Iterator[bytes]:
        yield b"--xyz\r\n"
        while True:
            yield b"A: b\r\n"

    with pytest.raises(Malformed, match="at most"):
        Parts(endless(), boundary=b"xyz").next_part()


@pytest.mark.parametrize(
    "value", ["multipart/related", 'multipart/x; boundary=""', "multipart/x; boundary=ä"]
)
def test_parts_without_boundary_are_malformed(value: str) -> None:
    with pytest.raises(Malformed):
        multipart.boundary_of(value)


@pytest.mark.parametrize("content", FILES.values())
def test_instance_of_a_file_is_what_pydicom_reads(content: bytes) -> None:
    assert part10.instance_of(content) == dcmread(io.BytesIO(content)).SOPInstanceUID
    whole = part10.instance_of(content)
    assert all(whole.startswith(part10.instance_of(content[:end])) for end in range(len(content)))
