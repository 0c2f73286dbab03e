from __future__ import annotations

import gzip
import io
import logging
import os
import re
import signal
import threading
import zlib
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image as Pillow
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import MPEG2MPML, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, RLELossless

from client import decoder, images
from client.quarantine import REMEDIES
from common.errors import UnusableCase

VENDORS = Path(__file__).resolve().parents[2] / "shared" / "data" / "dicom_multivendor"
TEST_FILES = Path(pydicom.__file__).parent / "data" / "test_files"
RAMP = np.arange(12, dtype=np.uint16).reshape(3, 4) * 300  # 12 bits, not square, no symmetry


def dicom(stored: np.ndarray, *, syntax: str = ExplicitVRLittleEndian, **tags: Any) -> bytes:
    """Returns a DICOM file with these stored values, 12 of 16 bits, MONOCHROME2 unless said otherwise."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", "1.2.3"
    dataset.PatientName = "Planted^Name"
    bits = stored.dtype.itemsize * 8
    described = {
        "Rows": stored.shape[0],
        "Columns": stored.shape[1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": bits,
        "BitsStored": min(bits, 12),
        "HighBit": min(bits, 12) - 1,
        "PixelRepresentation": int(stored.dtype.kind == "i"),
        "PixelData": stored.tobytes(),
    }
    for keyword, value in {**described, **tags}.items():
        if value is not None:
            setattr(dataset, keyword, value)
    dataset["PixelData"].VR = "OW" if bits > 8 else "OB"
    dataset["PixelData"].is_undefined_length = syntax == MPEG2MPML
    if syntax == RLELossless:
        dataset.compress(RLELossless, generate_instance_uid=False)
    else:
        dataset.file_meta.TransferSyntaxUID = syntax
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def nifti(array: np.ndarray, *, affine: np.ndarray | None = None) -> bytes:
    content: bytes = nibabel.Nifti1Image(
        array, np.diag([-1.0, -1, 1, 1]) if affine is None else affine
    ).to_bytes()
    return content


def raster(array: np.ndarray, *, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    Pillow.fromarray(array).save(stream, format=kind, **options)
    return stream.getvalue()


def code(content: bytes) -> str:
    with pytest.raises(UnusableCase) as caught:
        images.decode(content)
    return caught.value.code


def lut(entries: list[int], *, first: int, bits: int) -> list[Dataset]:
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [len(entries), first, bits], entries
    item["LUTDescriptor"].VR = item["LUTData"].VR = "US"
    return [item]


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


def test_rescale_and_spacing_are_applied() -> None:
    image = images.decode(dicom(RAMP, RescaleSlope=2, RescaleIntercept=-1024, PixelSpacing=[0.5, 0.7]))
    np.testing.assert_array_equal(image.array[0], RAMP * 2.0 - 1024)
    assert image.spacing_mm == (0.5, 0.7)


def test_signed_pixels_with_dirty_upper_bits_are_masked() -> None:
    values = np.array([[-2048, -1, 0], [1, 5, 2047]], dtype=np.int16)
    overlay = np.array([[1, 0, 15], [7, 0, 9]], dtype=np.uint16) << 12
    dirty = (values.view(np.uint16) & 0x0FFF | overlay).view(np.int16)
    np.testing.assert_array_equal(images.decode(dicom(dirty)).array[0], values)


@pytest.mark.parametrize("bits", [8, 16])
def test_monochrome1_is_inverted_within_the_stored_range(bits: int) -> None:
    stored = np.array([[0, 1], [7, 255]], dtype=f"uint{bits}")
    content = dicom(stored, PhotometricInterpretation="MONOCHROME1", BitsStored=8, HighBit=7)
    np.testing.assert_array_equal(images.decode(content).array[0], 255 - stored.astype(np.float32))


def test_window_of_monochrome1_follows_the_standard_and_then_inverts() -> None:
    tags: dict[str, Any] = {
        "WindowCenter": [2000, 1],
        "WindowWidth": [1001, 1],
        "PhotometricInterpretation": "MONOCHROME1",
    }
    image = images.decode(dicom(RAMP, **tags))
    windowed = np.clip((RAMP - 1999.5) / 1000 + 0.5, 0, 1) * 4095
    np.testing.assert_allclose(image.array[0], 4095 - windowed, atol=2e-3)


@pytest.mark.parametrize(
    "tags",
    [
        {"WindowCenter": 1500, "WindowWidth": 900},
        {"WindowCenter": 1500, "WindowWidth": 1},
        {"WindowCenter": [1500, 10], "WindowWidth": [900, 20]},
        {"WindowCenter": 1500.5, "WindowWidth": 900.25, "VOILUTFunction": "LINEAR_EXACT"},
        {"WindowCenter": 1500, "WindowWidth": 900, "VOILUTFunction": "SIGMOID"},
        {"WindowCenter": 40, "WindowWidth": 400, "RescaleSlope": 1, "RescaleIntercept": -1024},
        {"VOILUTSequence": lut([9, 5, 7, 200], first=600, bits=8)},
        {"VOILUTSequence": lut([9, 500, 7, 200], first=1199, bits=12), "WindowCenter": 3, "WindowWidth": 5},
        {"ModalityLUTSequence": lut([10, 4000, 7], first=299, bits=16)},
    ],
    ids=["linear", "step", "first", "exact", "sigmoid", "rescaled", "lut", "lut-before-window", "modality"],
)
def test_display_pipeline_equals_that_of_pydicom(tags: dict[str, Any]) -> None:
    content = dicom(RAMP, **tags)
    dataset = pydicom.dcmread(io.BytesIO(content))
    expected = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset)
    assert expected.min() < expected.max()
    np.testing.assert_allclose(images.decode(content).array[0], expected, rtol=1e-6, atol=2e-3)


def test_window_of_a_falling_rescale_keeps_bright_bright() -> None:
    # The stored range is mapped backwards by the slope; the window still runs from dark to bright.
    tags: dict[str, Any] = {
        "RescaleSlope": -1,
        "RescaleIntercept": 4095,
        "WindowCenter": 2048,
        "WindowWidth": 4096,
    }
    array = images.decode(dicom(RAMP, **tags)).array[0]
    assert array[0, 0] == array.max() == 4095
    assert np.all(np.diff(array.ravel()) < 0)


def test_padding_takes_the_darkest_value_in_both_polarities() -> None:
    stored = RAMP.copy()
    stored[0, 0] = 4095
    for photometric in ("MONOCHROME1", "MONOCHROME2"):
        tags: dict[str, Any] = {"PhotometricInterpretation": photometric, "PixelPaddingValue": 4095}
        array = images.decode(dicom(stored, **tags)).array[0]
        assert array[0, 0] == array.ravel()[1:].min()


def test_functional_groups_of_an_only_frame_are_applied() -> None:
    rescale, groups = Dataset(), Dataset()
    rescale.RescaleSlope, rescale.RescaleIntercept = 3, 1
    groups.PixelValueTransformationSequence = [rescale]
    content = dicom(RAMP, NumberOfFrames=1, SharedFunctionalGroupsSequence=[groups])
    np.testing.assert_array_equal(images.decode(content).array[0], RAMP * 3.0 + 1)


@pytest.mark.parametrize("planar", [0, 1])
def test_rgb_dicom_reads_like_the_png(planar: int) -> None:
    colours = np.arange(36, dtype=np.uint8).reshape(3, 4, 3) * 7
    stored = np.moveaxis(colours, -1, 0) if planar else colours
    content = dicom(
        np.zeros((3, 4), np.uint8),
        PhotometricInterpretation="RGB",
        SamplesPerPixel=3,
        PlanarConfiguration=planar,
        BitsStored=8,
        HighBit=7,
        PixelData=stored.tobytes(),
    )
    np.testing.assert_array_equal(images.decode(content).array, np.moveaxis(colours, -1, 0))
    np.testing.assert_array_equal(images.decode(raster(colours)).array, np.moveaxis(colours, -1, 0))


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({"NumberOfFrames": 2, "PixelData": RAMP.tobytes() * 2}, "multi_frame"),
        ({"PixelData": RAMP.tobytes()[:-2]}, "truncated"),
        ({"PresentationLUTShape": "INVERSE"}, "unclear_polarity"),
        ({"PhotometricInterpretation": "HSV"}, "unsupported_photometric"),
        ({"PhotometricInterpretation": "RGB"}, "incomplete_header"),
        ({"Rows": None}, "incomplete_header"),
        ({"HighBit": 15}, "unsupported_pixel_type"),
        ({"WindowCenter": 10, "WindowWidth": 0}, "bad_window"),
        ({"WindowCenter": 10, "WindowWidth": 9, "VOILUTFunction": "CUBIC"}, "bad_window"),
        ({"RescaleSlope": 2}, "bad_rescale"),
        ({"PixelSpacing": [0, 1]}, "bad_spacing"),
        ({"WindowCenter": -9000, "WindowWidth": 10}, "constant"),
        ({"syntax": MPEG2MPML, "PixelData": encapsulate([bytes(8)])}, "unsupported_transfer_syntax"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_dicom_that_is_not_read_with_certainty_is_refused(tags: dict[str, Any], expected: str) -> None:
    assert code(dicom(RAMP, **tags)) == expected


def test_empty_shell_is_refused_and_a_cut_file_is_told_apart() -> None:
    whole = dicom(RAMP)
    shell = pydicom.dcmread(io.BytesIO(whole))
    del shell.PixelData
    stream = io.BytesIO()
    shell.save_as(stream)
    assert code(stream.getvalue()) == "no_pixel_data"
    compressed = dicom(RAMP, syntax=RLELossless)
    assert code(compressed[:-9]) == "truncated"
    assert code(whole[:-9]) == "truncated"
    assert code(whole[:150]) in ("truncated", "no_pixel_data", "unreadable")


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


def test_deflated_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    bomb = dicom(np.zeros((9, 9), np.uint16), ImageComments="x" * 5000, syntax=DeflatedExplicitVRLittleEndian)
    assert code(bomb) == "too_large"


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


def test_coronal_nifti_reads_like_the_radiograph_that_it_shows() -> None:
    # axes right, anterior, superior: one slice from the front, as most tools store it
    seen = RAMP.astype(np.int16)  # rows downwards, columns to the patient's left
    stored = seen.T[::-1, None, ::-1]
    image = images.decode(nifti(stored, affine=np.diag([0.5, 2.0, 0.7, 1.0])))
    np.testing.assert_array_equal(image.array[0], seen)
    assert image.spacing_mm == pytest.approx((0.7, 0.5))


def test_nifti_without_orientation_is_taken_as_stored() -> None:
    picture = nibabel.Nifti1Image(RAMP.T, None)
    assert picture.header["sform_code"] == picture.header["qform_code"] == 0
    np.testing.assert_array_equal(images.decode(picture.to_bytes()).array[0], RAMP)


def test_nifti_2_and_big_endian_read_like_nifti_1() -> None:
    affine = np.diag([-1.0, -1, 1, 1])
    second = nibabel.Nifti2Image(RAMP.T, affine).to_bytes()
    header = nibabel.Nifti1Image(RAMP.T, affine).header.as_byteswapped(">")
    swapped = nibabel.Nifti1Image(RAMP.T, affine, header).to_bytes()
    assert swapped[:4] == (348).to_bytes(4, "big")
    for content in (second, swapped):
        np.testing.assert_array_equal(images.decode(content).array[0], RAMP)


def test_sagittal_nifti_has_rows_to_inferior_and_columns_to_posterior() -> None:
    seen = RAMP.astype(np.int16)
    stored = seen.T[None, ::-1, ::-1]  # axes right, anterior, superior
    image = images.decode(nifti(stored, affine=np.diag([3.0, 0.5, 0.7, 1.0])))
    np.testing.assert_array_equal(image.array[0], seen)
    assert image.spacing_mm == pytest.approx((0.7, 0.5))


def test_nifti_scaling_is_applied() -> None:
    picture = nibabel.Nifti1Image(RAMP.T, np.diag([-1.0, -1, 1, 1]))
    picture.header.set_slope_inter(0.5, 3)
    content = bytearray(picture.to_bytes())
    content[112:120] = np.array([0.5, 3], "<f4").tobytes()  # the writer resets what it did not choose
    np.testing.assert_array_equal(images.decode(bytes(content)).array[0], RAMP * 0.5 + 3)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (nifti(np.ones((3, 4, 5), np.int16)), "three_dimensional"),
        (nifti(np.ones((3, 4, 1, 6), np.int16)), "four_dimensional"),
        (nifti(np.array([[1, np.nan], [2, 3]], np.float32)), "non_finite"),
        (nifti(np.ones((3, 4), np.complex64)), "unsupported_pixel_type"),
        (nifti(RAMP)[:-5], "truncated"),
        (gzip.compress(nifti(RAMP))[:-20], "truncated"),
        (gzip.compress(b"something else"), "unknown_format"),
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


def test_opaque_alpha_palette_and_one_bit_pictures_are_read() -> None:
    grey = np.array([[0, 255], [255, 0]], np.uint8)
    alpha = np.dstack([grey, grey, grey, np.full_like(grey, 255)])
    np.testing.assert_array_equal(images.decode(raster(alpha)).array, [grey] * 3)
    for mode, expected in (("1", [grey]), ("P", [grey] * 3), ("LA", [grey])):
        stream = io.BytesIO()
        Pillow.fromarray(grey).convert(mode).save(stream, format="PNG")
        np.testing.assert_array_equal(images.decode(stream.getvalue()).array, expected)


def test_animated_png_is_refused() -> None:
    stream = io.BytesIO()
    frames = [Pillow.fromarray(np.eye(4, dtype=np.uint8) * value) for value in (100, 200)]
    frames[0].save(stream, format="PNG", save_all=True, append_images=frames[1:])
    assert code(stream.getvalue()) == "multi_frame"


def test_exif_orientation_is_applied() -> None:
    exif = Pillow.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    np.testing.assert_array_equal(images.decode(raster(grey, exif=exif)).array[0], np.rot90(grey, -1))


def test_missing_file_directory_and_pipe_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("none.dcm", ".", "pipe"):
        with pytest.raises(UnusableCase) as caught:
            images.read(tmp_path / name)
        assert caught.value.code == "missing_file"


def test_lack_of_memory_is_not_blamed_on_the_case(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(images, "pixel_array", exhausted)
    with pytest.raises(MemoryError):
        images.decode(dicom(RAMP))


def test_every_test_file_of_pydicom_is_read_or_refused() -> None:
    codes = [outcome(path) for path in sorted(TEST_FILES.iterdir()) if path.is_file()]
    assert codes.count("read") >= 50
    assert codes.count("unreadable") <= 2
    assert outcome(TEST_FILES / "MR_truncated.dcm") == "truncated"
    assert outcome(TEST_FILES / "JPGExtended.dcm") == "unsupported_transfer_syntax"


def test_one_image_in_several_transfer_syntaxes_reads_equal() -> None:
    plain = images.read(TEST_FILES / "MR_small.dcm").array
    for kind in ("RLE", "bigendian", "implicit", "jp2klossless", "jpeg_ls_lossless", "padded"):
        np.testing.assert_array_equal(images.read(TEST_FILES / f"MR_small_{kind}.dcm").array, plain)


def test_files_of_five_vendors_are_read_or_refused() -> None:
    if not VENDORS.is_dir():
        pytest.skip("../shared/data/dicom_multivendor is not there")
    codes = {path: outcome(path) for path in sorted(VENDORS.rglob("*.dcm"))}
    assert {code for code in codes.values()} == {"read", "multi_frame"}
    for name in ("0001", "0003"):
        path = f"001/IM-0001-{name}-0001.dcm"
        lossless = [
            VENDORS / f"generic/compressed_{kind}" / path for kind in ("rle", "jpegls", "j2k", "jpeg")
        ]
        first, *others = [images.read(one).array for one in lossless]
        for other in others:
            np.testing.assert_array_equal(other, first)


def test_damaged_files_are_read_or_refused_and_nothing_else() -> None:
    rng = np.random.default_rng(7)
    whole = [dicom(RAMP, syntax=RLELossless), dicom(RAMP), nifti(RAMP), raster(RAMP)]
    for content in whole * 40:
        damaged = bytearray(content)
        for position in rng.integers(0, len(damaged), 4):
            damaged[position] = rng.integers(256)
        cut = int(rng.integers(len(damaged) // 2, len(damaged) + 1))
        try:
            assert np.isfinite(images.decode(bytes(damaged[:cut])).array).all()
        except UnusableCase as error:
            assert error.code in REMEDIES


def test_every_code_in_the_source_has_a_remedy() -> None:
    sources = [path.read_text() for path in Path(images.__file__).parent.glob("*.py")]
    codes = {code for text in sources for code in re.findall(r'UnusableCase\(\s*"(\w+)"', text)}
    codes |= {code for text in sources for code in re.findall(r'Refused\([^)]*code="(\w+)"', text)}
    assert len(codes) > 25
    assert codes <= set(REMEDIES)


def outcome(path: Path) -> str:
    try:
        images.read(path)
    except UnusableCase as error:
        return error.code
    return "read"


def test_crash_of_the_decoder_costs_one_case_and_not_the_process() -> None:
    compressed = dicom(RAMP, syntax=RLELossless)
    images.decode(compressed)
    (child,) = decoder._children
    os.kill(child.process.pid, signal.SIGSTOP)  # so that it dies with the file in its hands
    threading.Timer(0.2, lambda: os.kill(child.process.pid, signal.SIGABRT)).start()
    threading.Timer(0.3, lambda: os.kill(child.process.pid, signal.SIGCONT)).start()
    assert code(compressed) == "unreadable"
    np.testing.assert_array_equal(images.decode(compressed).array[0], RAMP)
    assert child.process.returncode == -signal.SIGABRT


def test_decoder_that_is_killed_for_memory_is_not_blamed_on_the_case() -> None:
    compressed = dicom(RAMP, syntax=RLELossless)
    images.decode(compressed)
    (child,) = decoder._children
    os.kill(child.process.pid, signal.SIGSTOP)
    threading.Timer(0.2, lambda: os.kill(child.process.pid, signal.SIGKILL)).start()
    with pytest.raises(MemoryError):
        images.decode(compressed)


def test_decoder_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    compressed = dicom(RAMP, syntax=RLELossless)
    images.decode(compressed)
    (child,) = decoder._children
    os.kill(child.process.pid, signal.SIGSTOP)
    monkeypatch.setattr(decoder, "TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(decoder, "PATIENCE_SECONDS", 0.1)
    assert code(compressed) == "too_slow"
    assert child.process.returncode is not None
    monkeypatch.undo()
    np.testing.assert_array_equal(images.decode(compressed).array[0], RAMP)
