"""The images of a job follow each other in the blob of its message."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sdruntime.bundle.limits import LARGEST_SIDE
from sdruntime.errors import SettingError
from sdruntime.serving.blob import bytes_of, images_of
from sdruntime.serving.message import Submit, message_from_json


def submit(**fields: Any) -> Submit:
    message = message_from_json({"op": "submit", "job": 1, "request": {"prompt": "a cat", "seed": 3}, **fields})
    assert isinstance(message, Submit)
    return message


CONTROLS = [
    {"size": [4, 2], "net": "controlnet_edges", "scale": 0.5, "start": 0.1, "end": 0.9, "fit": "crop"},
    {"size": [3, 5], "preprocess": "canny", "low": 50, "high": 150},
]


def test_every_image_is_found_and_named() -> None:
    message = submit(image=[8, 6], mask=True, depth=[2, 3], controls=CONTROLS)
    sizes = [8 * 6 * 3, 8 * 6, 2 * 3, 4 * 2 * 3, 3 * 5 * 3]
    assert bytes_of(message) == sum(sizes)
    blob = bytes(value for value, size in enumerate(sizes, start=1) for _ in range(size))
    images = images_of(message, blob, len(blob))
    assert images.image is not None
    assert images.mask is not None
    assert images.depth is not None
    arrays = [images.image, images.mask, images.depth, *images.controls]
    assert [array.shape for array in arrays] == [(6, 8, 3), (6, 8), (3, 2), (2, 4, 3), (5, 3, 3)]
    assert [np.unique(array).tolist() for array in arrays] == [[1], [2], [3], [4], [5]]


def test_controls_are_those_of_the_request() -> None:
    message = submit(controls=CONTROLS)
    blob = bytes(bytes_of(message))
    request = message.request.request(images_of(message, blob, len(blob)), message.controls)
    first, second = request.controls
    assert (first.net, first.scale, first.start, first.end, first.fit) == ("controlnet_edges", 0.5, 0.1, 0.9, "crop")
    assert (second.net, second.scale, second.start, second.end, second.fit) == (None, 1.0, 0.0, 1.0, "resize")
    assert (second.preprocess, second.low, second.high) == ("canny", 50, 150)
    assert [control.pixels.shape for control in request.controls] == [(2, 4, 3), (5, 3, 3)]


def test_the_images_of_an_image_prompt_end_the_blob() -> None:
    message = submit(controls=CONTROLS, image_prompt=[[2, 3], [1, 4]])
    blob = bytes(bytes_of(message) - 2 * 3 * 3 - 4 * 3) + bytes([7] * 18) + bytes([9] * 12)
    request = message.request.request(images_of(message, blob, len(blob)), message.controls)
    assert request.image_prompt is not None
    assert [(image.shape, np.unique(image).tolist()) for image in request.image_prompt.images] == [
        ((3, 2, 3), [7]),
        ((4, 1, 3), [9]),
    ]
    assert request.image_prompt.scale == 1
    scaled = submit(image_prompt=[[1, 1]], request={"prompt": "", "image_prompt_scale": 0.5})
    prompt = scaled.request.request(images_of(scaled, bytes(3), 3)).image_prompt
    assert prompt is not None
    assert prompt.scale == 0.5
    masked = submit(image_prompt=[[1, 1], [1, 1]], image_prompt_mask=[[2, 1], [1, 3]])
    blob = bytes(6) + bytes([1, 2, 3, 4, 5])
    assert bytes_of(masked) == len(blob)
    prompt = masked.request.request(images_of(masked, blob, len(blob))).image_prompt
    assert prompt is not None
    assert [mask.tolist() for mask in prompt.masks] == [[[1, 2]], [[3], [4], [5]]]
    alone = submit(image_prompt_mask=[[1, 1]])
    with pytest.raises(SettingError, match="image_prompt_mask has no effect without an image_prompt"):
        alone.request.request(images_of(alone, bytes(1), 1))
    with pytest.raises(SettingError, match=r"image_prompt_scale 0.5 has no effect without an image_prompt"):
        scaled.request.request(images_of(submit(), None, 0))


def test_a_blob_of_another_size_is_refused() -> None:
    with pytest.raises(SettingError, match="control 4x2: expected 69 bytes of a control image of 4x2 and a control image of 3x5"):
        images_of(submit(controls=CONTROLS), b"", 0)
    with pytest.raises(SettingError, match="control 0x2: expected its width and height"):
        images_of(submit(controls=[{"size": [0, 2]}]), b"", 0)
    with pytest.raises(SettingError, match=r"controls\[0\]"):
        submit(controls=[{"size": [1]}])


def test_no_larger_blob_is_read_than_that_of_one_image() -> None:
    largest = {"size": [LARGEST_SIDE, LARGEST_SIDE]}
    assert bytes_of(submit(controls=[largest])) == 3 * LARGEST_SIDE**2
    assert bytes_of(submit(controls=[largest, largest])) == 0
    assert bytes_of(submit(controls=[{"size": [LARGEST_SIDE + 1, 1]}])) == 0
