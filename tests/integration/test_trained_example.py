"""What the trained example generates, measured by its own reader: inpainting, outpainting, two passes, prompt editing."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from places import SHAPES

from sdruntime import Pipeline, Request


@pytest.fixture(scope="module", autouse=True)
def readable() -> None:
    pytest.importorskip("transformers", minversion="5", reason="the example has names that transformers 4 misreads")


@pytest.fixture(scope="module")
def draw() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SHAPES))
        return importlib.import_module("draw")


@pytest.fixture(scope="module")
def read(draw: ModuleType) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SHAPES))
        return importlib.import_module("read")


def test_inpainting_repaints_one_half_and_keeps_the_other(shapes_bundle: Path, draw: Any, read: Any) -> None:
    """Each half is read on its own. The model has never seen two shapes in one image."""
    mask = np.zeros((draw.SIZE, draw.SIZE), bool)
    mask[:, : draw.SIZE // 2] = True
    grounds = ("white", "black")
    scenes = [draw.draw(draw.Scene("circle", "red", "small", "right", ground), np.random.default_rng(0)) for ground in grounds]
    requests = [
        Request(
            prompt=f"a small red square on the left on a {ground} background",
            seed=seed,
            guidance=2.0,
            image=np.clip(np.rint(scene), 0, 255).astype(np.uint8),
            mask=mask,
            strength=1.0,
        )
        for ground, scene in zip(grounds, scenes, strict=True)
        for seed in range(2)
    ]
    outpainted = [  # the left half is cut off, and generated as an extension
        dataclasses.replace(request, image=request.image[:, draw.SIZE // 2 :], mask=None, extend=(draw.SIZE // 2, 0, 0, 0))
        for request in requests[::2]
    ]
    requests += outpainted
    with Pipeline.open(shapes_bundle) as pipe:
        pictures = pipe(requests).pixels
    for request, picture in zip(requests, pictures, strict=True):
        ground = request.prompt.split()[-2]
        left, right = (np.where(half[..., None], picture, np.uint8(draw.COLOURS[ground])) for half in (mask, ~mask))
        assert [read.read(half)["shape"] for half in (left, right)] == ["square", "circle"], request
        assert [read.read(half)["place"] for half in (left, right)] == ["left", "right"], request


@pytest.mark.parametrize("resize", ["lanczos", "latent"])
def test_the_second_pass_follows_the_prompt_at_the_size_of_the_training(
    shapes_bundle: Path, draw: Any, read: Any, resize: str
) -> None:
    """The model was trained at 64x64: its first pass at 32x32 shows no shape that the reader knows, the second one does."""
    scenes = [
        draw.Scene("circle", "red", "large", "left", "white"),
        draw.Scene("square", "green", "small", "right", "black"),
        draw.Scene("triangle", "blue", "large", "top", "white"),
        draw.Scene("cross", "yellow", "small", "bottom", "black"),
    ]
    small = [Request(prompt=scene.caption, seed=1, guidance=2.0, size=(32, 32)) for scene in scenes]
    second: dict[str, Any] = {"hires": 2.0, "hires_strength": 0.8, "hires_resize": resize}
    with Pipeline.open(shapes_bundle, backend="onnxruntime") as pipe:
        first = pipe(small).pixels
        finished = pipe([dataclasses.replace(request, **second) for request in small]).pixels
    for scene, before, after in zip(scenes, first, finished, strict=True):
        enlarged = np.asarray(Image.fromarray(before).resize((64, 64), Image.Resampling.LANCZOS))
        assert read.read(enlarged)["shape"] is None
        assert read.read(after) == {name: getattr(scene, name) for name in scene.__slots__}


def test_prompt_editing_changes_size_and_colour_early(shapes_bundle: Path, read: Any) -> None:
    prompt = "a [large blue:small red:{}] circle on the left on a white background"
    circle = {"shape": "circle", "place": "left", "background": "white"}
    with Pipeline.open(shapes_bundle, backend="onnxruntime") as pipe:
        never, soon = (pipe(prompt.format(when), prompt_syntax="a1111", seed=1).pixels[0] for when in ("1.0", "0.2"))
    assert read.read(never) == {**circle, "colour": "blue", "size": "large"}
    assert read.read(soon) == {**circle, "colour": "red", "size": "small"}
