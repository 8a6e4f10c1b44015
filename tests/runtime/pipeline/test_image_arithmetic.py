"""Resizing, blurring and composing images: the bytes of Pillow and diffusers, and a Gaussian blur computed another way."""

from __future__ import annotations

import numpy as np
import pytest

from sdruntime.errors import SettingError
from sdruntime.pipeline.images.blur import boxes, gaussian
from sdruntime.pipeline.images.compose import filled, overlaid
from sdruntime.pipeline.images.resampling import Box, Kernel, covering, inside, resample
from sdruntime.pipeline.tasks.canvas import crop_box

pytest.importorskip("PIL.Image", reason="the reference")
import PIL.Image
import PIL.ImageChops
import PIL.ImageFilter


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Random pixels, with flat parts of 0 and 255, where sums leave the range."""
    numbers = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    numbers[: shape[0] // 3, : shape[1] // 2] = 255
    numbers[: shape[0] // 4, : shape[1] // 4] = 0
    return numbers


@pytest.mark.parametrize("kernel", ["lanczos", "bicubic", "nearest"])
@pytest.mark.parametrize("size", [(97, 41), (31, 200), (64, 48), (7, 5), (1, 1), (640, 480)])
@pytest.mark.parametrize("shape", [(48, 64, 3), (33, 65), (1, 3, 3)])
def test_resized_images_are_those_of_pillow(kernel: Kernel, size: tuple[int, int], shape: tuple[int, ...]) -> None:
    pixels = noise(*shape)
    how = PIL.Image.Resampling[kernel.upper()]
    expected = PIL.Image.fromarray(pixels).resize((size[0], shape[0]), how).resize(size, how)
    np.testing.assert_array_equal(resample(pixels, size, kernel), np.asarray(expected))


@pytest.mark.parametrize("box", [(3, 5, 40, 20), (0, 0, 64, 0), (0, 48, 64, 48), (0, 0, 0, 48), (64, 0, 64, 48)])
def test_a_box_is_resized_too_and_may_be_a_line(box: Box) -> None:
    pixels = noise(48, 64, 3)
    expected = PIL.Image.fromarray(pixels).resize((50, 30), PIL.Image.Resampling.BICUBIC, box=box)
    np.testing.assert_array_equal(resample(pixels, (50, 30), "bicubic", box), np.asarray(expected))


@pytest.mark.parametrize("size", [(64, 64), (80, 40), (40, 90), (61, 64), (64, 33), (96, 64)])
def test_an_image_inside_a_size_or_covering_it_is_that_of_diffusers(size: tuple[int, int]) -> None:
    processor = pytest.importorskip("diffusers.image_processor").VaeImageProcessor()
    image = noise(48, 72, 3)
    width, height = size
    for resized, mode in ((inside(image, size), "fill"), (covering(image, size), "crop")):
        expected = processor.resize(PIL.Image.fromarray(image), height, width, resize_mode=mode)
        np.testing.assert_array_equal(resized, np.asarray(expected))


@pytest.mark.parametrize("radius", [0, 0.3, 1, 2, 4, 16, 64, 256])
@pytest.mark.parametrize("shape", [(40, 70, 4), (5, 3, 4)])
def test_boxes_blur_as_pillow_does(radius: float, shape: tuple[int, ...]) -> None:
    pixels = noise(*shape)
    expected = PIL.Image.fromarray(pixels, "RGBa").filter(PIL.ImageFilter.GaussianBlur(radius))
    np.testing.assert_array_equal(boxes(pixels, radius), np.asarray(expected))


def masked_by_pillow(image: np.ndarray, mask: np.ndarray) -> PIL.Image.Image:
    kept = PIL.Image.new("RGBa", (image.shape[1], image.shape[0]))
    opacity = PIL.ImageChops.invert(PIL.Image.fromarray(mask))
    kept.paste(PIL.Image.fromarray(image).convert("RGBA").convert("RGBa"), mask=opacity)
    return kept


def soft_mask(height: int, width: int) -> np.ndarray:
    columns = np.arange(width)[None] + 0.5 * np.arange(height)[:, None]
    return np.clip(400 * columns / width - 100, 0, 255).astype(np.uint8)


def test_an_overlay_is_composed_as_pillow_does() -> None:
    original, image, mask = noise(48, 64, 3), noise(48, 64, 3, seed=1), soft_mask(48, 64)
    expected = PIL.Image.fromarray(image).convert("RGBA")
    expected.alpha_composite(masked_by_pillow(original, mask).convert("RGBA"))
    found = overlaid(original, image, mask)
    np.testing.assert_array_equal(found, np.asarray(expected.convert("RGB")))
    np.testing.assert_array_equal(found[mask == 0], original[mask == 0])
    np.testing.assert_array_equal(found[mask == 255], image[mask == 255])


def test_the_web_ui_s_fill_keeps_the_rest_and_spreads_its_colours() -> None:
    """Reference: the same blurs, put over each other by Pillow."""
    image, mask = noise(80, 96, 3), soft_mask(80, 96)
    kept, expected = masked_by_pillow(image, mask), PIL.Image.new("RGBA", (96, 80))
    for radius in (256, 64, 16, 16, 4, 4, 4, 4, 2, 2, 0):
        expected.alpha_composite(kept.filter(PIL.ImageFilter.GaussianBlur(radius)).convert("RGBA"))
    found = filled(image, mask)
    np.testing.assert_array_equal(found, np.asarray(expected.convert("RGB")))
    np.testing.assert_array_equal(found[mask == 0], image[mask == 0])
    red = np.zeros((64, 64, 3), np.uint8)
    red[:, :32, 0] = 200
    right = np.zeros((64, 64), np.uint8)
    right[:, 32:] = 255
    assert np.abs(filled(red, right).astype(int) - [200, 0, 0]).max() <= 5, "one colour around: that colour, up to rounding"


@pytest.mark.parametrize("deviation", [0.5, 1, 4, 7.5, 32])
def test_a_mask_is_blurred_by_a_gaussian(deviation: float) -> None:
    """Reference: each pixel as the sum of the whole plane's products, in one go; the two passes round twice."""
    mask = noise(40, 70)
    reach = int(2.5 * deviation + 0.5)
    line = np.array([np.exp(-k * k / (2 * deviation**2)) for k in range(-reach, reach + 1)])
    expected = np.zeros(mask.shape)

    def mirrored(place: int, length: int) -> int:
        place %= 2 * (length - 1)
        return min(place, 2 * (length - 1) - place)

    rows = [[mirrored(y + k, 40) for k in range(-reach, reach + 1)] for y in range(40)]
    columns = [[mirrored(x + k, 70) for k in range(-reach, reach + 1)] for x in range(70)]
    for y in range(40):
        weighted = line @ mask[rows[y]].astype(float)
        expected[y] = [line @ weighted[columns[x]] for x in range(70)]
    expected /= line.sum() ** 2
    assert np.abs(gaussian(mask, deviation) - expected).max() <= 1.01
    step = np.zeros((9, 200), np.uint8)
    step[:, 100:] = 255
    blurred = gaussian(step, deviation)
    assert (np.diff(blurred[4].astype(int)) >= 0).all()
    assert ((blurred[4] > 0) & (blurred[4] < 255)).sum() <= 2 * reach, "the kernel is cut at 2.5 deviations"


def test_no_blur_changes_nothing() -> None:
    mask = noise(5, 6)
    assert gaussian(mask, 0) is mask


def test_the_masked_part_has_the_box_of_diffusers() -> None:
    processor = pytest.importorskip("diffusers.image_processor").VaeImageProcessor
    random = np.random.default_rng(0)
    for _ in range(200):
        width, height, across, down, padding = random.integers(1, 100, 5).tolist()
        mask = np.zeros((height, width), np.uint8)
        left, top = int(random.integers(width)), int(random.integers(height))
        mask[top : top + int(random.integers(1, 50)), left : left + int(random.integers(1, 50))] = 9
        expected = processor.get_crop_region(PIL.Image.fromarray(mask), across, down, pad=padding)
        assert crop_box(mask, (across, down), padding) == expected


def test_an_empty_mask_has_no_box() -> None:
    with pytest.raises(SettingError, match="mask: it is black everywhere, so that there is nothing to generate"):
        crop_box(np.zeros((4, 5), np.uint8), (64, 64), 3)
