"""Bundles with ONNX Runtime engines in them, each made once a session."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sdruntime.build import Asked, build_engines

Ready = Callable[[Path], Path]


@pytest.fixture(scope="session")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Ready:
    """ready(bundle) -> a copy of it with engines."""
    made: dict[Path, Path] = {}

    def with_engines(bundle: Path) -> Path:
        if bundle not in made:
            made[bundle] = Path(shutil.copytree(bundle, tmp_path_factory.mktemp("ready") / bundle.name))
            for _ in build_engines(made[bundle], Asked(backend="onnxruntime")):
                pass
        return made[bundle]

    return with_engines


@pytest.fixture(scope="session")
def shapes_checkpoint() -> Path:
    """The trained example."""
    return Path(__file__).resolve().parents[2] / "examples" / "shapes" / "checkpoint"


@pytest.fixture(scope="session")
def shapes_bundle(shapes_checkpoint: Path, export: Callable[..., Path], ready: Ready) -> Path:
    return ready(export(shapes_checkpoint))
