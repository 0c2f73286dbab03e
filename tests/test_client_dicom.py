from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import zlib
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import MPEG2MPML, DeflatedExplicitVRLittleEndian, RLELossless

from client import decoder, images
from client import dicom as reader
from common.errors import UnusableCase
from tests.scans import RAMP, TEST_FILES, code, dicom, outcome, raster


def lut(entries: list[int], *, first: int, bits: int) -> list[Dataset]:
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [len(entries), first, bits], entries
    item["LUTDescriptor"].VR = item["LUTData"].VR = "US"
    return [item]


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
        ({"PixelData": RAMP.tobytes() + bytes(10)}, "excess_pixels"),
        ({"PixelData": RAMP.tobytes() + b"\1\0"}, "excess_pixels"),
        ({"Rows": 2}, "excess_pixels"),
        ({"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}, "excess_pixels"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]}, "mosaic"),
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


def test_deflated_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_PIXELS", 100)
    bomb = dicom(np.zeros((9, 9), np.uint16), ImageComments="x" * 5000, syntax=DeflatedExplicitVRLittleEndian)
    assert code(bomb) == "too_large"


def test_lack_of_memory_is_not_blamed_on_the_case(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(reader, "pixel_array", exhausted)
    with pytest.raises(MemoryError):
        images.decode(dicom(RAMP))


def test_every_test_file_of_pydicom_is_read_or_refused() -> None:
    codes = [outcome(path) for path in sorted(TEST_FILES.iterdir()) if path.is_file()]
    assert codes.count("read") >= 50
    assert codes.count("unreadable") <= 2
    assert outcome(TEST_FILES / "MR_truncated.dcm") == "truncated"


def test_one_image_in_several_transfer_syntaxes_reads_equal() -> None:
    plain = images.read(TEST_FILES / "MR_small.dcm").array
    for kind in ("RLE", "bigendian", "implicit", "jp2klossless", "jpeg_ls_lossless", "padded"):
        np.testing.assert_array_equal(images.read(TEST_FILES / f"MR_small_{kind}.dcm").array, plain)


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


@pytest.mark.parametrize("creator", ["SIEMENS MR HEADER", "OTHER VENDOR 01"])
def test_mosaic_is_told_by_the_private_tag_of_its_vendor(creator: str) -> None:
    dataset = pydicom.dcmread(io.BytesIO(dicom(RAMP)))
    dataset.add_new((0x0019, 0x0010), "LO", creator)
    dataset.add_new((0x0019, 0x100A), "US", 36)
    stream = io.BytesIO()
    dataset.save_as(stream)
    if creator.startswith("SIEMENS"):
        assert code(stream.getvalue()) == "mosaic"
    else:
        np.testing.assert_array_equal(images.decode(stream.getvalue()).array[0], RAMP)


def test_private_sequence_does_not_overrule_the_functional_groups() -> None:
    rescale, private, groups = Dataset(), Dataset(), Dataset()
    rescale.RescaleSlope, rescale.RescaleIntercept = 3, 1
    private.RescaleSlope, private.RescaleIntercept = 7, 9
    groups.PixelValueTransformationSequence = [rescale]
    groups.add_new((0x0019, 0x0010), "LO", "A VENDOR")
    groups.add_new((0x0019, 0x1001), "SQ", [private])
    content = dicom(RAMP, NumberOfFrames=1, PerFrameFunctionalGroupsSequence=[groups])
    np.testing.assert_array_equal(images.decode(content).array[0], RAMP * 3.0 + 1)


def test_deflated_file_ends_with_its_data_or_their_checksum() -> None:
    whole = dicom(RAMP, syntax=DeflatedExplicitVRLittleEndian)
    start = 144 + int.from_bytes(whole[140:144], "little")
    inflated = zlib.decompress(whole[start:], -zlib.MAX_WBITS)
    ends = zlib.crc32(inflated).to_bytes(4, "little"), len(inflated).to_bytes(4, "little")
    np.testing.assert_array_equal(images.decode(whole + b"".join(ends)).array[0], RAMP)
    assert code(whole + b"\1".join(ends)) == "unreadable"


def test_trailing_zeros_of_pixels_are_passed_over_up_to_a_row() -> None:
    row = RAMP.shape[1] * RAMP.itemsize
    np.testing.assert_array_equal(
        images.decode(dicom(RAMP, PixelData=RAMP.tobytes() + bytes(row))).array[0], RAMP
    )
    assert code(dicom(RAMP, PixelData=RAMP.tobytes() + bytes(row + 2))) == "excess_pixels"


@pytest.mark.parametrize(
    "tags",
    [
        {"PhotometricInterpretation": "PLANTED"},
        {"PixelSpacing": None, "SeriesInstanceUID": "1.2.666"},
        {"VOILUTFunction": "PLANTED", "WindowCenter": 1, "WindowWidth": 2},
        {"ImageType": ["PLANTED", "MOSAIC"]},
        {"SOPClassUID": "1.2.666"},
        {"ImageOrientationPatient": [666, 0, 0, 0, 1, 0]},
    ],
    ids=lambda tags: next(iter(tags)),
)
def test_reason_of_a_refusal_quotes_nothing_of_the_header(tags: dict[str, Any]) -> None:
    other = dicom(RAMP, SeriesInstanceUID="1.2.3")
    for contents in ((dicom(RAMP, **tags),), (dicom(RAMP, **tags), other)):
        try:
            images.decode(*contents)
        except UnusableCase as error:
            assert "PLANTED" not in str(error) and "666" not in str(error)
        else:
            assert len(contents) == 1


def test_jpeg_with_12_bits_is_read() -> None:
    """It is held against SimpleITK in the tests of the formats."""
    array = images.read(TEST_FILES / "JPGExtended.dcm").array
    assert array.shape == (1, 1024, 256) and array.max() == 264


ENDS = """
import sys, warnings
from client import decoder
warnings.simplefilter("error")
decoder.stored_pixels(sys.stdin.buffer.read())
"""


def test_interpreter_that_ends_has_ended_its_decoder() -> None:
    content = (TEST_FILES / "JPEG2000.dcm").read_bytes()
    told = subprocess.run(
        [sys.executable, "-X", "dev", "-c", ENDS], input=content, capture_output=True, check=True, timeout=120
    )
    assert b"ResourceWarning" not in told.stderr
