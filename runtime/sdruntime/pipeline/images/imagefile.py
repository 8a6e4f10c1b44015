"""Image files of the common formats, and images of other libraries, from and to pixels uint8 [H, W, 3].

A PNG with 8 bits a channel is read by `sdruntime.pipeline.images.png`; other PNGs, JPEG, WebP and BMP by Pillow (the extra
`images`), as diffusers' `load_image` reads them: turned upright by their EXIF orientation, then converted to RGB.
"""

from __future__ import annotations

import io
import os
import stat
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from sdruntime.errors import LibraryMissing, SettingError, plain
from sdruntime.pipeline.images.pixels import Pixels
from sdruntime.pipeline.images.png import MAX_FILE, TRANSPARENT, XMP, OtherImage, image_from_png, png_from_image, write_file

ImageLike: TypeAlias = Any  # a path, an array uint8 [H, W, 3] or what has one (`__array__`), or a Pillow image
Fit = Literal["resize", "crop"]
FITS: tuple[Fit, ...] = ("resize", "crop")
MAX_PIXELS = 1 << 26  # of an image that Pillow reads
ENDINGS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # of what is written
SAVED: Mapping[str, Mapping[str, Any]] = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"quality": 95}}
INSTALL = 'pip install "sdruntime[images]"'
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286
_MAGIC = {"PNG": b"\x89PNG\r\n\x1a\n", "JPEG": b"\xff\xd8\xff", "WEBP": b"RIFF", "BMP": b"BM"}


def pillow() -> Any:
    """Pillow's Image module. Raises LibraryMissing."""
    try:
        from PIL import Image
    except ImportError as error:
        raise LibraryMissing(f"this needs Pillow, which cannot be imported ({error}): {INSTALL}") from error
    return Image


def read_image(path: Path | str) -> Pixels:
    """The image in a file, whatever its name ends with. Raises SettingError, and LibraryMissing where only Pillow reads it.

    Warns of transparent parts, whose hidden colours are what remains.
    """
    try:
        return _image_from_bytes(_file(path))
    except (SettingError, LibraryMissing) as error:
        raise type(error)(f"{path}: {error}") from error
    except OSError as error:
        raise SettingError(f"{path}: cannot be read: {plain(error)}") from error


def pixels_from(image: ImageLike) -> Pixels:
    """The pixels of an image in any form: a path, an array, an `Image`, a Pillow image. Raises as `read_image` does."""
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


def check_ending(path: Path, where: str) -> None:
    """Raises SettingError for a name of no format that images are written in, LibraryMissing for one that needs Pillow."""
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
    """Write a PNG, JPEG or WebP file, as its name ends, with `text` as AUTOMATIC1111 keeps it there.

    `text` has the keys of `metadata.png_text`; outside PNG the parameters are the EXIF UserComment. Raises SettingError, also for
    an existing file without `overwrite`; OutOfSpace; LibraryMissing.
    """
    path = Path(path)
    kind = _format(path, "")
    data = png_from_image(pixels, text) if kind == "PNG" else _bytes_by_pillow(path, pixels, kind, text)
    write_file(path, data, overwrite=overwrite)


def _bytes_by_pillow(path: Path, pixels: Pixels, kind: str, text: Mapping[str, str]) -> bytes:
    module, out = pillow(), io.BytesIO()
    exif = module.Exif()
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"UNICODE\0" + text["parameters"].encode("utf-16-be", errors="replace")
    try:
        module.fromarray(pixels).save(out, kind, exif=exif, xmp=text[XMP].encode(), **SAVED[kind])
    except (OSError, ValueError) as error:
        raise SettingError(f"{path}: cannot be written as {kind} ({error}): write a .png") from error
    return out.getvalue()


def fitted(pixels: Pixels, size: tuple[int, int], fit: Fit) -> Pixels:
    """`pixels` at `size`, (width, height), by Lanczos as diffusers' VaeImageProcessor does it. Raises LibraryMissing.

    "resize" changes the proportions; "crop" keeps them, covers the size and cuts what stands over on both sides.
    """
    height, width = pixels.shape[:2]
    if (width, height) == size:
        return pixels
    module = pillow()
    whole, (wide, high) = size, size
    if fit == "crop":
        wider = size[0] / size[1] > width / height
        wide, high = (wide, height * wide // width) if wider else (width * high // height, high)
    image = module.fromarray(np.ascontiguousarray(pixels)).resize((wide, high), module.Resampling.LANCZOS)
    if (wide, high) != whole:
        left, top = wide // 2 - whole[0] // 2, high // 2 - whole[1] // 2
        image = image.crop((left, top, left + whole[0], top + whole[1]))
    found: Pixels = np.asarray(image)
    return found


def _file(path: Path | str) -> bytes:
    """The bytes of a regular file, no more than one over the limit: a FIFO or a device is not waited for."""
    path = Path(path)
    if not stat.S_ISREG(path.stat().st_mode):
        raise SettingError("not a regular file")
    with path.open("rb") as file:
        return file.read(MAX_FILE + 1)


def _image_from_bytes(data: bytes) -> Pixels:
    kind = next((kind for kind, magic in _MAGIC.items() if data.startswith(magic)), "")
    if len(data) > MAX_FILE:
        raise SettingError(f"over {MAX_FILE:,} bytes")
    if not kind or (kind == "WEBP" and data[8:12] != b"WEBP"):
        raise SettingError("not an image in PNG, JPEG, WebP or BMP format")
    reason = f"a {kind} file"
    if kind == "PNG":
        try:
            return image_from_png(data)
        except OtherImage as error:
            reason = f"a PNG with {error}"
    try:
        return _by_pillow(data, kind)
    except LibraryMissing as error:
        raise LibraryMissing(f"{reason}; {error}; without it a PNG of 8 bits a channel is read") from error


def _by_pillow(data: bytes, kind: str) -> Pixels:
    module = pillow()
    try:
        with module.open(io.BytesIO(data), formats=(kind,)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise SettingError(f"{image.width}x{image.height}: at most {MAX_PIXELS:,} pixels are read")
            return _rgb(image)
    except SettingError:
        raise
    except Exception as error:  # Pillow's readers raise many kinds for a damaged file
        raise SettingError(f"a {kind} file that Pillow cannot read: {error}") from error


def _rgb(image: Any) -> Pixels:
    """The pixels of a Pillow image: upright, in RGB; of 16 bits the high ones, as Pillow itself takes them of a colour PNG."""
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
