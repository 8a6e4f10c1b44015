"""Maps for ControlNets: edges as OpenCV finds them, gray, a grid of colours, and the negative."""

from __future__ import annotations

import numpy as np

from sdruntime.pipeline.images.maps import canny, color, gray, invert, marked

# cv2.Canny(image, 100, 200) of OpenCV 5.0, a bit for each pixel
EDGES = (
    "0000000000000000000000ff00001000000f80c000307f1f0060f0e000c71a18018c3cc70130c5380261184002466421"
    "0288c4880193042001164481012484240bc90cd102da190c02f030b214bfe12d04a00240054204800554282b04554aaa"
)


def test_canny_is_that_of_opencv() -> None:
    rows, columns = np.mgrid[:24, :32]
    disc = np.where((rows - 12) ** 2 + (columns - 14) ** 2 < 60, 200, 30)
    image = np.stack([disc, columns * 8, (rows * columns) % 97 * 2], axis=2).astype(np.uint8)
    edges = canny(image)
    assert edges.shape == image.shape
    assert np.packbits(edges[..., 1] == 255).tobytes().hex() == EDGES
    assert set(np.unique(edges)) == {0, 255}


def test_a_flat_image_and_a_single_pixel_have_no_edges() -> None:
    for shape in ((1, 1, 3), (1, 9, 3), (40, 30, 3)):
        assert not canny(np.full(shape, 77, np.uint8)).any()


def test_weak_edges_count_beside_strong_ones_only() -> None:
    image = np.zeros((40, 60, 3), np.uint8)
    image[:, 20:] = 35  # a gradient of 140
    assert not canny(image).any()
    image[20:, 20:] = np.linspace(35, 70, 20, dtype=np.uint8)[:, None, None]  # up to 280
    assert canny(image)[:, 18:22, 0].any(axis=1).all()


def test_thresholds_decide_which_edges_count() -> None:
    image = np.zeros((40, 60, 3), np.uint8)
    image[:, 20:] = 35  # a gradient of 140
    assert canny(image, 100, 139).any()
    assert not canny(image, 100, 140).any()
    assert not canny(image, 140, 140).any()


def test_a_mask_marks_pixels_with_minus_one() -> None:
    image = np.full((3, 2, 2), 0.25, np.float32)
    pixels = marked(image, np.array([[0, 127], [128, 255]], np.uint8))
    assert pixels.dtype == np.float32
    assert pixels.tolist() == [[[0.25, 0.25], [-1, -1]]] * 3


def test_gray_weighs_the_colours() -> None:
    image = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
    assert gray(image)[0, :, 0].tolist() == [76, 150, 29]
    assert (gray(image)[..., 0] == gray(image)[..., 2]).all()


def test_the_grid_has_the_mean_of_each_cell() -> None:
    image = np.zeros((70, 130, 3), np.uint8)
    image[:64, :32], image[64:, 128:] = 200, 9
    grid = color(image)
    assert grid.shape == image.shape
    assert [int(grid[row, column, 0]) for row, column in ((0, 0), (63, 63), (0, 64), (69, 129), (69, 127))] == [100, 100, 0, 9, 0]


def test_the_negative() -> None:
    assert invert(np.array([[[0, 128, 255]]], np.uint8)).tolist() == [[[255, 127, 0]]]
