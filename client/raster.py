"""PNG, JPEG and TIFF pictures."""

from __future__ import annotations

import io
import zlib
from typing import Any

import numpy as np
from PIL import Image as Pillow
from PIL import ImageOps

from client import decoder
from client.image import Image, check_size
from common.errors import UnusableCase

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
JPEG_MAGIC = b"\xff\xd8\xff"
TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: BigTIFF
# Tags of TIFF 6.0
WIDTH, HEIGHT, BITS, PHOTOMETRIC, PLANES = 256, 257, 258, 262, 284
STRIPS, STRIP_ROWS, STRIP_BYTES = 273, 278, 279
TILE_WIDTH, TILE_HEIGHT, TILES = 322, 323, 324
DEFLATE = "tiff_adobe_deflate"
OTHER_BYTE = {  # on a little-endian machine
    **{"RGB;16B": "RGB;16L", "RGB;16L": "RGB;16B", "RGB;16N": "RGB;16B"},
    **{"RGBA;16B": "RGBA;16L", "RGBA;16L": "RGBA;16B", "RGBA;16N": "RGBA;16B"},
}
ALPHA = ("LA", "RGBA", "PA")
NUMBERED = ("1", "P")


def is_raster(content: bytes) -> bool:
    """Tells PNG, JPEG and TIFF by their magic."""
    return content[:8] == PNG_MAGIC or content[:3] == JPEG_MAGIC or content[:4] in TIFF_MAGICS


def stated(content: bytes) -> dict[str, Any]:
    """Returns what a JPEG picture states: ``size`` as (width, height), and ``num_channels``."""
    picture = Pillow.open(io.BytesIO(content), formats=("JPEG",))
    return {"size": picture.size, "num_channels": len(picture.getbands())}


def read(content: bytes, *, mask: bool = False) -> Image:
    """Decodes PNG, JPEG or TIFF: grey with 1 to 16 bits, palette, RGB with 8 or 16 bits a channel.

    An alpha channel is dropped where it is opaque everywhere and refused otherwise, since what lies
    behind is unknown. Orientation (EXIF) is applied. What the formats have of checksums is verified.

    Args:
        mask: return the numbers of a palette's colours, and 1 for a bit that is set.

    Raises:
        UnusableCase: see the codes in ``client/quarantine.py``.
    """
    picture: Any = Pillow.open(io.BytesIO(content), formats=("PNG", "JPEG", "TIFF"))
    if getattr(picture, "n_frames", 1) != 1:
        raise UnusableCase("multi_frame", f"Expected one frame, found {picture.n_frames}.")
    check_size((picture.height, picture.width))
    _check_whole(content, picture)
    isolated = picture.format == "TIFF" and picture.info.get("compression") != "raw"
    read_pixels = decoder.stored_pixels if isolated else pixels
    return Image(array=read_pixels(content, mask=mask), spacing_mm=None)


def pixels(content: bytes, *, mask: bool = False) -> np.ndarray:
    """Returns the channels of a picture, float32, (1 or 3, rows, columns); see ``read``."""
    picture: Any = Pillow.open(io.BytesIO(content), formats=("PNG", "JPEG", "TIFF"))
    inverted = picture.format == "TIFF" and picture.mode == "I;16" and picture.tag_v2.get(PHOTOMETRIC) == 0
    if picture.tile and _raw_mode(picture) in OTHER_BYTE:
        array = _sixteen_bits(content)
    else:
        array = _numbers(picture) if mask and picture.mode in NUMBERED else _eight_bits(picture)
    if inverted:  # white is zero; Pillow turns this round for 8 bits only
        array = np.float32(2**16 - 1) - array
    return array


def _numbers(picture: Any) -> np.ndarray:
    """Returns the number of each pixel's colour, or its bit, float32; transparency says nothing of them."""
    picture.load()
    return np.asarray(ImageOps.exif_transpose(picture)).astype(np.float32)[None]


def _eight_bits(picture: Any) -> np.ndarray:
    """Returns the channels of a picture, float32: grey with any number of bits, RGB with 8."""
    picture.load()
    picture = _opaque(ImageOps.exif_transpose(picture))
    if picture.mode == "1":
        picture = picture.convert("L")
    if picture.mode == "P":
        picture = picture.convert("RGB")
    if picture.mode == "RGB":
        return np.ascontiguousarray(np.moveaxis(np.asarray(picture), -1, 0), dtype=np.float32)
    if picture.mode == "L" or picture.mode.startswith("I"):
        grey: np.ndarray = np.asarray(picture).astype(np.float32)
        return grey[None]
    raise UnusableCase("unsupported_pixel_type", f"Expected grey or RGB, found {picture.mode}.")


def _sixteen_bits(content: bytes) -> np.ndarray:
    """Returns RGB of 16 bits a channel, float32; Pillow unpacks one byte of each at a time."""
    high, low = (Pillow.open(io.BytesIO(content), formats=("PNG", "TIFF")) for _ in range(2))
    low.tile = [_with_raw_mode(tile, OTHER_BYTE[_raw_mode(low)]) for tile in low.tile]
    array: np.ndarray = 256 * _eight_bits(high) + _eight_bits(low)
    return array


def _raw_mode(picture: Any) -> str:
    args = picture.tile[0].args
    return str(args if isinstance(args, str) else args[0])


def _with_raw_mode(tile: Any, mode: str) -> Any:
    return tile._replace(args=mode if isinstance(tile.args, str) else (mode, *tile.args[1:]))


def _opaque(picture: Any) -> Any:
    """Returns the picture without alpha.

    Raises:
        UnusableCase: some pixel is transparent.
    """
    if "transparency" in picture.info and picture.mode not in ALPHA:
        if picture.mode.startswith("I"):
            raise UnusableCase("transparent", "Expected opaque pixels, found a transparent grey value.")
        picture = picture.convert("RGBA")
    if picture.mode not in ALPHA:
        return picture
    if picture.getchannel("A").getextrema() != (255, 255):
        raise UnusableCase("transparent", "Expected opaque pixels, found transparent ones.")
    return picture.convert("L" if picture.mode == "LA" else "RGB")


def _check_whole(content: bytes, picture: Any) -> None:
    """Looks for damage that Pillow passes over."""
    if picture.format == "PNG":
        _check_png(content)
    elif picture.format == "TIFF":
        _check_tiff(content, picture)
    else:
        decoder.check_jpeg(content)


def _check_png(content: bytes) -> None:
    """Compares the checksum of every chunk; Pillow leaves out those of the pixels."""
    position, kind = 8, b""
    while kind != b"IEND":
        length = int.from_bytes(content[position : position + 4], "big")
        end = position + 8 + length
        kind = content[position + 4 : position + 8]
        if end + 4 > len(content):
            raise UnusableCase("truncated", "Expected the end of the picture, found the end of the file.")
        if zlib.crc32(content[position + 4 : end]) != int.from_bytes(content[end : end + 4], "big"):
            raise UnusableCase("unreadable", "Expected a chunk with its checksum, found another.")
        position = end + 4


def _check_tiff(content: bytes, picture: Any) -> None:
    """Compares the parts of the picture with its stated size, their lengths where they say it.

    Those of raw and deflated strips do; of others libtiff notices what is too short.
    """
    tags, compression = picture.tag_v2, picture.info.get("compression")
    if TILES in tags:
        wide, high = _count(tags[WIDTH], tags[TILE_WIDTH]), _count(tags[HEIGHT], tags[TILE_HEIGHT])
        return _check_parts(len(tags[TILES]), wide * high * _num_planes(tags))
    lengths = tags[STRIP_BYTES]
    _check_parts(len(lengths), _count(tags[HEIGHT], tags.get(STRIP_ROWS, 2**32 - 1)) * _num_planes(tags))
    expected = _row_bytes(tags) * int(tags[HEIGHT])
    strips = zip(tags[STRIPS], lengths, strict=True)
    if compression == "raw":
        found = sum(lengths)
    elif compression == DEFLATE:
        found = sum(len(_deflated(content[at : at + length], most=expected)) for at, length in strips)
    else:
        return
    if found != expected:
        code = "truncated" if found < expected else "excess_pixels"
        raise UnusableCase(code, f"Expected {expected} bytes of pixels, found {found}.")


def _check_parts(found: int, expected: int) -> None:
    if found != expected:
        raise UnusableCase("unreadable", f"Expected {expected} parts of the picture, found {found}.")


def _count(whole: int, part: int) -> int:
    return -(-int(whole) // int(part))


def _num_planes(tags: Any) -> int:
    return len(tags.get(BITS, (1,))) if tags.get(PLANES, 1) == 2 else 1


def _row_bytes(tags: Any) -> int:
    bits, planes, width = tuple(map(int, tags.get(BITS, (1,)))), tags.get(PLANES, 1), int(tags[WIDTH])
    if planes == 2:
        return sum(-(-width * one // 8) for one in bits)
    return -(-width * sum(bits) // 8)


def _deflated(strip: bytes, *, most: int) -> bytes:
    stream = zlib.decompressobj()
    content = stream.decompress(strip, most + 1)
    if not stream.eof:
        raise UnusableCase("truncated", "Expected the end of a strip, found the end of its data.")
    return content
