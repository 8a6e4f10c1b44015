"""The GPU scripts of benchmarks/gpu on the fake machines of tests/trt: the very code that a GPU will run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from trt.conftest import machine, read  # machine is a fixture
from trt.machine import Machine
from trt.surface import VERSIONS

__all__ = ["machine"]
PROMPT = "a cat in the red and"


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing of the caller's environment decides."""
    for name in ("REQUIRE", "ALLOW_NO_GPU"):
        monkeypatch.delenv(name, raising=False)
    yield


@pytest.fixture(params=["tensorrt 11.4.0.106", "tensorrt_rtx 1.7.1.116"], ids=lambda each: each.split()[0])
def here(request: pytest.FixtureRequest, machine: Callable[..., Machine]) -> Machine:
    """A machine with an H100 by name, and one TensorRT: what the H100 really says is not known here."""
    version = next(each for each in VERSIONS if str(each) == request.param)
    return machine(read(version), name="NVIDIA H100 80GB HBM3", capability=(9, 0))


@pytest.fixture(scope="session")
def reference(sd1_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CPU's pictures of the tiny SD1."""
    from benchmarks.gpu.check import cpu_pictures

    return cpu_pictures(sd1_bundle, tmp_path_factory.mktemp("reference"), PROMPT)
