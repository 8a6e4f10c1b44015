"""The library in three builds, and a bundle that draws: each made once a session, and only if a test asks for it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from capi.building import ROOT, SANITIZERS, STAND_IN, Library, build_library
from once import once

from sdruntime.engines.building import BuildRequest, build_engines

FIXTURE = ROOT / "tests" / "runtime" / "fixture-bundle-1"
Build = Callable[[str], Library]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """build("plain" | "asan" | "tsan")."""
    made: dict[str, Library] = {}

    def built(kind: str) -> Library:
        if kind not in made:
            folder = once(tmp_path_factory, f"capi-{kind}", lambda folder: build_library(folder, SANITIZERS[kind]))
            made[kind] = Library(folder=folder, flags=tuple(SANITIZERS[kind]))
        return made[kind]

    return built


@pytest.fixture(scope="session")
def library(build: Build) -> Library:
    return build("plain")


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny, of random weights, with engines of ONNX Runtime."""
    pytest.importorskip("onnxruntime")
    folder = Path(shutil.copytree(FIXTURE, tmp_path_factory.mktemp("capi") / "bundle"))
    for _ in build_engines(folder, BuildRequest(backend="onnxruntime")):
        pass
    return folder


@pytest.fixture(scope="session")
def empty_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the stand-in takes for a bundle."""
    folder = tmp_path_factory.mktemp("capi") / "empty"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    return folder


@pytest.fixture(autouse=True)
def _of_this_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts find the interpreter of the tests, and the runtime of this tree."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "runtime"))
    monkeypatch.setenv("SDRUNTIME_PYTHON", sys.prefix)
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    assert STAND_IN.exists()
