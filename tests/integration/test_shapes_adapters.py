"""The LoRA and the ControlNet that are trained for the shapes example: what they do, measured by its reader."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from places import SHAPES

from sdruntime import Control, Lora, Pipeline, Request

ADAPTERS = SHAPES / "adapters"
U, EDGES = ADAPTERS / "u.safetensors", ADAPTERS / "edges"
SETTINGS: dict[str, Any] = {"steps": 20, "guidance": 2.0}
Array = np.ndarray


@pytest.fixture(scope="module")
def evaluate() -> Iterator[Any]:
    sys.path.insert(0, str(SHAPES))
    yield importlib.import_module("evaluate")
    sys.path.remove(str(SHAPES))


@pytest.fixture(scope="module")
def controlled_bundle(shapes_checkpoint: Path, export: Callable[..., Path], ready: Callable[[Path], Path]) -> Path:
    return ready(export(shapes_checkpoint, controlnets={"controlnet_edges": str(EDGES)}))


def shares(evaluate: Any, scenes: list[Any], images: list[Array]) -> dict[str, float]:
    right, _ = evaluate.judge(scenes, images, (*evaluate.draw.SHAPES, evaluate.draw.U))
    return dict(right)


def images_of(pipe: Pipeline, scenes: list[Any], *loras: Lora) -> list[Array]:
    return list(pipe([scene.caption for scene in scenes], seed=7, loras=loras, **SETTINGS).pixels)


def test_the_files_are_small() -> None:
    assert U.stat().st_size <= 1e6
    assert sum(path.stat().st_size for path in EDGES.iterdir()) <= 4.2e6


def test_the_lora_adds_a_shape_and_without_it_the_model_is_unchanged(shapes_bundle: Path, evaluate: Any) -> None:
    discs, others = evaluate.draw.split(("u",))[1][:6], evaluate.draw.split()[1][:2]
    with Pipeline.open(shapes_bundle) as pipe:
        before = images_of(pipe, discs)
        trained = shares(evaluate, discs, images_of(pipe, discs, Lora(U)))
        kept = shares(evaluate, others, images_of(pipe, others, Lora(U)))
        after = images_of(pipe, discs)
    assert trained["shape"] >= 5 / 6
    assert trained["place"] >= 5 / 6
    assert kept["place"] == 1
    assert shares(evaluate, discs, before)["shape"] == 0
    np.testing.assert_array_equal(before, after)


@pytest.mark.full
def test_the_lora_over_held_out_captions(shapes_bundle: Path, evaluate: Any) -> None:
    discs, others = evaluate.draw.split(("u",))[1], evaluate.draw.split()[1][:54]
    with Pipeline.open(shapes_bundle) as pipe:
        trained = shares(evaluate, discs, images_of(pipe, discs, Lora(U)))
        kept = shares(evaluate, others, images_of(pipe, others, Lora(U)))
    assert trained["shape"] >= 0.8
    assert trained["all"] >= 0.7
    assert kept["place"] >= 0.9
    assert kept["all"] >= 0.5


@pytest.mark.full
def test_the_controlnet_puts_shapes_where_the_edges_are(controlled_bundle: Path, evaluate: Any) -> None:
    placed = evaluate.placed_scenes(54)
    images = evaluate.controlled(controlled_bundle, placed, steps=20, guidance=2.0, seed=7)
    right = evaluate.judge_placed(placed, images)
    assert right["place"] >= 0.9
    with Pipeline.open(controlled_bundle) as pipe:
        plain = list(pipe([each.scene.caption for each in placed], seed=7, **SETTINGS).pixels)
    assert evaluate.judge_placed(placed, plain)["place"] <= 0.15


@pytest.mark.full
def test_a_lora_none_and_a_controlnet_in_one_call(controlled_bundle: Path, evaluate: Any) -> None:
    placed = evaluate.placed_scenes(2)
    control = [Control(image=each.edges) for each in placed]
    captions = [each.scene.caption for each in placed]
    requests = [
        Request(prompt="a large red u at the top on a white background", loras=[Lora(U)], seed=1, **SETTINGS),
        Request(prompt=captions[0], seed=2, **SETTINGS),
        Request(prompt=captions[0], control=control[0], seed=3, **SETTINGS),
        Request(prompt=captions[1], control=control[1], loras=[Lora(U, 0.5)], seed=4, **SETTINGS),
        Request(prompt=captions[1], seed=5, steps=12, guidance=1.0),
    ]
    with Pipeline.open(controlled_bundle) as pipe:
        together = pipe(requests).pixels
        for request, image in zip(requests, together, strict=True):
            [alone] = pipe(request).pixels
            assert np.abs(alone.astype(int) - image).max() <= 1
