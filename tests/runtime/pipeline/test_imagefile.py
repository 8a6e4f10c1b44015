"""imagefile.py: the common formats as Pillow and diffusers read them, images of other libraries, one clear error for the rest."""

from __future__ import annotations

import builtins
import io
import os
import random
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdruntime.errors import LibraryMissing, SettingError
from sdruntime.pipeline.images.imagefile import fitted, image_from_bytes, pixels_from, read_image
from sdruntime.pipeline.images.png import png_from_image
from sdruntime.pipeline.requests.request import Request
from sdruntime.pipeline.result import Image

pytest.importorskip("PIL.Image", reason="Pillow reads and writes the other formats")
import PIL.Image
import PIL.ImageOps

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def photo(width: int = 37, height: int = 23) -> Pixels:
    """Smooth, so that lossy formats keep it, and with no symmetry."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + 2 * y) * 255 // (width + 2 * height)], axis=-1).astype(np.uint8)


def saved(image: PIL.Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def rotated(data: Pixels, orientation: int, format: str) -> bytes:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    return saved(PIL.Image.fromarray(data), format, exif=exif)


def grey16() -> PIL.Image.Image:
    return PIL.Image.fromarray((photo()[..., 0].astype(np.uint16) << 8) + 77)


def opaque_files() -> Iterator[tuple[str, bytes]]:
    image = PIL.Image.fromarray(photo())
    for mode in ("L", "P", "1", "RGB"):
        yield f"{mode}.png", saved(image.convert(mode), "PNG")
        yield f"{mode}.bmp", saved(image.convert(mode), "BMP")
    yield "2 bits.png", saved(image.quantize(4), "PNG", bits=2)
    yield "jpeg.png", saved(image, "JPEG")
    yield "cmyk.jpg", saved(image.convert("CMYK"), "JPEG")
    yield "grey.jpg", saved(image.convert("L"), "JPEG")
    yield "a.webp", saved(image, "WEBP")
    for orientation in range(1, 9):
        for format in ("PNG", "JPEG", "WEBP"):
            yield f"{orientation}.{format}", rotated(photo(), orientation, format)


def reference(data: bytes) -> Pixels:
    """What diffusers' load_image makes of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of transparent palettes
        return np.asarray(PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data))).convert("RGB"))


@pytest.mark.parametrize(("name", "data"), list(opaque_files()))
def test_a_file_is_read_as_diffusers_reads_it(name: str, data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "any name"
    path.write_bytes(data)
    found = read_image(path)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, reference(data))


def interlaced(pixels: Pixels) -> bytes:
    """A PNG of Adam7's seven passes, which Pillow does not write."""
    height, width = pixels.shape[:2]
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    rows = b""
    for top, left, down, right in passes:
        part = pixels[top::down, left::right]
        rows += b"".join(b"\0" + row.tobytes() for row in part if part.size)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_an_interlaced_png_and_one_of_16_bits_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(interlaced(photo()))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), photo())
    (tmp_path / "b.png").write_bytes(saved(grey16(), "PNG"))  # of which Pillow's convert makes white
    np.testing.assert_array_equal(read_image(tmp_path / "b.png"), np.repeat(photo()[..., :1], 3, axis=2))


def transparent_files() -> Iterator[tuple[str, bytes]]:
    alpha = np.tile(np.arange(37, dtype=np.uint8) * 6, (23, 1))
    image = PIL.Image.fromarray(np.dstack([photo(), alpha]))
    yield "RGBA.png", saved(image, "PNG")
    yield "LA.png", saved(image.convert("LA"), "PNG")
    yield "P.png", saved(PIL.Image.fromarray(photo()).quantize(16), "PNG", transparency=b"\x00\x80")
    yield "P, 4 bits.png", saved(PIL.Image.fromarray(photo()).quantize(16), "PNG", bits=4, transparency=b"\x00\x80")
    yield "RGBA.webp", saved(image, "WEBP", lossless=True, exact=True)


@pytest.mark.parametrize(("name", "data"), list(transparent_files()))
def test_transparent_parts_are_told_of_and_read_as_diffusers_reads_them(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.warns(UserWarning, match="transparent parts"):
        found = read_image(tmp_path / name)
    np.testing.assert_array_equal(found, reference(data))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.webp", "a WEBP file"),
        ("jpeg.png", "a JPEG file"),
        ("2 bits.png", "a PNG with 2 bits per channel"),
        ("6.PNG", "orientation"),
    ],
)
def test_without_pillow_one_error_names_the_extra(name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_pillow(module: str, *rest: Any) -> Any:
        if module.split(".")[0] == "PIL":
            raise ImportError("No module named 'PIL'")
        return real(module, *rest)

    path = tmp_path / name
    path.write_bytes(dict(opaque_files())[name])
    (tmp_path / "plain.png").write_bytes(png_from_image(photo()))
    monkeypatch.setattr(builtins, "__import__", without_pillow)
    with pytest.raises(LibraryMissing, match=kind) as caught:
        read_image(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert 'pip install "sdruntime[images]"' in str(caught.value)
    np.testing.assert_array_equal(read_image(tmp_path / "plain.png"), photo())


def bad_files() -> dict[str, bytes]:
    jpeg = saved(PIL.Image.fromarray(photo()), "JPEG")
    return {
        "not an image in PNG, JPEG, WebP or BMP format": b"GIF89a",
        "not an image in PNG": b"RIFF1234WAVE",
        "not an image": b"",
        "a JPEG file that Pillow cannot read": jpeg[:200],
        "a BMP file that Pillow cannot read": b"BM" + bytes(20),
        "a WEBP file that Pillow cannot read": saved(PIL.Image.fromarray(photo()), "WEBP")[:60],
        "expected an undamaged PNG": png_from_image(photo())[:-12],
        "9000x9000: the maximum is 67,108,864 pixels": b"BM" + struct.pack("<3I", 1 << 20, 0, 54)
        + struct.pack("<I2i2H6I", 40, 9000, 9000, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(100),
    }  # fmt: skip


@pytest.mark.parametrize("message", bad_files())
def test_what_is_no_image_is_one_clear_error(message: str, tmp_path: Path) -> None:
    path = tmp_path / "in.png"
    path.write_bytes(bad_files()[message])
    with pytest.raises(SettingError) as caught:
        read_image(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_fifos_devices_folders_and_absent_files_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero"), tmp_path):
        with pytest.raises(SettingError, match="not a regular file"):
            read_image(path)
    with pytest.raises(SettingError, match=r"absent\.png: cannot be read: no such file"):
        read_image(tmp_path / "absent.png")


def attacked(chance: random.Random, good: list[bytes]) -> bytes:
    """A file with bytes changed, cut out, doubled or cut off; half of the PNGs have sound checksums again."""
    data = bytearray(chance.choice(good))
    for _ in range(chance.randint(1, 6)):
        place = chance.randrange(len(data))
        kind = chance.randrange(4)
        if kind == 0:
            data[place] = chance.randrange(256)
        elif kind == 1:
            data[place : place + 4] = struct.pack(">I", chance.choice((0, 1, 7, 255, 65_535, 2**31 - 1, 2**32 - 1)))
        elif kind == 2:
            del data[place : place + chance.randrange(1, 40)]
        else:
            data[place:place] = data[place : place + chance.randrange(1, 40)]
        data = data or bytearray(b"B")
    return checked(bytes(data)) if chance.random() < 0.5 else bytes(data)


def checked(data: bytes) -> bytes:
    """A PNG whose chunks have their checksums."""
    place, parts = 8, [data[:8]]
    while data[1:4] == b"PNG" and place + 12 <= len(data):
        end = place + 8 + int.from_bytes(data[place : place + 4], "big")
        parts += [data[place:end], zlib.crc32(data[place + 4 : end]).to_bytes(4, "big")]
        place = end + 4
    return b"".join(parts) if len(parts) > 1 else data


@pytest.mark.parametrize("count", [1_500, pytest.param(200_000, marks=pytest.mark.full)])
@pytest.mark.filterwarnings("ignore")
def test_any_file_is_an_image_or_one_clear_error(count: int) -> None:
    chance = random.Random(7)
    good = [data for _, data in (*opaque_files(), *transparent_files())] + [interlaced(photo()), saved(grey16(), "PNG")]
    read = 0
    for number in range(count):
        data = attacked(chance, good)
        try:
            pixels = image_from_bytes(data)
        except SettingError:
            continue
        except BaseException as error:
            raise AssertionError(f"input {number} of seed 7: {data!r}") from error
        read += 1
        assert pixels.dtype == np.uint8
        assert pixels.shape[2:] == (3,)
    assert count > 2 * read > count // 50, "some attacks leave an image, most do not"


# ---- what a request takes


def test_a_request_takes_an_image_in_any_form(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png_from_image(photo()))
    for form in (path, str(path), photo(), PIL.Image.fromarray(photo())):
        np.testing.assert_array_equal(Request(prompt="x", image=form).pixels, photo())
    with pytest.raises(SettingError, match="expected a path, an array or a Pillow image, got list"):
        pixels_from(photo().tolist())
    with pytest.raises(SettingError, match=r"expected uint8 \[height, width, 3\], got float64 \[2, 2\]"):
        pixels_from(np.zeros((2, 2)))
    palette = PIL.Image.fromarray(photo()).quantize(16)
    np.testing.assert_array_equal(pixels_from(palette), np.asarray(palette.convert("RGB")))


def test_a_generated_image_is_one_to_begin_from() -> None:
    from sdruntime.pipeline.metadata.write import Origin

    first = Image(pixels=photo(), request=Request(prompt="x"), sampler="ddim", origin=Origin(model="m", sampler="DDIM"))
    assert Request(prompt="y", image=first).pixels is first.pixels


@pytest.mark.parametrize("size", [(64, 64), (64, 128), (128, 64), (37, 23)])
def test_fitting_is_diffusers_own(size: tuple[int, int]) -> None:
    processor = pytest.importorskip("diffusers.image_processor").VaeImageProcessor()
    whole = PIL.Image.fromarray(photo())
    width, height = size
    np.testing.assert_array_equal(fitted(photo(), size, "resize"), np.asarray(processor.resize(whole, height, width)))
    np.testing.assert_array_equal(
        fitted(photo(), size, "crop"), np.asarray(processor.resize(whole, height, width, resize_mode="crop"))
    )
