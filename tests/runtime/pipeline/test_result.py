"""result.py: an image is its pixels and how they were made; NumPy takes it, and it saves itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sdruntime.pipeline.images.imagefile import read_image
from sdruntime.pipeline.metadata.write import Origin
from sdruntime.pipeline.requests.request import Request
from sdruntime.pipeline.result import Image, Result

pytest.importorskip("PIL.Image", reason="Pillow reads and writes the other formats")
import PIL.Image

ORIGIN = Origin(model="shapes", sampler="DDIM")


def image(seed: int = 7, prompt: str = "a red fox in snow") -> Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image(pixels=pixels, request=Request(prompt=prompt, seed=seed), sampler="ddim", origin=ORIGIN)


def test_numpy_takes_an_image_as_it_is() -> None:
    made = image()
    np.testing.assert_array_equal(made, made.pixels)
    assert np.shares_memory(np.asarray(made), made.pixels)
    assert np.asarray(made, np.float32).dtype == np.float32
    copy = np.array(made)
    copy[:] = 0
    assert made.pixels.any()
    assert (made.shape, made.size, made.seed) == ((4, 6, 3), (6, 4), 7)


def test_an_image_saves_itself_with_its_settings(tmp_path: Path) -> None:
    made = image()
    for path in (tmp_path / "fox.png", str(tmp_path / "fox.png")):
        made.save(path)
        np.testing.assert_array_equal(read_image(path), made.pixels)
    with PIL.Image.open(tmp_path / "fox.png") as seen:
        assert seen.info["parameters"].startswith("a red fox in snow\nSteps: 20")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("a red fox in snow", "'a red fox in snow'"),
        ("x" * 70_000, f"'{'x' * 37}…'"),
        ("two\nlines", "'two\\nlines'"),
    ],
)
def test_a_repr_is_one_short_line(prompt: str, shown: str) -> None:
    made = image(prompt=prompt)
    assert repr(made) == f"<Image 6x4, seed 7, {shown}>"
    assert repr(Result(images=(made, image(8)))) == "<Result of 2 images, seeds 7, 8>"
    assert repr(Result(images=(made,))) == "<Result of 1 image, seed 7>"
    assert len(repr(Result(images=(made,) * 1000))) < 80
