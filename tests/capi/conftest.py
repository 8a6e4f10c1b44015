"""Three builds of the library, and bundles. Each is built once per session, and only if a test needs it."""

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
    """Return a function that builds the library as "plain", "asan" or "tsan"."""
    builds: dict[str, Library] = {}

    def build_once(kind: str) -> Library:
        if kind not in builds:
            folder = once(tmp_path_factory, f"capi-{kind}", lambda folder: build_library(folder, SANITIZERS[kind]))
            builds[kind] = Library(folder=folder, flags=tuple(SANITIZERS[kind]))
        return builds[kind]

    return build_once


@pytest.fixture(scope="session")
def library(build: Build) -> Library:
    return build("plain")


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny bundle with random weights and engines of ONNX Runtime."""
    pytest.importorskip("onnxruntime")
    folder = Path(shutil.copytree(FIXTURE, tmp_path_factory.mktemp("capi") / "bundle"))
    for _ in build_engines(folder, BuildRequest(backend="onnxruntime")):
        pass
    return folder


@pytest.fixture(scope="session")
def empty_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that the stand-in accepts as a bundle."""
    folder = tmp_path_factory.mktemp("capi") / "empty"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    return folder


@pytest.fixture(autouse=True)
def _use_this_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let hosts find the interpreter that runs the tests, with the runtime of this tree."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "runtime"))
    monkeypatch.setenv("SDRUNTIME_PYTHON", sys.prefix)
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    assert STAND_IN.exists()
