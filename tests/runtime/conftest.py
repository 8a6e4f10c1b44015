from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bundles import make_bundle
from places import FIXTURE

from sdruntime.bundle.bundle import Bundle
from sdruntime.engines.building import BuildRequest, build_engines


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A sound bundle made by hand, with no engine."""
    return make_bundle(tmp_path / "bundle")


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixture bundle of random weights, with ONNX Runtime's engines: small, and its images are not flat."""
    pytest.importorskip("onnxruntime")
    folder = Path(shutil.copytree(FIXTURE, tmp_path_factory.mktemp("fixture") / "bundle"))
    for _ in build_engines(folder, BuildRequest(backend="onnxruntime")):
        pass
    return folder


@pytest.fixture
def dead_token() -> str:
    """The token of a process that has ended."""
    code = "from sdruntime.system.owner import Owner; print(Owner.here().token())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
