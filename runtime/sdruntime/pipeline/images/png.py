"""Read and write PNG (W3C PNG, third edition) with NumPy and zlib alone.

write_png, png_from_image           uint8 [H, W, 3] and text keys -> PNG
write_file                          bytes -> a file, atomically
image_from_png                      PNG with 8 bits per channel -> uint8 [H, W, 3]; files: `sdruntime.pipeline.images.imagefile`
text_from_png                       PNG -> its text keys
"""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sdruntime.bundle.bundle import disk_full_as_error
from sdruntime.errors import SettingError, plain
from sdruntime.pipeline.images.pixels import Pixels
from sdruntime.system.durable import create_file, replace_file

MAX_SIDE = 4096  # pixels, when reading
MAX_FILE = 1 << 27  # bytes
MAX_TEXT = 1 << 22  # bytes of all texts of a PNG, unpacked
MAX_CHUNKS = 1 << 16  # of a PNG: encoders write one for every 8 KiB of pixels, or for every row
TRANSPARENT = "the image has transparent parts: alpha is dropped, as in diffusers; flatten the image to choose a background"
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # colour type: grey, RGB, palette, grey and alpha, RGB and alpha
_PALETTE, _PAETH = 3, 4
_ORIENTATION, _UPRIGHT = 0x0112, 1  # EXIF tag, and its value for an image that needs no rotation
_STRIP = 64  # rows filtered at a time, to stay in the cache
XMP = "XML:com.adobe.xmp"  # the PNG key of an XMP packet


class OtherImage(SettingError):
    """A valid PNG of a kind that this module does not read; the message names it."""


def write_png(path: Path | str, image: Pixels, text: Mapping[str, str] | None = None) -> None:
    """Write a PNG file. Raises as `png_from_image` and `write_file` do."""
    write_file(path, png_from_image(image, text))


def write_file(path: Path | str, data: bytes, *, overwrite: bool = True) -> None:
    """Write `data` to `path` atomically: after a failure the file is as it was.

    Raises SettingError if the path cannot be written, or exists and `overwrite` is false; OutOfSpace.
    """
    path = Path(path)
    try:
        with disk_full_as_error(path.parent):
            (replace_file if overwrite else create_file)(path, data)
    except FileExistsError:
        raise SettingError(f"{path}: this file exists") from None
    except OSError as error:
        raise SettingError(f"{path}: cannot be written: {plain(error)}") from error


def png_from_image(image: Pixels, text: Mapping[str, str] | None = None) -> bytes:
    """Encode uint8 [H, W, 3] as a PNG, with `text` as tEXt, or iTXt if it is not Latin-1. Raises SettingError."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise SettingError(f"image: expected uint8 [height, width, 3], got {image.dtype} {list(image.shape)}")
    height, width = image.shape[:2]
    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    texts = [_text_chunk(key, value) for key, value in (text or {}).items()]
    chunks = [_chunk(b"IHDR", header), *texts, _chunk(b"IDAT", _deflated(image)), _chunk(b"IEND", b"")]
    return b"".join([_SIGNATURE, *chunks])


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))


def _text_chunk(key: str, value: str) -> bytes:
    if not (0 < len(key) < 80 and key.isascii()) or "\0" in key + value:
        raise SettingError(f"PNG text {key!r}: expected a key of 1 to 79 ASCII characters, and no NUL in key or text")
    name = key.encode()
    try:
        if key != XMP:  # whose standard requires iTXt
            return _chunk(b"tEXt", name + b"\0" + value.encode("latin-1"))
    except UnicodeEncodeError:
        pass
    return _chunk(b"iTXt", name + b"\0\0\0\0\0" + value.encode(errors="replace"))


def _deflated(image: Pixels) -> bytes:
    """Compress the pixels, each row with the Paeth filter; after it, Z_RLE packs as well as a slow search for matches."""
    height, width, channels = image.shape
    pack = zlib.compressobj(6, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_RLE)
    padded = np.zeros((_STRIP + 1, width + 1, channels), np.int16)  # the row above on top, a column of zeros on the left
    parts = []
    for first in range(0, height, _STRIP):
        strip = image[first : first + _STRIP]
        rows = len(strip)
        padded[1 : rows + 1, 1:] = strip
        above = padded[:rows]
        filtered = np.empty((rows, 1 + width * channels), np.uint8)
        filtered[:, 0] = _PAETH
        # the format stores the difference modulo 256
        filtered[:, 1:] = (
            (strip - _paeth(padded[1 : rows + 1, :-1], above[:, 1:], above[:, :-1])).reshape(rows, -1).astype(np.uint8)
        )
        parts.append(pack.compress(filtered.tobytes()))
        padded[0] = padded[rows]
    return b"".join([*parts, pack.flush()])


def _paeth(left: NDArray[np.int16], up: NDArray[np.int16], corner: NDArray[np.int16]) -> NDArray[np.int16]:
    """Return the predictor nearest to left + up − corner; of equals the first (Paeth 1991)."""
    from_left, from_up = np.abs(up - corner), np.abs(left - corner)
    from_corner = np.abs(left + up - 2 * corner)
    nearest = np.where(from_up <= from_corner, up, corner)
    return np.where((from_left <= from_up) & (from_left <= from_corner), left, nearest)


def image_from_png(data: bytes) -> Pixels:
    """Decode a PNG with 8 bits per channel, not interlaced, at most 4096×4096, to uint8 [H, W, 3]; grey is repeated.

    Alpha is dropped, with a warning if it is not opaque. Raises SettingError for a damaged file, OtherImage for other kinds.
    """
    try:
        return _image_from_png(data)
    except OtherImage:
        raise
    except (ValueError, zlib.error) as error:
        raise SettingError(f"{error}; expected an undamaged PNG") from None


def _image_from_png(data: bytes) -> Pixels:
    if not data.startswith(_SIGNATURE):
        raise ValueError("not a PNG")
    if len(data) > MAX_FILE:
        raise ValueError(f"over {MAX_FILE:,} bytes")
    packed: list[memoryview] = []
    single: dict[bytes, bytes] = {}
    for kind, content in _chunks(data):
        if (kind == b"IHDR") == (b"IHDR" in single):
            raise ValueError("not one IHDR at the start")
        if kind == b"IDAT":
            packed.append(content)
        elif kind in (b"IHDR", b"PLTE", b"tRNS", b"eXIf"):
            single[kind] = bytes(content)
        elif not kind[0] & 0x20 and kind != b"IEND":
            raise ValueError(f"an unknown critical chunk {kind!r}")
    width, height, colour = _checked_header(single[b"IHDR"])
    if _orientation(single.get(b"eXIf", b"")) != _UPRIGHT:
        raise OtherImage("an EXIF orientation")
    channels = _CHANNELS[colour]
    rows = np.frombuffer(_inflated(b"".join(packed), height * (1 + width * channels)), np.uint8).reshape(height, -1)
    pixels = _unfiltered(rows[:, 1:].reshape(height, width, channels), rows[:, 0])
    if b"tRNS" in single or (channels in (2, 4) and pixels[..., -1].min() < 255):
        warnings.warn(TRANSPARENT, UserWarning, stacklevel=3)
    if colour == _PALETTE:
        palette = single.get(b"PLTE", b"")
        colours = np.frombuffer(palette, np.uint8).reshape(-1, 3) if len(palette) % 3 == 0 else np.empty((0, 3), np.uint8)
        if pixels.max() >= len(colours):
            raise ValueError(f"a pixel of colour {pixels.max()}, but the palette has {len(colours)}")
        return colours[pixels[..., 0]]
    return np.ascontiguousarray(np.broadcast_to(pixels[..., :1], (height, width, 3)) if channels < 3 else pixels[..., :3])


def text_from_png(data: bytes) -> dict[str, str]:
    """Return the texts of a PNG by their keys: tEXt, zTXt and iTXt; of equal keys the first.

    Raises SettingError for a damaged file, and for texts of more than MAX_TEXT bytes.
    """
    texts: dict[str, str] = {}
    size = 0
    try:
        if not data.startswith(_SIGNATURE):
            raise ValueError("not a PNG")
        for kind, content in _chunks(data):
            if kind in (b"tEXt", b"zTXt", b"iTXt"):
                key, text = _text(kind, bytes(content), MAX_TEXT - size)
                size += len(text)
                texts.setdefault(key, text)
    except (ValueError, zlib.error) as error:
        raise SettingError(f"{error}; expected an undamaged PNG") from None
    return texts


def _text(kind: bytes, content: bytes, most: int) -> tuple[str, str]:
    """Return the key and the text of a chunk. Raises ValueError if it is damaged or has over `most` bytes."""
    key, _, rest = content.partition(b"\0")
    packed, encoding = False, "latin-1"
    if kind == b"zTXt":
        packed, rest = True, rest[1:]
    elif kind == b"iTXt":
        packed, encoding = rest[:1] == b"\1", "utf-8"
        rest = rest[2:].partition(b"\0")[2].partition(b"\0")[2]  # after the language and the translated key
    text = zlib.decompressobj().decompress(rest, most + 1) if packed else rest
    if len(text) > most:
        raise ValueError(f"texts of over {MAX_TEXT:,} bytes")
    return key.decode("latin-1"), text.decode(encoding, errors="replace")


def _orientation(exif: bytes) -> int:
    """Return the orientation in an eXIf chunk (TIFF), 1 to 8; 1, upright, if it has none."""
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    try:
        (first,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, first)
        for place in range(first + 2, first + 2 + 12 * count, 12):
            tag, value = struct.unpack_from(f"{order}H6xH", exif, place)
            if tag == _ORIENTATION:
                return int(value)
    except struct.error:
        pass  # no EXIF, or a damaged one
    return _UPRIGHT


def _chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    place, view = len(_SIGNATURE), memoryview(data)
    kind, count = b"", 0
    while kind != b"IEND":
        count += 1
        if count > MAX_CHUNKS:
            raise ValueError(f"more than {MAX_CHUNKS:,} chunks")
        head = view[place : place + 8]
        size, kind = struct.unpack(">I4s", head) if len(head) == 8 else (0, b"")
        end = place + 8 + size
        if len(view) < end + 4 or not kind:
            raise ValueError("it ends before its IEND chunk")
        if zlib.crc32(view[place + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise ValueError(f"the chunk {kind!r} at byte {place:,} is damaged (CRC)")
        yield kind, view[place + 8 : end]
        place = end + 4


def _checked_header(header: bytes) -> tuple[int, int, int]:
    """Return width, height and colour type of an IHDR. Raises ValueError if it is invalid, OtherImage if it is not supported."""
    if len(header) != 13:
        raise ValueError(f"an IHDR of {len(header)} bytes")
    width, height, depth, colour, compression, filters, interlace = struct.unpack(">2I5B", header)
    known = depth in (1, 2, 4, 8, 16) and colour in _CHANNELS and (compression, filters) == (0, 0) and interlace in (0, 1)
    if width < 1 or height < 1 or not known:
        raise ValueError(
            f"an invalid header: {width}×{height} pixels, {depth} bits of colour type {colour}, "
            f"methods {compression}, {filters} and {interlace}"
        )
    if width > MAX_SIDE or height > MAX_SIDE:
        raise OtherImage(f"{width}×{height} pixels, over {MAX_SIDE} a side")
    if depth != 8:
        raise OtherImage(f"{depth} bits per channel")
    if interlace:
        raise OtherImage("interlaced rows")
    return width, height, colour


def _inflated(packed: bytes, size: int) -> bytes:
    """Decompress to exactly `size` bytes; stop early if there are more. Raises ValueError for any other size."""
    unpack = zlib.decompressobj()
    data = unpack.decompress(packed, size + 1)
    if len(data) != size or not unpack.eof:
        raise ValueError(f"its pixels do not unpack to the {size:,} bytes of its size")
    return data


def _unfiltered(rows: Pixels, filters: Pixels) -> Pixels:
    """Undo each row's filter (0 to 4: none, left, up, mean, Paeth) for [H, W, channels].

    A pixel depends on the ones to its left and above. So all pixels of an anti-diagonal are independent, and they have a constant
    stride in memory: H + W - 1 steps for any mixture of filters.
    """
    height, width, channels = rows.shape
    if filters.max() > _PAETH:
        raise ValueError(f"a row of filter {filters.max()}")
    padded = np.zeros((height + 1, width + 1, channels), np.int16)  # zeros above and on the left
    padded[1:, 1:] = rows
    flat, stride = padded.reshape(-1, channels), width + 1
    kinds = filters[:, None]
    for diagonal in range(height + width - 1):
        top, bottom = max(0, diagonal - width + 1), min(height - 1, diagonal)
        begin, span = (top + 1) * stride + diagonal - top + 1, (bottom - top) * width + 1
        here, left, up, corner = (flat[begin - back :][:span:width] for back in (0, 1, stride, stride + 1))
        guesses = (np.zeros_like(here), left, up, (left + up) >> 1, _paeth(left, up, corner))
        here += np.choose(kinds[top : bottom + 1], guesses)
        here &= 0xFF
    return padded[1:, 1:].astype(np.uint8)
