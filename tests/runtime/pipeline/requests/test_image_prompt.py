"""The images of a request for an IP-Adapter: their settings, the metadata, and what the command line reads."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from sdruntime.cli.commands.generate import image_prompt_of
from sdruntime.errors import SettingError
from sdruntime.pipeline.requests.image_prompt import MOST_IMAGES, ImagePrompt
from sdruntime.pipeline.requests.request import Request, requests_from

IMAGE, MASK = np.zeros((4, 6, 3), np.uint8), np.zeros((2, 3), np.uint8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": -1}, "image_prompt: scale -1 is outside 0 to 10"),
        ({"scale": float("nan")}, "image_prompt: scale nan is outside"),
        ({"scale": float("inf")}, "image_prompt: scale inf is outside"),
        ({"scale": "1"}, "image_prompt: scale '1': expected a number"),
        ({"image": "missing.png"}, "image_prompt: missing.png: cannot be read"),
        ({"image": []}, f"image_prompt: got 0 images; expected 1 to {MOST_IMAGES}"),
        ({"mask": [MASK, MASK]}, "image_prompt: got 2 masks for 1 images; expected one for each, or none"),
        ({"mask": []}, "image_prompt: got 0 masks for 1 images"),
        ({"mask": "missing.png"}, "image_prompt: mask: missing.png: cannot be read"),
        ({"mask": np.zeros((4, 6), np.float32)}, "image_prompt: mask: expected uint8"),
        ({"image": [IMAGE, np.zeros((4, 6), np.uint8)]}, r"image_prompt: expected uint8 \[height, width, 3\]"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        ImagePrompt(**{"image": IMAGE, **settings})


def test_it_takes_one_image_or_several() -> None:
    assert repr(ImagePrompt(image=IMAGE, scale=0.5)) == "<ImagePrompt 6x4, scale 0.5>"
    assert [image.shape for image in ImagePrompt(image=[IMAGE, IMAGE[:2]]).images] == [(4, 6, 3), (2, 6, 3)]
    prompt = ImagePrompt(image=[IMAGE, IMAGE], mask=[MASK, IMAGE])
    assert repr(prompt) == "<ImagePrompt 6x4, 6x4, masked, scale 1>"
    assert [mask.shape for mask in prompt.masks] == [(2, 3), (4, 6)]
    for same in (prompt, ImagePrompt(image=IMAGE)):
        changed = dataclasses.replace(same, scale=0.25)
        assert (changed.scale, len(changed.images), len(changed.masks)) == (0.25, len(same.images), len(same.masks))
    with pytest.raises(SettingError, match=r"image_prompt 'style.png': expected ImagePrompt\(image=…\)"):
        Request(prompt="", image_prompt="style.png")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=r"'ip_adapter_image': write image_prompt=ImagePrompt\(image=…\)"):
        requests_from("", ip_adapter_image=IMAGE)


def test_the_command_line_needs_an_image_for_a_scale() -> None:
    assert image_prompt_of([], [], None) is None
    with pytest.raises(SettingError, match=r"--image-prompt-scale 0.5 has no effect without --image-prompt"):
        image_prompt_of([], [], 0.5)
    with pytest.raises(SettingError, match=r"--image-prompt-mask m.png has no effect without --image-prompt"):
        image_prompt_of([], ["m.png"], None)
