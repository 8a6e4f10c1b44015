"""Convert image files and images of other libraries to pixels uint8 [H, W, 3], and write image files.

`sdruntime.pipeline.images.png` reads PNGs with 8 bits per channel. Other PNGs, JPEG, WebP and BMP require Pillow (the extra
`images`) and are read like diffusers' `load_image`: rotated by their EXIF orientation, then converted to RGB.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sdruntime.errors import LibraryMissing, SettingError, plain
from sdruntime.pipeline.images.pixels import Pixels
from sdruntime.pipeline.images.png import (
    MAX_FILE,
    TRANSPARENT,
    XMP,
    OtherImage,
    image_from_png,
    png_from_image,
    text_from_png,
    write_file,
)

ImageLike: TypeAlias = Any  # a path, an array uint8 [H, W, 3] or an object with `__array__`, or a Pillow image
Fit = Literal["resize", "crop"]
FITS: tuple[Fit, ...] = ("resize", "crop")
MAX_PIXELS = 1 << 26  # maximum for an image read by Pillow
ENDINGS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # of files to write
SAVED: Mapping[str, Mapping[str, Any]] = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"quality": 95}}
INSTALL = 'pip install "sdruntime[images]"'
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286
_MAGIC = {"PNG": b"\x89PNG\r\n\x1a\n", "JPEG": b"\xff\xd8\xff", "WEBP": b"RIFF", "BMP": b"BM"}


def pillow() -> Any:
    """Return Pillow's Image module. Raises LibraryMissing."""
    try:
        from PIL import Image
    except ImportError as error:
        raise LibraryMissing(f"requires Pillow, which cannot be imported ({error}): {INSTALL}") from error
    return Image


def read_image(path: Path | str) -> Pixels:
    """Read an image file; its format is detected from its content.

    Warns if parts are transparent: alpha is dropped and the colours under it remain. Raises SettingError, and LibraryMissing if
    the format requires Pillow.
    """
    try:
        return image_from_bytes(_read_file(path))
    except (SettingError, LibraryMissing) as error:
        raise type(error)(f"{path}: {error}") from error
    except OSError as error:
        raise SettingError(f"{path}: cannot be read: {plain(error)}") from error


def text_of_image(path: Path | str) -> dict[str, str]:
    """Return the texts in an image file: the keys of a PNG; of a JPEG or WebP "parameters", the EXIF UserComment.

    Raises SettingError, and LibraryMissing where the format requires Pillow.
    """
    try:
        return text_from_bytes(_read_file(path))
    except (SettingError, LibraryMissing) as error:
        raise type(error)(f"{path}: {error}") from error
    except OSError as error:
        raise SettingError(f"{path}: cannot be read: {plain(error)}") from error


def text_from_bytes(data: bytes) -> dict[str, str]:
    """The same of a file's bytes."""
    kind = _kind(data)
    if kind == "PNG":
        return text_from_png(data)
    with opened(data) as image:
        comment = image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT, b"")
    text = _user_comment(comment) if isinstance(comment, bytes) else str(comment)
    return {"parameters": text} if text else {}


def _user_comment(comment: bytes) -> str:
    """Return the text of an EXIF UserComment, whose first eight bytes name its encoding."""
    code, text = comment[:8].rstrip(b"\0 "), comment[8:]
    if code == b"UNICODE":
        return text.decode("utf-16-be", errors="replace")
    return (text if code == b"ASCII" else comment).decode("utf-8", errors="replace").strip("\0 ")


def pixels_from(image: ImageLike) -> Pixels:
    """Return the pixels of a path, an array, an `Image` or a Pillow image. Raises as `read_image` does."""
    if isinstance(image, str | os.PathLike):
        return read_image(os.fspath(image))
    module = sys.modules.get("PIL.Image")
    if module is not None and isinstance(image, module.Image):
        return _rgb(image)
    if not hasattr(image, "__array__"):
        raise SettingError(f"image: expected a path, an array or a Pillow image, got {type(image).__name__}")
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise SettingError(f"image: expected uint8 [height, width, 3], got {pixels.dtype} {list(pixels.shape)}")
    return pixels


def gray_from(image: ImageLike) -> NDArray[np.uint8]:
    """Return an image, or an array uint8 or bool [H, W], as gray uint8 [H, W], with Pillow's weights of the colours (BT.601).

    Raises as `read_image` does.
    """
    pixels = np.asarray(image) if hasattr(image, "__array__") else None
    if pixels is not None and pixels.ndim == 2 and pixels.size and pixels.dtype in (np.uint8, np.bool_):
        return pixels if pixels.dtype == np.uint8 else np.where(pixels, np.uint8(255), np.uint8(0))
    red, green, blue = np.moveaxis(pixels_from(image).astype(np.uint32), -1, 0)
    gray: NDArray[np.uint8] = ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).astype(np.uint8)
    return gray


def check_ending(path: Path, where: str) -> None:
    """Raises SettingError if the name ends in no format that can be written, LibraryMissing if the format requires Pillow."""
    if _format(path, where) != "PNG":
        try:
            pillow()
        except LibraryMissing as error:
            raise LibraryMissing(f"{where} {path}: {error}") from error


def _format(path: Path, where: str) -> str:
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise SettingError(f"{where} {path}: the name of an image ends in {', '.join(ENDINGS)}, that of a folder in /".lstrip())
    return ENDINGS[ending]


def write_image(path: Path | str, pixels: Pixels, text: Mapping[str, str], *, overwrite: bool = True) -> None:
    """Write a PNG, JPEG or WebP file, by the ending of its name, with `text` stored as AUTOMATIC1111's web UI does.

    `text` has the keys of `metadata.png_text`; outside PNG the parameters are the EXIF UserComment. Raises SettingError,
    OutOfSpace, LibraryMissing. Without `overwrite`, an existing file is a SettingError.
    """
    path = Path(path)
    try:
        data = bytes_from_image(pixels, text, _format(path, ""))
    except SettingError as error:
        raise SettingError(f"{path}: {error}") from error
    write_file(path, data, overwrite=overwrite)


def bytes_from_image(pixels: Pixels, text: Mapping[str, str], kind: str, quality: int | None = None) -> bytes:
    """Return an image file of `kind`, a value of ENDINGS, with `text` as `write_image` stores it.

    `quality`: 1 to 100, of a JPEG or WebP. Raises SettingError, LibraryMissing.
    """
    if kind == "PNG":
        return png_from_image(pixels, text)
    module, out = pillow(), io.BytesIO()
    exif = module.Exif()
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"UNICODE\0" + text["parameters"].encode("utf-16-be", errors="replace")
    try:
        settings = {**SAVED[kind], **({} if quality is None else {"quality": quality})}
        module.fromarray(pixels).save(out, kind, exif=exif, xmp=text[XMP].encode(), **settings)
    except (OSError, ValueError) as error:
        raise SettingError(f"cannot be written as {kind} ({error}): write a .png") from error
    return out.getvalue()


def fitted(pixels: Pixels, size: tuple[int, int], fit: Fit) -> Pixels:
    """Return `pixels`, [H, W, 3] or gray [H, W], resized to `size`, (width, height), by Lanczos as in diffusers.

    Raises LibraryMissing.

    "resize" changes the proportions; "crop" keeps them, covers `size` and crops the excess equally on both sides.
    """
    height, width = pixels.shape[:2]
    if (width, height) == size:
        return pixels
    module = pillow()
    wide, high = size
    if fit == "crop":
        wider = size[0] / size[1] > width / height
        wide, high = (wide, height * wide // width) if wider else (width * high // height, high)
    image = module.fromarray(np.ascontiguousarray(pixels)).resize((wide, high), module.Resampling.LANCZOS)
    if (wide, high) != size:
        left, top = wide // 2 - size[0] // 2, high // 2 - size[1] // 2
        image = image.crop((left, top, left + size[0], top + size[1]))
    resized: Pixels = np.asarray(image)
    return resized


def _read_file(path: Path | str) -> bytes:
    """Return the bytes of a regular file, at most one over the limit. Refuse a FIFO or a device, as reading might never end."""
    path = Path(path)
    if not stat.S_ISREG(path.stat().st_mode):
        raise SettingError("not a regular file")
    with path.open("rb") as file:
        return file.read(MAX_FILE + 1)


def _kind(data: bytes) -> str:
    """Return the format of an image file. Raises SettingError."""
    kind = next((kind for kind, magic in _MAGIC.items() if data.startswith(magic)), "")
    if len(data) > MAX_FILE:
        raise SettingError(f"over {MAX_FILE:,} bytes")
    if not kind or (kind == "WEBP" and data[8:12] != b"WEBP"):
        raise SettingError("not an image in PNG, JPEG, WebP or BMP format")
    return kind


def image_from_bytes(data: bytes) -> Pixels:
    """Return the pixels of an image file, uint8 [H, W, 3]. Raises as `read_image` does."""
    kind = _kind(data)
    reason = f"a {kind} file"
    if kind == "PNG":
        try:
            return image_from_png(data)
        except OtherImage as error:
            reason = f"a PNG with {error}"
    try:
        with opened(data) as image:
            return _rgb(image)
    except LibraryMissing as error:
        raise LibraryMissing(f"{reason} {error}; without it, only PNGs of 8 bits per channel can be read") from error


@contextlib.contextmanager
def opened(data: bytes) -> Iterator[Any]:
    """Open an image with Pillow. Raises SettingError, also for what Pillow raises of a damaged file; LibraryMissing."""
    module, kind = pillow(), _kind(data)
    try:
        with module.open(io.BytesIO(data), formats=(kind,)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise SettingError(f"{image.width}x{image.height}: the maximum is {MAX_PIXELS:,} pixels")
            yield image
    except SettingError:
        raise
    except Exception as error:  # Pillow's readers raise many kinds of errors for a damaged file
        raise SettingError(f"a {kind} file that Pillow cannot read: {error}") from error


def _rgb(image: Any) -> Pixels:
    """Return the pixels of a Pillow image, upright and in RGB; of 16 bits the high byte, as Pillow does for a colour PNG."""
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        high: Pixels = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return np.repeat(high[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            warnings.warn(TRANSPARENT, UserWarning, stacklevel=2)
    pixels: Pixels = np.asarray(image.convert("RGB"))
    return pixels
