"""Bundles with ONNX Runtime engines in them, each made once a session; the door and the summary of the GPU tests."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from places import SHAPES

from benchmarks.gpu import gate
from benchmarks.gpu.check import faults
from benchmarks.gpu.clean import cleaned
from sdruntime.engines.building import BuildRequest, build_engines

Ready = Callable[[Path], Path]


@pytest.fixture(scope="session")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Ready:
    """ready(bundle) -> a copy of it with engines."""
    made: dict[Path, Path] = {}

    def with_engines(bundle: Path) -> Path:
        if bundle not in made:
            made[bundle] = Path(shutil.copytree(bundle, tmp_path_factory.mktemp("ready") / bundle.name))
            for _ in build_engines(made[bundle], BuildRequest(backend="onnxruntime")):
                pass
        return made[bundle]

    return with_engines


@pytest.fixture(scope="session")
def shapes_checkpoint() -> Path:
    """The trained example."""
    return SHAPES / "checkpoint"


@pytest.fixture(scope="session")
def shapes_bundle(shapes_checkpoint: Path, exported_once: Callable[..., Path], ready: Ready) -> Path:
    return ready(exported_once(shapes_checkpoint))


def pytest_collection_finish(session: pytest.Session) -> None:
    """`pytest -m gpu` without a GPU ends with 3, or with 0 where ALLOW_NO_GPU=1, and says that nothing was shown."""
    if session.config.option.markexpr.strip() == "gpu" and (shut := gate.closed()):
        pytest.exit(shut[1], returncode=shut[0])


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and (shut := gate.closed()):
        pytest.skip(shut[1])


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Which backend ran on the GPU, with what, and why another one did not; the same as JSON in the file GPU_TEST_JSON."""
    reports = [each for group in terminalreporter.stats.values() for each in group if getattr(each, "when", "") == "call"]
    told = [value for each in reports for name, value in each.user_properties if name == "gpu"]
    if not told:
        return
    terminalreporter.section("on the GPU")
    for each in told:
        found = faults(each) if "stage" in each else [each["error"]]
        what = f"{each.get('backend')} {each.get('version', '')} {each.get('precision', '')}".strip()
        how = f"PSNR {min(each['psnr'].values())} dB against the CPU" if "psnr" in each else ""
        terminalreporter.write_line(f"{what}: ran, {how}" if not found else f"{what}: DID NOT RUN AS IT MUST: {'; '.join(found)}")
    if path := os.environ.get("GPU_TEST_JSON"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps({"schema": 1, "checks": cleaned(told)}, indent=1) + "\n", encoding="utf-8")
