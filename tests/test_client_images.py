from __future__ import annotations

import gzip
import logging
import os
import re
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest
from pydicom.uid import DeflatedExplicitVRLittleEndian, RLELossless

from client import images
from client.quarantine import REMEDIES
from common.errors import UnusableCase
from tests.scans import RAMP, TEST_FILES, code, dicom, nifti, raster


def test_dicom_nifti_and_png_of_one_image_read_equal() -> None:
    expected = RAMP.astype(np.float32)[None]
    read = [
        images.decode(dicom(RAMP)),
        images.decode(dicom(RAMP, syntax=RLELossless)),
        images.decode(dicom(RAMP, syntax=DeflatedExplicitVRLittleEndian)),
        images.decode(nifti(RAMP.T)),
        images.decode(gzip.compress(nifti(RAMP.T[:, :, None]))),
        images.decode(raster(RAMP)),
    ]
    for image in read:
        assert image.array.dtype == np.float32
        np.testing.assert_array_equal(image.array, expected)


def test_content_decides_and_not_the_name(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(dicom(RAMP))
    np.testing.assert_array_equal(images.read(path).array[0], RAMP)


def test_declared_size_is_bounded_before_anything_is_decoded() -> None:
    assert code(dicom(RAMP, Rows=60000, Columns=60000)) == "too_large"
    header = raster(np.eye(2, dtype=np.uint8))
    ihdr = b"IHDR" + (60000).to_bytes(4, "big") * 2 + header[24:29]
    assert code(header[:12] + ihdr + zlib.crc32(ihdr).to_bytes(4, "big") + header[33:]) == "too_large"
    volume = nibabel.Nifti1Image(np.zeros((2, 2, 1), np.uint8), np.eye(4))
    volume.header["dim"][1:3] = 30000
    assert code(gzip.compress(volume.header.binaryblock + bytes(8))) == "too_large"
    far = bytearray(nifti(RAMP))
    far[108:112] = np.array(2e9, "<f4").tobytes()
    assert code(gzip.compress(bytes(far))) == "unreadable"


def test_nothing_of_the_header_is_kept_warned_or_logged(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    assert b"Planted^Name" in dicom(RAMP)
    image = images.decode(dicom(RAMP))
    assert "Planted" not in repr(vars(image))
    with caplog.at_level(logging.DEBUG):
        for name in ("badVR.dcm", "MR_small_padded.dcm", "MR_truncated.dcm", "rtplan_truncated.dcm"):
            try:
                images.read(TEST_FILES / name)
            except UnusableCase:
                continue
    out, err = capfd.readouterr()
    assert (out, err, caplog.records, list(recwarn)) == ("", "", [], [])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (nifti(np.ones((3, 4, 1, 6), np.int16)), "four_dimensional"),
        (nifti(np.array([[1, np.nan], [2, 3]], np.float32)), "non_finite"),
        (nifti(np.ones((3, 4), np.complex64)), "unsupported_pixel_type"),
        (nifti(RAMP)[:-5], "truncated"),
        (gzip.compress(nifti(RAMP), mtime=0)[:-20], "truncated"),
        (gzip.compress(b"something else", mtime=0), "unknown_format"),
        (raster(np.zeros((4, 4), np.uint8)), "constant"),
        (raster(RAMP)[:-30], "truncated"),
        (raster(np.eye(9, dtype=np.uint8), kind="JPEG")[:-40], "truncated"),
        (raster(np.arange(16, dtype=np.uint8).reshape(2, 2, 4)), "transparent"),
        (raster(np.eye(4, dtype=np.uint8), transparency=0), "transparent"),
        (b"image,label\n", "unknown_format"),
        (b"", "empty_file"),
    ],
)
def test_other_content_is_refused_with_its_code(content: bytes, expected: str) -> None:
    assert code(content) == expected


def test_missing_file_directory_and_pipe_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, expected in (("none.dcm", "missing_file"), (".", "missing_file"), ("pipe", "missing_file")):
        with pytest.raises(UnusableCase) as caught:
            images.read(tmp_path / name)
        assert caught.value.code == expected


def test_every_code_in_the_source_has_a_remedy() -> None:
    sources = [path.read_text() for path in Path(images.__file__).parent.glob("*.py")]
    codes = {code for text in sources for code in re.findall(r'UnusableCase\(\s*"(\w+)"', text)}
    codes |= {code for text in sources for code in re.findall(r'Refused\([^)]*code="(\w+)"', text)}
    assert len(codes) > 25
    assert codes <= set(REMEDIES)


def test_every_code_of_a_reader_is_documented() -> None:
    root = Path(images.__file__).parent
    readers = ("images", "image", "dicom", "series", "volume", "grey", "decoder", "raster", "nifti")
    sources = [(root / f"{name}.py").read_text() for name in (*readers, "files")]
    codes = {
        code for text in sources for code in re.findall(r'(?:UnusableCase\(\s*|^    \()"(\w+)"', text, re.M)
    }
    codes |= {"missing_file", "not_readable", "excess_pixels", "truncated"}
    text = (root.parent / "docs" / "formats.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`.*?) \|", text.partition("<!-- table: image codes -->")[2], re.M)
    documented = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert documented <= set(REMEDIES)
    assert codes <= documented | {"changed_since_frozen"}
    assert documented <= codes
