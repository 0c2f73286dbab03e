"""Pixel values held against decoders by others, SimpleITK and DCMTK, and files damaged in many ways."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openjpeg
import pydicom
import pytest
from pydicom.encaps import encapsulate
from pydicom.uid import (
    JPEG2000Lossless,
)

from client import images
from common.errors import UnusableCase
from tests.scans import TEST_FILES, VENDORS, dicom, outcome

RNG = np.random.default_rng(11)
ROWS, COLUMNS = np.mgrid[:40, :52]
SMOOTH = (2000 + 900 * np.sin(ROWS / 5) + 700 * np.cos(COLUMNS / 9) + RNG.normal(0, 40, ROWS.shape)).astype(
    "u2"
)
BYTES = (SMOOTH // 16).astype(np.uint8)
COLOURS = np.dstack([BYTES, BYTES[::-1], BYTES[:, ::-1]])
SINGLE = sorted(path for path in VENDORS.rglob("*.dcm") if "failing" not in path.parts)
FOLDERS = sorted({path.parent for path in SINGLE})


def vendor_name(path: Path) -> str:
    return str(path.relative_to(VENDORS))


@pytest.fixture(scope="module")
def sitk() -> Any:
    if not VENDORS.is_dir():
        pytest.skip("../shared/data/dicom_multivendor is not there")
    sitk = pytest.importorskip("SimpleITK", reason="SimpleITK is not installed")
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    return sitk


@pytest.fixture(scope="module")
def dcmtk(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Returns what runs a command of DCMTK on a file and returns the file that it writes."""
    if shutil.which("dcmdjpeg") is None:
        pytest.skip("DCMTK is not installed")
    directory = tmp_path_factory.mktemp("dcmtk")

    def run(command: str, source: Path) -> Path:
        target = directory / f"{len(list(directory.iterdir()))}.dcm"
        subprocess.run([*command.split(), source, target], check=True, capture_output=True)
        return target

    return run


def raw(path: Path) -> np.ndarray:
    """Returns the values of an uncompressed little-endian file as they lie in it; the header is trusted."""
    dataset = pydicom.dcmread(path)
    kind = f"<{'ui'[dataset.PixelRepresentation]}{dataset.BitsAllocated // 8}"
    shape = (dataset.Rows, dataset.Columns, dataset.SamplesPerPixel)
    if dataset.get("PlanarConfiguration") == 1:
        return np.frombuffer(dataset.PixelData, kind).reshape(shape[2], *shape[:2]).astype(np.float32)
    return np.moveaxis(np.frombuffer(dataset.PixelData, kind).reshape(shape), -1, 0).astype(np.float32)


@pytest.mark.parametrize("path", SINGLE, ids=vendor_name)
def test_file_of_a_vendor_reads_like_simpleitk_reads_it(path: Path, sitk: Any) -> None:
    image = images.read(path)
    read = sitk.ReadImage(str(path))
    if image.array.ndim == 4:
        read = sitk.DICOMOrient(read, "RAS")
        expected = sitk.GetArrayFromImage(read).transpose(2, 1, 0)
    else:
        expected = sitk.GetArrayFromImage(read)[0]
        assert image.spacing_mm == pytest.approx(read.GetSpacing()[1::-1])
    np.testing.assert_allclose(image.array[0], expected, rtol=1e-6)  # a slope in single precision


@pytest.mark.parametrize("folder", FOLDERS, ids=vendor_name)
def test_series_of_a_vendor_reads_like_simpleitk_reads_it(folder: Path, sitk: Any) -> None:
    if folder.parent.name == "dti":
        with pytest.raises(UnusableCase) as caught:
            images.read(folder)
        assert caught.value.code == "four_dimensional"
        return
    image = images.read(folder)
    names = [str(path) for path in sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))]
    read = sitk.DICOMOrient(sitk.ReadImage(names if len(names) > 1 else names[0]), "RAS")
    expected = sitk.GetArrayFromImage(read).transpose(2, 1, 0)
    np.testing.assert_allclose(image.array[0], expected, rtol=1e-6)
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(read.GetDirection(), (3, 3)) * read.GetSpacing()
    affine[:3, 3] = read.GetOrigin()
    assert image.affine is not None
    np.testing.assert_allclose(image.affine, np.diag([-1, -1, 1, 1]) @ affine, atol=1e-3)
    assert image.spacing_mm == pytest.approx(read.GetSpacing(), rel=1e-4)


@pytest.mark.parametrize(
    ("folder", "expected"), [("gantrytilting", "gantry_tilt"), ("sliceincrement", "uneven_spacing")]
)
def test_series_that_make_no_volume_are_refused(folder: str, expected: str) -> None:
    if not VENDORS.is_dir():
        pytest.skip("../shared/data/dicom_multivendor is not there")
    assert outcome(VENDORS / "failing" / folder / "001") == expected


DECODERS = {"rle": "dcmdrle", "jpegls": "dcmdjpls", "jpeg": "dcmdjpeg"}


@pytest.mark.parametrize("kind", DECODERS)
def test_compressed_files_of_a_vendor_read_like_dcmtk_reads_them(
    kind: str, dcmtk: Callable[..., Path]
) -> None:
    if not VENDORS.is_dir():
        pytest.skip("../shared/data/dicom_multivendor is not there")
    for path in (VENDORS / f"generic/compressed_{kind}").rglob("*.dcm"):
        np.testing.assert_array_equal(images.read(path).array, raw(dcmtk(DECODERS[kind], path)))


WAYS = {  # how DCMTK writes a transfer syntax, and how it reads it again
    "implicit": ("dcmconv +ti", "dcmconv +te"),
    "big-endian": ("dcmconv +tb", "dcmconv +te"),
    "deflated": ("dcmconv +td", "dcmconv +te"),
    "rle": ("dcmcrle", "dcmdrle"),
    "jpeg-lossless": ("dcmcjpeg +el", "dcmdjpeg"),
    "jpeg-lossless-sv1": ("dcmcjpeg +e1", "dcmdjpeg"),
    "jpeg-ls": ("dcmcjpls +el", "dcmdjpls"),
    "jpeg-ls-near": ("dcmcjpls +en +md 3", "dcmdjpls"),
}
ALL_WAYS = {
    **WAYS,
    "jpeg-extended": ("dcmcjpeg +ee +q 80", "dcmdjpeg"),
    "jpeg-baseline": ("dcmcjpeg +eb +q 80", "dcmdjpeg"),
}
DEEP = {"BitsStored": 12, "HighBit": 11}
SHALLOW = {"BitsStored": 8, "HighBit": 7}


@pytest.mark.parametrize("way", ALL_WAYS)
@pytest.mark.parametrize("stored", [SMOOTH, BYTES], ids=["12 bits", "8 bits"])
def test_transfer_syntax_reads_like_dcmtk_reads_it(
    way: str, stored: np.ndarray, dcmtk: Callable[..., Path], tmp_path: Path
) -> None:
    if way == "jpeg-baseline" and stored is SMOOTH:
        stored = BYTES[::-1].copy()  # it has 8 bits only
    (tmp_path / "plain.dcm").write_bytes(dicom(stored, **(DEEP if stored.itemsize == 2 else SHALLOW)))
    forth, back = ALL_WAYS[way]
    written = dcmtk(forth, tmp_path / "plain.dcm")
    before = pydicom.dcmread(tmp_path / "plain.dcm").file_meta.TransferSyntaxUID
    assert pydicom.dcmread(written).file_meta.TransferSyntaxUID != before
    read = images.read(written).array
    np.testing.assert_array_equal(read, raw(dcmtk(back, written)))
    if way in WAYS and way != "jpeg-ls-near":
        np.testing.assert_array_equal(read[0], stored)


@pytest.mark.parametrize("way", ["rle", "jpeg-lossless-sv1", "jpeg-ls", "jpeg-baseline"])
def test_compressed_colour_reads_like_dcmtk_reads_it(
    way: str, dcmtk: Callable[..., Path], tmp_path: Path
) -> None:
    colour = {"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3, "PlanarConfiguration": 0}
    (tmp_path / "plain.dcm").write_bytes(dicom(BYTES, **SHALLOW, **colour, PixelData=COLOURS.tobytes()))
    forth, back = ALL_WAYS[way]
    written = dcmtk(forth, tmp_path / "plain.dcm")
    read = images.read(written).array
    expected = raw(dcmtk(back, written))
    # The standard leaves the rounding of YBR to RGB open.
    np.testing.assert_allclose(read, expected, atol=2 if way == "jpeg-baseline" else 0)
    assert read.shape == (3, *BYTES.shape)


@pytest.mark.parametrize("ratio", [None, [8.0]], ids=["lossless", "lossy"])
def test_jpeg_2000_reads_like_simpleitk_reads_it(
    ratio: list[float] | None, sitk: Any, tmp_path: Path
) -> None:
    more = {} if ratio is None else {"compression_ratios": ratio}
    coded = openjpeg.encode(SMOOTH, bits_stored=12, **more)
    bytes_ = dicom(SMOOTH, syntax=JPEG2000Lossless, PixelData=encapsulate([coded]), **DEEP)
    (tmp_path / "a.dcm").write_bytes(bytes_)
    read = images.read(tmp_path / "a.dcm").array[0]
    np.testing.assert_array_equal(read, sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "a.dcm")))[0])
    assert np.array_equal(read, SMOOTH) == (ratio is None)


WINDOWED = ("MR_small", "MR_small_RLE", "MR_small_bigendian", "MR_small_implicit", "MR_small_jp2klossless")
WINDOWED += ("693_J2KI",)
PLAIN = ("CT_small", "image_dfl", "JPEG2000", "JPGExtended", "JPEGLSNearLossless_08", "JPEGLSNearLossless_16")
PLAIN += ("examples_rgb_color", "SC_rgb_dcmtk_+eb+cr", "SC_ybr_full_422_uncompressed")


def by_simpleitk(path: Path, sitk: Any) -> np.ndarray:
    values: np.ndarray = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))[0].astype(np.float64)
    return np.moveaxis(values, -1, 0) if values.ndim == 3 else values[None]


@pytest.mark.parametrize("name", PLAIN)
def test_file_of_pydicom_reads_like_simpleitk_reads_it(name: str, sitk: Any) -> None:
    path = TEST_FILES / f"{name}.dcm"
    assert not {"VOILUTSequence", "WindowCenter"} & set(dir(pydicom.dcmread(path)))
    np.testing.assert_array_equal(images.read(path).array, by_simpleitk(path, sitk))


@pytest.mark.parametrize("name", WINDOWED)
def test_file_with_a_window_reads_like_simpleitk_reads_it_through_that_window(name: str, sitk: Any) -> None:
    """SimpleITK leaves windows to viewers; theirs is that of PS3.3, C.11.2.1.2.1."""
    path = TEST_FILES / f"{name}.dcm"
    header = pydicom.dcmread(path)
    assert header.get("VOILUTFunction") is None and "VOILUTSequence" not in header
    centre, width = float(header.WindowCenter) - 0.5, float(header.WindowWidth) - 1
    values = by_simpleitk(path, sitk)
    ends = 2.0 ** (header.BitsStored - 1) * np.array([-1, 1]) + [0, -1]  # both are signed
    low, high = ends * float(header.get("RescaleSlope", 1)) + float(header.get("RescaleIntercept", 0))
    expected = ((values - centre) / width + 0.5) * (high - low) + low
    expected = np.where(
        values <= centre - width / 2, low, np.where(values > centre + width / 2, high, expected)
    )
    np.testing.assert_allclose(images.read(path).array, expected, atol=1e-6 * (high - low))


@pytest.mark.parametrize("name", ["MR_small", "MR_small_bigendian", "MR_small_implicit", "MR_small_RLE"])
def test_file_with_a_window_reads_like_dcmtk_shows_it(name: str, dcmtk: Callable[..., Path]) -> None:
    shown = netpbm(dcmtk("dcm2pnm +Wi 1 +opn 16", TEST_FILES / f"{name}.dcm"))  # cut to whole numbers
    read = images.read(TEST_FILES / f"{name}.dcm").array + 2**15
    np.testing.assert_allclose(read, shown, atol=1)
    assert len(np.unique(shown)) > 300


def test_palette_reads_like_dcmtk_shows_it(dcmtk: Callable[..., Path]) -> None:
    path = TEST_FILES / "examples_palette.dcm"
    np.testing.assert_array_equal(images.read(path).array, netpbm(dcmtk("dcm2pnm +opn 16", path)))


def netpbm(path: Path) -> np.ndarray:
    """Returns the channels of a picture in Netpbm's ASCII form."""
    magic, columns, rows, _, *values = path.read_bytes().split()
    shape = (int(rows), int(columns), 3 if magic == b"P3" else 1)
    return np.moveaxis(np.array(values, dtype=np.float32).reshape(shape), -1, 0)


def test_colour_of_16_bits_reads_like_dcmtk_reads_it(dcmtk: Callable[..., Path]) -> None:
    path = TEST_FILES / "SC_rgb_rle_16bit.dcm"  # which SimpleITK takes for 8 bits
    np.testing.assert_array_equal(images.read(path).array, raw(dcmtk("dcmdrle", path)))
