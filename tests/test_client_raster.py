from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from PIL import Image as Pillow

from client import images
from tests.scans import RAMP, code, raster


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


DEEP = np.arange(48, dtype=np.uint16).reshape(3, 4, 4)[..., :3] * 1300 + 7  # 16 bits, low bytes of all kinds


def png_with_16_bits(colours: np.ndarray) -> bytes:
    """Returns a PNG that Pillow cannot write: RGB(A) with 16 bits a channel, without any filter."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + kind + content + checksum

    rows, columns, channels = colours.shape
    kind = {3: 2, 4: 6}[channels]
    head = columns.to_bytes(4, "big") + rows.to_bytes(4, "big") + bytes([16, kind, 0, 0, 0])
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colours)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff(array: np.ndarray, *, order: str = "<", more: dict[int, int] | None = None) -> bytes:
    """Returns an uncompressed TIFF with one strip, as the standard has it."""
    samples = array.shape[2] if array.ndim == 3 else 1
    body = array.astype(array.dtype.newbyteorder(order)).tobytes()
    bits = 8 * array.dtype.itemsize
    start = 8 + len(body) + len(body) % 2
    tags = {256: array.shape[1], 257: array.shape[0], 258: bits, 259: 1, 262: 2 if samples > 1 else 1}
    tags |= {273: 8, 277: samples, 278: array.shape[0], 279: len(body)} | (more or {})
    end = start + 2 + 12 * len(tags) + 4
    endian = "little" if order == "<" else "big"
    entries = b""
    for tag, value in sorted(tags.items()):
        entries += tag.to_bytes(2, endian) + (4).to_bytes(2, endian)
        if tag == 258 and samples > 1:
            entries += samples.to_bytes(4, endian) + end.to_bytes(4, endian)
        else:
            entries += (1).to_bytes(4, endian) + value.to_bytes(4, endian)
    magic = b"II*\0" if order == "<" else b"MM\0*"
    directory = len(tags).to_bytes(2, endian) + entries + bytes(4)
    body += b"\0" * (len(body) % 2)
    return magic + start.to_bytes(4, endian) + body + directory + bits.to_bytes(4, endian) * samples


@pytest.mark.parametrize("order", ["<", ">"])
def test_tiff_with_8_and_16_bits_in_both_byte_orders_keeps_every_value(order: str) -> None:
    eight = (RAMP // 16).astype(np.uint8)
    colours = np.dstack([eight, eight[::-1], eight[:, ::-1]])
    np.testing.assert_array_equal(images.decode(tiff(eight, order=order)).array[0], eight)
    np.testing.assert_array_equal(images.decode(tiff(RAMP, order=order)).array[0], RAMP)
    np.testing.assert_array_equal(images.decode(tiff(colours, order=order)).array, colours.transpose(2, 0, 1))
    np.testing.assert_array_equal(images.decode(tiff(DEEP, order=order)).array, DEEP.transpose(2, 0, 1))


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "group4"])
def test_compressed_tiff_reads_like_the_picture(compression: str) -> None:
    if compression == "group4":
        one_bit = Pillow.fromarray(np.eye(9, dtype=np.uint8) * 255).convert("1")
        stream = io.BytesIO()
        one_bit.save(stream, format="TIFF", compression=compression)
        np.testing.assert_array_equal(images.decode(stream.getvalue()).array[0], np.eye(9) * 255)
        return
    content = raster(RAMP, kind="TIFF", compression=compression)
    np.testing.assert_array_equal(images.decode(content).array[0], RAMP)


def test_colour_of_16_bits_keeps_every_value_in_deflated_tiff_and_png() -> None:
    expected = DEEP.transpose(2, 0, 1)
    np.testing.assert_array_equal(images.decode(png_with_16_bits(DEEP)).array, expected)
    stream = io.BytesIO()
    tifffile = pytest.importorskip("tifffile", reason="scikit-image brings it")
    tifffile.imwrite(stream, DEEP, photometric="rgb", compression="zlib")
    np.testing.assert_array_equal(images.decode(stream.getvalue()).array, expected)


def test_tiff_in_which_white_is_zero_is_turned_round() -> None:
    eight = (RAMP // 16).astype(np.uint8)
    np.testing.assert_array_equal(images.decode(tiff(eight, more={262: 0})).array[0], 255.0 - eight)
    np.testing.assert_array_equal(images.decode(tiff(RAMP, more={262: 0})).array[0], 65535.0 - RAMP)


def test_orientation_of_a_tiff_is_applied_once() -> None:
    turned = np.rot90(RAMP, -1)
    np.testing.assert_array_equal(images.decode(tiff(RAMP, more={274: 6})).array[0], turned)


def test_palette_and_opaque_alpha_of_a_tiff_become_rgb() -> None:
    grey = np.array([[0, 255], [255, 0]], np.uint8)
    alpha = np.dstack([grey, grey, grey, np.full_like(grey, 255)])
    np.testing.assert_array_equal(images.decode(raster(alpha, kind="TIFF")).array, [grey] * 3)
    alpha[0, 0, 3] = 7
    assert code(raster(alpha, kind="TIFF")) == "transparent"
    stream = io.BytesIO()
    Pillow.fromarray(grey).convert("P").save(stream, format="TIFF")
    np.testing.assert_array_equal(images.decode(stream.getvalue()).array, [grey] * 3)


def test_pages_floats_inks_and_odd_strips_of_a_tiff_are_refused() -> None:
    stream = io.BytesIO()
    pages = [Pillow.fromarray(np.eye(4, dtype=np.uint8) * value) for value in (100, 200)]
    pages[0].save(stream, format="TIFF", save_all=True, append_images=pages[1:])
    assert code(stream.getvalue()) == "multi_frame"
    assert code(raster(np.eye(3, dtype=np.float32), kind="TIFF")) == "unsupported_pixel_type"
    stream = io.BytesIO()
    Pillow.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).convert("CMYK").save(
        stream, format="TIFF"
    )
    assert code(stream.getvalue()) == "unsupported_pixel_type"
    assert code(tiff(RAMP, more={279: 22})) == "truncated"
    assert code(tiff(RAMP, more={256: 3})) == "excess_pixels"
    assert code(tiff(RAMP, more={278: 1})) == "unreadable"


def test_jpeg_with_damage_that_its_decoder_tells_is_refused() -> None:
    whole = raster(np.random.default_rng(2).integers(0, 256, (64, 64)).astype(np.uint8), kind="JPEG")
    assert images.decode(whole).array.shape == (1, 64, 64)
    damaged = whole[:-2] + b"U" * 40 + whole[-2:]  # more data than the picture needs; Pillow reads it
    Pillow.open(io.BytesIO(damaged)).load()
    assert code(damaged) == "unreadable"


def test_alpha_of_16_bits_is_opaque_to_the_last_bit_or_refused() -> None:
    opaque = np.dstack([DEEP, np.full(DEEP.shape[:2], 65535, np.uint16)])
    np.testing.assert_array_equal(images.decode(png_with_16_bits(opaque)).array, DEEP.transpose(2, 0, 1))
    opaque[1, 1, 3] = 65534
    assert code(png_with_16_bits(opaque)) == "transparent"


def test_signed_and_big_tiff_are_read() -> None:
    tifffile = pytest.importorskip("tifffile", reason="scikit-image brings it")
    signed = RAMP.astype(np.int16) - 1000
    for array, options in ((signed, {}), (RAMP, {"bigtiff": True}), (RAMP, {"tile": (16, 16)})):
        stream = io.BytesIO()
        tifffile.imwrite(stream, array, photometric="minisblack", **options)
        np.testing.assert_array_equal(images.decode(stream.getvalue()).array[0], array)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "tiff_lzw"])
@pytest.mark.parametrize("mode", ["P", "1"])
def test_mask_with_a_palette_or_one_bit_has_the_numbers_of_its_classes(form: str, mode: str) -> None:
    numbers = np.random.default_rng(0).integers(0, 2 if mode == "1" else 3, (6, 8)).astype(np.uint8)
    picture = Pillow.fromarray(255 * numbers if mode == "1" else numbers).convert("1" if mode == "1" else "L")
    options: dict[str, object] = {"compression": form} if form == "tiff_lzw" else {}
    if mode == "P":
        picture = Pillow.fromarray(numbers, mode="P")
        picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
        options |= {"transparency": 0} if form == "PNG" else {}  # the background, often
    stream = io.BytesIO()
    picture.save(stream, format=form.split("_")[0].upper(), **options)
    np.testing.assert_array_equal(images.decode_mask(stream.getvalue()).array, [numbers])
