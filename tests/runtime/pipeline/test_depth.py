"""Depth maps are resized and scaled as diffusers does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdruntime.errors import SettingError
from sdruntime.pipeline.images.depth import depth_from, normalized
from sdruntime.pipeline.requests.request import Request

IMAGE = np.zeros((4, 6, 3), np.uint8)


@pytest.mark.parametrize(("before", "after"), [((29, 43), (8, 12)), ((5, 4), (16, 24)), ((8, 8), (8, 8)), ((1, 2), (4, 4))])
def test_a_depth_map_is_that_of_diffusers(before: tuple[int, int], after: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch")
    depth = np.random.default_rng(0).normal(9, 30, before).astype(np.float32)
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(depth)[None, None], size=after, mode="bicubic", align_corners=False
    )
    low, high = resized.amin(), resized.amax()
    expected = (2.0 * (resized - low) / (high - low) - 1.0)[0, 0].numpy()
    found = normalized(depth_from(depth), *after)
    assert found.dtype == np.float32
    assert (found.min(), found.max()) == (-1, 1)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_an_array_or_an_image_is_a_depth_map() -> None:
    numbers = np.arange(24).reshape(4, 6)
    for given in (numbers, numbers.astype(np.float64), numbers.astype(np.uint16)):
        request = Request(prompt="", image=IMAGE, depth=given)
        assert request.depth_map is not None
        assert request.depth_map.dtype == np.float32
        assert np.array_equal(request.depth_map, numbers)
        assert repr(request) == "<Request '', seed 0, image 6x4, depth 6x4>"
    gray = np.repeat(numbers.astype(np.uint8)[..., None], 3, axis=-1)
    assert np.array_equal(depth_from(gray), numbers)


@pytest.mark.parametrize(
    ("depth", "more", "message"),
    [
        (np.array([[1.0, np.nan]]), {}, "depth: some of its numbers are NaN or infinite"),
        (np.array([[1.0, 1e300]]), {}, "depth: some of its numbers are NaN or infinite"),
        (np.zeros((0, 4)), {}, "depth: it is 4x0; a side has 1 to 16,384 numbers"),
        (np.zeros((2, 2, 2)), {}, r"depth: expected uint8 \[height, width, 3\], got float64 \[2, 2, 2\]"),
        (3, {}, "depth: expected a path, an array or a Pillow image, got int"),
        (Path("no such"), {}, "depth: "),
        (np.eye(4), {"fit": "crop"}, "fit 'crop' with depth: only the image would be cropped"),
    ],
)
def test_other_values_are_refused(depth: Any, more: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Request(prompt="", image=IMAGE, depth=depth, **more)


def test_a_depth_map_belongs_to_an_image() -> None:
    with pytest.raises(SettingError, match=r"depth: it is that of an image: pass the image too, as image=… \(--image\)"):
        Request(prompt="", depth=np.eye(4))


def test_a_flat_depth_map_is_refused() -> None:
    with pytest.raises(SettingError, match="depth: it is 3 everywhere: the model needs near and far"):
        normalized(depth_from(np.full((9, 9), 3)), 4, 4)
