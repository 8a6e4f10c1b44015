"""Machines with a GPU that nobody has: a strict TensorRT of each version over a strict driver, and the runtime none the wiser."""

from __future__ import annotations

import contextlib
import ctypes
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trt.fake_cudart import loader
from trt.fake_driver import Driver
from trt.fake_tensorrt import FakeTensorRT, fake_tensorrt
from trt.streams import Gpus
from trt.surface import VERSIONS, Offline, Surface, Version
from trt.surface import surface as read_surface

from sdruntime import cuda
from sdruntime.backends.trt import build, worker
from sdruntime.build import Asked, build_engines


@dataclass(frozen=True, slots=True)
class FakeMachine:
    """`backend` is the name under which sdruntime knows the library."""

    gpus: Gpus
    driver: Driver
    trt: FakeTensorRT
    version: Version

    @property
    def backend(self) -> str:
        return self.version.module.replace("_", "-")


Machines = Callable[..., FakeMachine]


@pytest.fixture(params=VERSIONS, ids=str)
def version(request: pytest.FixtureRequest) -> Version:
    found: Version = request.param
    surface_of(found)
    return found


@pytest.fixture
def surface(version: Version) -> Surface:
    """Of each version in turn."""
    return surface_of(version)


@pytest.fixture(scope="session")
def surfaces() -> dict[str, Surface]:
    """Of all versions, by "module version"."""
    return {str(each): surface_of(each) for each in VERSIONS}


@pytest.fixture(scope="session")
def rtx() -> Surface:
    """Of TensorRT-RTX."""
    return surface_of(VERSIONS[-1])


def surface_of(version: Version) -> Surface:
    """Its surface; the test is skipped where the binding cannot be fetched."""
    try:
        return read_surface(version)
    except Offline as error:
        pytest.skip(f"{version}: the binding cannot be fetched: {error}")


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """Makes this process see a GPU and a version of TensorRT; `Gpus`'s settings are passed on. Builds run in this process."""
    made: list[FakeMachine] = []

    def make(version: Version, **settings: Any) -> FakeMachine:
        gpus = Gpus(**settings)
        machine = FakeMachine(gpus, Driver(gpus), fake_tensorrt(read_surface(version), gpus), version)
        monkeypatch.setattr(ctypes, "CDLL", loader(machine.driver))
        monkeypatch.setitem(sys.modules, version.module, machine.trt)
        _forget()
        made.append(machine)
        return machine

    def run_here(module: str, job: dict[str, Any], **_: Any) -> Iterator[dict[str, Any]]:
        told: list[dict[str, Any]] = []
        worker.work(json.loads(json.dumps(job)), told.append)
        yield from told

    monkeypatch.setenv("SDRUNTIME_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(build, "run_apart", run_here)
    yield make
    monkeypatch.undo()
    _forget()
    for machine in made:
        assert machine.gpus.leaks() == []
        assert machine.driver.retained == [0] * machine.gpus.devices


def _forget() -> None:
    with contextlib.suppress(AttributeError):
        cuda.load_driver.cache_clear()
        cuda.devices.cache_clear()


def with_engines(bundle: Path, place: Path, machine: FakeMachine, **asked: object) -> Path:
    copy = Path(shutil.copytree(bundle, place))
    for _ in build_engines(copy, Asked(backend=machine.backend, **asked)):  # type: ignore[arg-type]
        pass
    return copy


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = float(np.mean((one.astype(np.float64) - other) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))
