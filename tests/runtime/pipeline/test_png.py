"""Pixels and PNG files: rounding, there and back with every filter and colour type, files that attack, files half written."""

import contextlib
import errno
import os
import struct
import zlib

import numpy as np
import pytest

from sdruntime.errors import OutOfSpace, SdruntimeError, SettingError
from sdruntime.pipeline.images.imagefile import read_image
from sdruntime.pipeline.images.pixels import from_uint8, to_uint8
from sdruntime.pipeline.images.png import MAX_CHUNKS, OtherImage, image_from_png, png_from_image, write_png
from sdruntime.pipeline.metadata.write import png_text

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def chunk(kind, data=b"", crc=None):
    crc = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def png(width, height, colour, raw, *more, depth=8, interlace=0):
    """A PNG from filtered rows, with more chunks before the pixels."""
    header = chunk(b"IHDR", struct.pack(">2I5B", width, height, depth, colour, 0, 0, interlace))
    return SIGNATURE + header + b"".join(more) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND")


def filtered(pixels, filters):
    """Rows filtered pixel by pixel, as the standard writes it down."""
    height, width, channels = pixels.shape
    rows = bytearray()
    for y in range(height):
        rows.append(filters[y])
        for x in range(width):
            for c in range(channels):
                left = int(pixels[y, x - 1, c]) if x else 0
                up = int(pixels[y - 1, x, c]) if y else 0
                corner = int(pixels[y - 1, x - 1, c]) if x and y else 0
                guess = left + up - corner
                paeth = min((left, up, corner), key=lambda value, guess=guess: abs(guess - value))
                rows.append((int(pixels[y, x, c]) - (0, left, up, (left + up) // 2, paeth)[filters[y]]) % 256)
    return bytes(rows)


def exif(order, orientation):
    """TIFF of two tags, the second of which is the orientation."""
    mark = {"<": b"II", ">": b"MM"}[order]
    entries = struct.pack(f"{order}HHIHH", 0x0100, 3, 1, 4, 0) + struct.pack(f"{order}HHIHH", 0x0112, 3, 1, orientation, 0)
    return mark + struct.pack(f"{order}HI", 42, 8) + struct.pack(f"{order}H", 2) + entries + bytes(4)


def text_chunks(data):
    """Kind, key and text of a PNG's text chunks."""
    place, found = 8, []
    while place < len(data):
        size, kind = struct.unpack_from(">I4s", data, place)
        content = data[place + 8 : place + 8 + size]
        if kind in (b"tEXt", b"iTXt"):
            key, _, text = content.partition(b"\0")
            found.append((kind, key.decode(), text[4:].decode() if kind == b"iTXt" else text.decode("latin-1")))
        place += 12 + size
    return found


def test_rounding_is_to_the_nearest_and_outside_is_clipped():
    levels = np.arange(256, dtype=np.float64)
    decoded = np.concatenate([levels / 127.5 - 1, [-1.01, 1.01, -40.0, 40.0]]).astype(np.float32)
    image = to_uint8(np.broadcast_to(decoded, (2, 3, 5, 260)))
    assert image.shape == (2, 5, 260, 3)
    assert image.dtype == np.uint8
    assert image[1, 4, :256, 2].tolist() == list(range(256))
    assert image[0, 0, 256:, 0].tolist() == [0, 255, 0, 255]


def test_channels_go_last_and_first_again():
    image = noise(2, 6, 9, 3)
    back = from_uint8(image)
    assert back.shape == (2, 3, 6, 9)
    assert back.dtype == np.float32
    assert back.flags.c_contiguous
    assert back.min() >= -1
    assert back.max() <= 1
    assert np.array_equal(to_uint8(back), image)
    assert np.array_equal(from_uint8(image[0]), back[0])


def test_to_uint8_leaves_its_input_and_refuses_what_is_not_finite():
    decoded = np.linspace(-1, 1, 3 * 4 * 4, dtype=np.float32).reshape(3, 4, 4)
    kept = decoded.copy()
    to_uint8(decoded)
    assert np.array_equal(decoded, kept)
    for value in (np.nan, np.inf):
        decoded[1, 2, 3] = value
        with pytest.raises(SdruntimeError, match="not finite"):
            to_uint8(decoded)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (64, 5), (65, 64), (130, 33)])
def test_a_picture_comes_back(shape, tmp_path):
    image = noise(*shape, 3)
    write_png(tmp_path / "a.png", image)
    assert np.array_equal(read_image(tmp_path / "a.png"), image)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_every_filter_and_colour_type_is_read(colour, channels):
    pixels = noise(11, 8, channels, seed=colour) // 3
    filters = [0, 1, 2, 3, 4, 4, 3, 1, 2, 0, 3]
    for order in (filters, filters[::-1], [4] * 11, [3] * 11):
        with pytest.warns(UserWarning, match="transparent parts") if channels in (2, 4) else contextlib.nullcontext():
            image = image_from_png(png(8, 11, colour, filtered(pixels, order)))
        expected = np.repeat(pixels[..., :1], 3, axis=2) if channels < 3 else pixels[..., :3]
        assert image.shape == (11, 8, 3)
        assert np.array_equal(image, expected)


def test_a_palette_is_looked_up_and_ancillary_chunks_are_passed_over():
    pixels, palette = noise(4, 5, 1) % 7, noise(7, 3, seed=1)
    more = chunk(b"gAMA", b"\0\0\0\1"), chunk(b"PLTE", palette.tobytes()), chunk(b"tRNS", b"\0")
    data = png(5, 4, 3, filtered(pixels, [0, 1, 2, 4]), *more)
    with pytest.warns(UserWarning, match="transparent parts"):
        assert np.array_equal(image_from_png(data), palette[pixels[..., 0]])


def test_alpha_that_hides_nothing_is_dropped_without_a_word():
    pixels = noise(4, 5, 4)
    pixels[..., 3] = 255
    assert np.array_equal(image_from_png(png(5, 4, 6, filtered(pixels, [0, 1, 2, 4]))), pixels[..., :3])


def damaged():
    good = png(4, 3, 2, filtered(noise(3, 4, 3), [0, 1, 4]))
    raw = bytes(3 * (1 + 4 * 3))
    pixels = good.index(b"IDAT")
    return {
        "not a PNG": b"GIF89a",
        "ends before its IEND": good[:-12],
        "ends before": good[:70],
        "damaged (CRC)": good[: pixels + 9] + bytes([good[pixels + 9] ^ 1]) + good[pixels + 10 :],
        "not one IHDR": SIGNATURE + chunk(b"IDAT", b"") + good[8:],
        "not one IHDR at": good[:33] + good[8:33] + good[33:],
        "an IHDR of 5 bytes": SIGNATURE + chunk(b"IHDR", b"12345") + chunk(b"IEND"),
        "0×3 pixels": png(0, 3, 2, raw),
        "8 bits of colour type 5": png(4, 3, 5, raw),
        "3 bits of colour type 2": png(4, 3, 2, raw, depth=3),
        "methods 0, 0 and 2": png(4, 3, 2, raw, interlace=2),
        "more than 65,536 chunks": png(4, 3, 2, raw, chunk(b"IDAT") * MAX_CHUNKS),
        "more than 65,536 chunk": png(4, 3, 2, raw, chunk(b"tEXt", b"a\0b") * MAX_CHUNKS),
        "critical chunk b'ABCD'": png(4, 3, 2, raw, chunk(b"ABCD")),
        "do not unpack to the 39 bytes": png(4, 3, 2, raw[:-1]),
        "do not unpack to the": png(4, 3, 2, raw + b"\0"),
        "do not unpack": good[: good.index(b"IDAT") - 4] + chunk(b"IEND"),
        "a row of filter 5": png(4, 3, 2, b"\5" + raw[1:]),
        "the palette has 0": png(4, 3, 3, bytes(3 * 5)),
        "a pixel of colour 9, but the palette has 2": png(4, 3, 3, b"\0\0\0\0\x09" * 3, chunk(b"PLTE", bytes(6))),
        "incorrect header check": SIGNATURE + good[8:33] + chunk(b"IDAT", b"rubbish") + chunk(b"IEND"),
    }


@pytest.mark.parametrize("message", damaged())
def test_a_damaged_file_is_one_clear_error(message):
    with pytest.raises(SettingError, match="expected an undamaged PNG") as caught:
        image_from_png(damaged()[message])
    assert message in str(caught.value)
    assert not isinstance(caught.value, OtherImage)


@pytest.mark.parametrize(
    ("reason", "data"),
    [
        ("100000×100000 pixels, over 4096", png(100_000, 100_000, 2, b"")),
        ("16 bits per channel", png(4, 3, 2, b"", depth=16)),
        ("4 bits per channel", png(4, 3, 3, b"", depth=4)),
        ("interlaced rows", png(4, 3, 2, b"", interlace=1)),
        ("an EXIF orientation", png(4, 3, 2, b"", chunk(b"eXIf", exif("<", 6)))),
        ("an EXIF orientation", png(4, 3, 2, b"", chunk(b"eXIf", exif(">", 3)))),
    ],
)
def test_a_png_of_another_kind_is_named(reason, data):
    with pytest.raises(OtherImage, match=reason):
        image_from_png(data)


@pytest.mark.parametrize("data", [b"", b"II*", exif("<", 1), exif(">", 1), exif("<", 6)[:20], exif("<", 6)[:4] + b"\xff" * 12])
def test_exif_that_turns_nothing_or_is_damaged_is_passed_over(data):
    pixels = noise(3, 4, 3)
    assert np.array_equal(image_from_png(png(4, 3, 2, filtered(pixels, [0, 1, 4]), chunk(b"eXIf", data))), pixels)


def test_a_bomb_is_unpacked_no_further_than_its_size(monkeypatch):
    limits = []
    real = zlib.decompressobj

    class Watched:
        def __init__(self):
            self.real = real()

        def decompress(self, data, limit):
            limits.append(limit)
            return self.real.decompress(data, limit)

        @property
        def eof(self):
            return self.real.eof

    monkeypatch.setattr(zlib, "decompressobj", Watched)
    bomb = png(2, 2, 2, bytes(30_000_000))
    assert len(bomb) < 50_000
    with pytest.raises(SettingError, match="do not unpack to the 14 bytes"):
        image_from_png(bomb)
    assert limits == [15]


def test_any_bytes_are_an_error_and_nothing_else():
    hypothesis = pytest.importorskip("hypothesis")
    good = bytearray(png_from_image(noise(5, 6, 3), {"key": "text"}))
    st = hypothesis.strategies

    @hypothesis.settings(max_examples=200, deadline=None)
    @hypothesis.given(
        st.lists(st.tuples(st.integers(0, len(good) - 1), st.integers(0, 255)), max_size=4), st.integers(0, len(good))
    )
    def attack(changes, end):
        data = bytearray(good)
        for place, value in changes:
            data[place] = value
        try:
            image = image_from_png(bytes(data[:end]))
        except SettingError:
            return
        assert bytes(data[:end]) == bytes(good)  # every byte of it is under a checksum
        assert image.shape == (5, 6, 3)

    attack()


def test_latin_text_is_text_and_other_text_is_international():
    data = png_from_image(noise(2, 2, 3), {"a": "café\nline", "b": "赤い丸"} | png_text("a cat\nSteps: 20"))
    found = text_chunks(data)
    assert found[:3] == [(b"tEXt", "a", "café\nline"), (b"iTXt", "b", "赤い丸"), (b"tEXt", "parameters", "a cat\nSteps: 20")]
    kind, key, xmp = found[3]
    assert (kind, key) == (b"iTXt", "XML:com.adobe.xmp")
    assert 'DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"' in xmp


def test_the_xmp_is_xml_with_the_names_of_its_standards():
    import xml.etree.ElementTree as ET

    packet = png_text("")["XML:com.adobe.xmp"]
    rdf = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
    (description,) = ET.fromstring(packet.partition("?>")[2].rpartition("<?xpacket")[0]).iter(f"{rdf}Description")
    assert description.attrib == {
        f"{rdf}about": "",
        "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType": (
            "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
        ),
    }


@pytest.mark.parametrize("text", [{"": "x"}, {"k" * 80: "x"}, {"ключ": "x"}, {"a\0b": "x"}, {"a": "x\0y"}])
def test_text_that_a_png_cannot_hold_is_refused(text, tmp_path):
    with pytest.raises(SettingError, match="PNG text"):
        write_png(tmp_path / "a.png", noise(2, 2, 3), text)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("image", [noise(4, 4), noise(4, 4, 4), noise(0, 4, 3), noise(4, 4, 3).astype(np.float32)])
def test_what_is_no_picture_is_refused(image):
    with pytest.raises(SettingError, match=r"uint8 \[height, width, 3\], got"):
        png_from_image(image)


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, OutOfSpace), (errno.EIO, SettingError)])
def test_a_write_that_fails_leaves_what_was_there(number, kind, tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    write_png(path, noise(3, 3, 3))
    former = path.read_bytes()

    def fail(handle):
        raise OSError(number, "stopped")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(kind, match="disk is full" if kind is OutOfSpace else r"a\.png: cannot be written: stopped"):
        write_png(path, noise(3, 3, 3, seed=1))
    assert path.read_bytes() == former
    assert [found.name for found in tmp_path.iterdir()] == ["a.png"]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SettingError, match=r"absent/a\.png: cannot be written: no such file"):
        write_png(tmp_path / "absent" / "a.png", noise(2, 2, 3))
