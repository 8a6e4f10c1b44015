"""Where `generate` writes: a file, a folder, a pattern of names or standard output; and how images form a sheet.

Every path is checked to be writable before anything is generated.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
import string
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sdruntime.cli.terminal import check_output
from sdruntime.errors import SettingError, UnknownName
from sdruntime.pipeline.images.imagefile import check_ending
from sdruntime.pipeline.requests.request import Request
from sdruntime.pipeline.result import Image

STDOUT = Path("-")
OPTION = "--output"
FIELDS = ("seed", "index", "prompt")
IN_FOLDER = "{seed}.png"
LARGEST_SHEET = 400  # images
_NAME_OF_PROMPT = 60  # characters


def paths(output: str, requests: Sequence[Request], *, overwrite: bool) -> list[Path]:
    """Return the path of each request's image.

    In a folder, images are named SEED.png. A name may have the fields {seed}, {index} (from 0) and {prompt} (its letters and
    digits, shortened), with a format: {index:03}. Several images of a name without fields become NAME-SEED. "-" is standard
    output, for one image. Raises SettingError for a file that cannot be written, that two images would share, or that exists
    without `overwrite`; LibraryMissing for a format whose library is missing.
    """
    if output == str(STDOUT):
        if len(requests) > 1:
            raise SettingError(
                f"{OPTION} -: one image goes to standard output, not {len(requests)}: add --grid, or name a folder"
            )
        return [STDOUT]
    if output.endswith("/") or Path(output).is_dir():
        output = str(Path(output, IN_FOLDER))
    elif "{" not in output and len(requests) > 1:
        path = Path(output)
        output = str(path.with_name(f"{path.stem}-{{seed}}{path.suffix}"))
    files = [Path(_filled(output, index, request) if "{" in output else output) for index, request in enumerate(requests)]
    check_ending(files[0], OPTION)
    for path in files:
        check_output(path, OPTION)
        if path.exists() and not overwrite:
            raise SettingError(f"{OPTION} {path}: this file exists: add --overwrite to replace it, or choose another name")
    path, count = collections.Counter(files).most_common(1)[0]
    if count > 1:
        raise SettingError(f"{OPTION} {output}: {count} images would be {path}: add {{seed}} or {{index}} to the name")
    return files


def _filled(pattern: str, index: int, request: Request) -> str:
    """Return the name of a request's image. Raises SettingError."""
    prompt = re.sub(r"[\W_]+", "-", request.prompt)[:_NAME_OF_PROMPT].strip("-") or "image"
    values = {"seed": request.seed, "index": index, "prompt": prompt}
    try:
        for _, field, _, _ in string.Formatter().parse(pattern):
            if field is not None and field not in FIELDS:
                raise UnknownName(f"field of {OPTION} {pattern}", field, FIELDS)
        return pattern.format_map(values)
    except UnknownName:
        raise
    except ValueError as error:
        raise SettingError(
            f"{OPTION} {pattern}: {error}; fields are written as {{seed}} or {{index:03}}, braces as {{{{ }}}}"
        ) from None


def check_sheet(count: int) -> None:
    """Check that so many images fit on a sheet. Raises SettingError."""
    if count > LARGEST_SHEET:
        raise SettingError(f"--grid of {count} images: at most {LARGEST_SHEET} are put side by side")


def sheet(images: Sequence[Image]) -> Image:
    """Return one image that shows images of one size in rows, as square as possible, with the settings of the first."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    height, width, channels = images[0].shape
    pixels = np.zeros((rows * height, columns * width, channels), np.uint8)
    for place, image in enumerate(images):
        top, left = place // columns * height, place % columns * width
        pixels[top : top + height, left : left + width] = image.pixels
    request = dataclasses.replace(images[0].request, size=(width, height))
    return dataclasses.replace(images[0], pixels=pixels, request=request)
