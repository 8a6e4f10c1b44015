"""One contact sheet: pictures under their captions. python sheet.py BUNDLE -o sheet.png draws a dozen held-out captions."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import draw
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

SCALE = 3
COLUMNS = 4
MARGIN = 12
LINE = 15  # pixels a line of caption
PAPER, TEXT = (255, 255, 255), (40, 40, 40)


def sheet(pictures: list[NDArray[np.uint8]], captions: list[str], columns: int = COLUMNS) -> Image.Image:
    """The pictures (uint8 [H, W, 3], all of one size) three times as large, each under its caption, in rows of `columns`."""
    if not pictures or len(pictures) != len(captions):
        raise ValueError(f"{len(pictures)} pictures and {len(captions)} captions: give one caption a picture, and at least one")
    font = ImageFont.load_default(12)
    height, width = (SCALE * side for side in pictures[0].shape[:2])
    lines = [textwrap.wrap(caption, max(12, width // 6)) for caption in captions]
    head = LINE * max(len(wrapped) for wrapped in lines) + 4
    rows = -(-len(pictures) // columns)
    size = (MARGIN + columns * (width + MARGIN), MARGIN + rows * (head + height + MARGIN))
    page = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(page)
    for number, (picture, wrapped) in enumerate(zip(pictures, lines, strict=True)):
        left = MARGIN + number % columns * (width + MARGIN)
        top = MARGIN + number // columns * (head + height + MARGIN)
        for row, line in enumerate(wrapped):
            pen.text((left, top + head - 4 - LINE * (len(wrapped) - row)), line, fill=TEXT, font=font)
        page.paste(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC), (left, top + head))
        pen.rectangle((left - 1, top + head - 1, left + width, top + head + height), outline=(200, 200, 200))
    return page


def main() -> None:
    from sdruntime.pipeline.pipeline import Pipeline

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the PNG to write")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.0)
    given = parser.parse_args()
    captions = [scene.caption for scene in draw.split()[1][:12]]
    with Pipeline.open(given.bundle) as pipe:
        result = pipe(captions, seed=given.seed, steps=given.steps, guidance=given.guidance)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    sheet(list(result.pixels), captions).save(given.output)
    print(given.output)


if __name__ == "__main__":
    main()
