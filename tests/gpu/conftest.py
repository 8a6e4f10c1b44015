"""The GPU scripts of benchmarks/gpu on the fake machines of tests/trt: the very code that a GPU will run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from trt.conftest import machine, read  # machine is a fixture
from trt.machine import Machine
from trt.surface import VERSIONS

__all__ = ["machine"]
PROMPT = "a cat in the red and"


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the caller's environment decides."""
    for name in ("REQUIRE", "ALLOW_NO_GPU"):
        monkeypatch.delenv(name, raising=False)


H100 = {"name": "NVIDIA H100 80GB HBM3", "capability": (9, 0)}
NEWEST = {version.module: version for version in VERSIONS}


@pytest.fixture
def h100(machine: Callable[..., Machine]) -> Callable[[str], Machine]:
    """h100(module) -> a machine with an H100 by name, and that library in its newest version."""
    return lambda module: machine(read(NEWEST[module]), **H100)


@pytest.fixture(params=["tensorrt", "tensorrt_rtx"])
def here(request: pytest.FixtureRequest, machine: Callable[..., Machine]) -> Machine:
    """A machine with a GPU that its library lists."""
    gpu = H100 if request.param == "tensorrt" else {"name": "NVIDIA GeForce RTX 3060", "capability": (8, 6)}
    return machine(read(NEWEST[request.param]), **gpu)


@pytest.fixture(scope="session")
def reference(sd1_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CPU's images of the tiny SD1."""
    from benchmarks.gpu.check import cpu_pictures

    return cpu_pictures(sd1_bundle, tmp_path_factory.mktemp("reference"), PROMPT)
