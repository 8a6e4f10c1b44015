"""Image prompts beside a UNet: the rows that a request gives it, and what its bundle cannot take."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sdruntime.bundle.manifest import ComponentSpec, EngineSpec, TensorSpec
from sdruntime.errors import SettingError
from sdruntime.pipeline.requests.image_prompt import ImagePrompt
from sdruntime.pipeline.requests.request import Request
from sdruntime.pipeline.tasks.image_prompt import ImagePrompts, clip_pixels, unused_lines

SIDE, EACH, MOST, WIDTH = 8, 2, 3, 5
SIZE, SIDES = (48, 32), (8, 12)  # (width, height) of the image, and (height, width) of its latents


def tensor(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=shape)


def spec(inputs: list[TensorSpec], outputs: list[TensorSpec], optional: list[TensorSpec]) -> ComponentSpec:
    return ComponentSpec(files=("a",), config="b", inputs=tuple(inputs), outputs=tuple(outputs), optional_inputs=tuple(optional))


UNET = spec(
    [tensor("sample", "batch", 4, "height", "width")],
    [tensor("out_sample", "batch", 4, "height", "width")],
    [
        tensor("image_tokens", "batch", EACH * MOST, WIDTH),
        tensor("image_bias", "batch", EACH * MOST),
        tensor("image_scale", "batch"),
        tensor("image_masked", "batch"),
        tensor("image_mask_1", "batch", "height", "width", MOST),
        tensor("image_mask_4", "batch", "height/4", "width/4", MOST),
    ],
)
ENCODER = spec(
    [tensor("pixel_values", "batch", 3, SIDE, SIDE), tensor("presence", "batch")],
    [tensor("image_tokens", "batch", EACH, WIDTH)],
    [],
)
COMPONENTS = {"unet": UNET, "image_encoder": ENCODER}


class Encoder:
    """An image encoder whose tokens are the sum of the pixels, or -1 for no image."""

    def __init__(self) -> None:
        self.component, self.calls = ENCODER, []  # type: tuple[ComponentSpec, list[int]]
        shape = {"batch": (1, 8, 8)}
        self.spec = EngineSpec(
            component="image_encoder",
            backend="fake",
            version="1",
            target="cpu",
            precision="fp32",
            files=("engines/e",),
            profiles=(shape,),
        )

    def __call__(self, feeds: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        present = feeds["presence"]
        self.calls.append(len(present))
        sums = np.where(present == 1, feeds["pixel_values"].sum(axis=(1, 2, 3)), -1)
        return {"image_tokens": np.broadcast_to(sums[:, None, None], (len(sums), EACH, WIDTH)).astype(np.float32)}


def image(value: int) -> NDArray[np.uint8]:
    return np.full((10, 12, 3), value, np.uint8)


def request(*values: int, scale: float = 0.5) -> Request:
    return Request(prompt="", image_prompt=ImagePrompt(image=[image(value) for value in values], scale=scale))


def test_the_rows_hold_the_tokens_of_the_images_and_of_none() -> None:
    prompts, encoder = ImagePrompts(COMPONENTS, Path()), Encoder()
    one, other = prompts.rows(request(10, 200), SIZE, SIDES, lambda name, **_: encoder)  # type: ignore[arg-type, return-value]
    assert encoder.calls == [3]  # both images, and none
    sums = [clip_pixels(image(value), SIDE).sum() for value in (10, 200)]
    np.testing.assert_allclose(one["image_tokens"][:, 0], [sums[0], sums[0], sums[1], sums[1], 0, 0], rtol=1e-5)
    assert other["image_tokens"][:, 0].tolist() == [-1, -1, -1, -1, 0, 0]
    for row in (one, other):
        assert row["image_bias"].tolist() == [0, 0, 0, 0, -10_000, -10_000]
        assert row["image_scale"] == np.float32(0.5)
    prompts.rows(request(200, 7, 7), SIZE, SIDES, lambda name, **_: encoder)  # type: ignore[arg-type, return-value]
    assert encoder.calls == [3, 1]  # the others are kept
    prompts.forget()
    prompts.rows(request(200), SIZE, SIDES, lambda name, **_: encoder)  # type: ignore[arg-type, return-value]
    assert encoder.calls == [3, 1, 2]


def test_masks_are_resized_for_each_size_of_the_layers() -> None:
    prompts, encoder = ImagePrompts(COMPONENTS, Path()), Encoder()
    left = np.zeros((6, 6), np.uint8)
    left[:, :3] = 255
    masked = Request(
        prompt="", image_prompt=ImagePrompt(image=[image(10), image(200)], mask=[left, np.full((2, 2), 127, np.uint8)])
    )
    one, other = prompts.rows(masked, SIZE, SIDES, lambda name, **_: encoder)  # type: ignore[arg-type, return-value]
    for row in (one, other):
        assert row["image_masked"] == 1
        assert {name: array.shape for name, array in row.items() if name.startswith("image_mask_")} == {
            "image_mask_1": (8, 12, 3),
            "image_mask_4": (2, 3, 3),
        }
        np.testing.assert_allclose(row["image_mask_1"][..., 0], np.repeat([[1, 0]], 6, axis=1).repeat(8, axis=0), atol=1e-6)
        assert not row["image_mask_1"][..., 1:].any()  # less than half is nothing
        # in the middle of three columns, the edge: torch's bicubic, without antialiasing
        np.testing.assert_allclose(row["image_mask_4"][..., 0], [[1, 0.5, 0]] * 2, atol=1e-6)
    assert encoder.calls == [3]


def test_without_images_and_at_scale_0_the_rows_stay_as_they_are() -> None:
    prompts = ImagePrompts(COMPONENTS, Path())
    for given in (Request(prompt=""), request(10, scale=0)):
        assert prompts.rows(given, SIZE, SIDES, lambda name, **_: pytest.fail("an engine is called")) == ({}, {})
    assert list(unused_lines(request(10, scale=0), refines=False)) == ["image_prompt has no effect at scale 0"]
    assert list(unused_lines(request(10), refines=True)) == ["image_prompt has no effect on the steps of the refiner"]
    assert list(unused_lines(request(10), refines=False)) == []


def test_what_the_bundle_cannot_take_is_refused() -> None:
    ImagePrompts(COMPONENTS, Path()).check(request(1, 2, 3))
    with pytest.raises(SettingError, match="got 4 images; this bundle's IP-Adapter takes at most 3"):
        ImagePrompts(COMPONENTS, Path()).check(request(1, 2, 3, 4))
    plain = ImagePrompts({"unet": spec(list(UNET.inputs), list(UNET.outputs), [])}, Path())
    plain.check(Request(prompt=""))
    with pytest.raises(SettingError, match="no IP-Adapter: export it again with --ip-adapter FILE"):
        plain.check(request(1))
