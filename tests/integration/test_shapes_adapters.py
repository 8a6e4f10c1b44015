"""The ControlNet that is trained for the shapes example: what it does, measured by its reader."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from places import SHAPES

from sdruntime import Pipeline

ADAPTERS = SHAPES / "adapters"
EDGES = ADAPTERS / "edges"
SETTINGS: dict[str, Any] = {"steps": 20, "guidance": 2.0}


@pytest.fixture(scope="module")
def evaluate() -> Iterator[Any]:
    sys.path.insert(0, str(SHAPES))
    yield importlib.import_module("evaluate")
    sys.path.remove(str(SHAPES))


@pytest.fixture(scope="module")
def controlled_bundle(shapes_checkpoint: Path, export: Callable[..., Path], ready: Callable[[Path], Path]) -> Path:
    return ready(export(shapes_checkpoint, controlnets={"controlnet_edges": str(EDGES)}))


def test_the_file_is_small() -> None:
    assert sum(path.stat().st_size for path in EDGES.iterdir()) <= 4.2e6


@pytest.mark.full
def test_the_controlnet_puts_shapes_where_the_edges_are(controlled_bundle: Path, evaluate: Any) -> None:
    placed = evaluate.placed_scenes(54)
    images = evaluate.controlled(controlled_bundle, placed, steps=20, guidance=2.0, seed=7)
    right = evaluate.judge_placed(placed, images)
    assert right["place"] >= 0.9
    with Pipeline.open(controlled_bundle) as pipe:
        plain = list(pipe([each.scene.caption for each in placed], seed=7, **SETTINGS).pixels)
    assert evaluate.judge_placed(placed, plain)["place"] <= 0.15
