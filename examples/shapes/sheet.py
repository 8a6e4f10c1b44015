"""Generate a contact sheet of images under their captions, a dozen held-out ones: python sheet.py BUNDLE -o sheet.png"""

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
LINE = 15  # pixels per line of a caption
PAPER, TEXT = (255, 255, 255), (40, 40, 40)


def sheet(images: list[NDArray[np.uint8]], captions: list[str], columns: int = COLUMNS) -> Image.Image:
    """Return a page of the images (uint8 [H, W, 3], all of one size) enlarged three times, each under its caption.

    Raises ValueError unless there are as many captions as images, and at least one.
    """
    if not images or len(images) != len(captions):
        raise ValueError(f"{len(images)} images and {len(captions)} captions: give one caption per image, and at least one image")
    font = ImageFont.load_default(12)
    height, width = (SCALE * side for side in images[0].shape[:2])
    lines = [textwrap.wrap(caption, max(12, width // 6)) for caption in captions]
    head = LINE * max(len(wrapped) for wrapped in lines) + 4
    rows = -(-len(images) // columns)
    size = (MARGIN + columns * (width + MARGIN), MARGIN + rows * (head + height + MARGIN))
    page = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(page)
    for number, (image, wrapped) in enumerate(zip(images, lines, strict=True)):
        left = MARGIN + number % columns * (width + MARGIN)
        top = MARGIN + number // columns * (head + height + MARGIN)
        for row, line in enumerate(wrapped):
            pen.text((left, top + head - 4 - LINE * (len(wrapped) - row)), line, fill=TEXT, font=font)
        page.paste(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC), (left, top + head))
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
    options = parser.parse_args()
    captions = [scene.caption for scene in draw.split()[1][:12]]
    with Pipeline.open(options.bundle) as pipe:
        result = pipe(captions, seed=options.seed, steps=options.steps, guidance=options.guidance)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    sheet(list(result.pixels), captions).save(options.output)
    print(options.output)


if __name__ == "__main__":
    main()
