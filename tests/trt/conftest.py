"""The versions of TensorRT whose real surface the tests of its backend are held against."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trt.machine import Machine
from trt.machine import machine as machine_
from trt.small import small_bundle
from trt.surface import VERSIONS, Offline, Surface, Version
from trt.surface import surface as surface_

from sdruntime.engines.building import BuildRequest, build_engines

NEWEST = "tensorrt 11.4.0.106"
DRAWN = ("text_encoder", "unet", "vae_decoder", "step")  # what an image takes


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "version" in metafunc.fixturenames:
        metafunc.parametrize("version", VERSIONS, ids=[str(version).replace(" ", "-") for version in VERSIONS], scope="session")


@pytest.fixture(scope="session")
def surface(version: Version) -> Surface:
    """Of each version in turn."""
    return read(version)


@pytest.fixture(scope="session")
def surfaces() -> dict[str, Surface]:
    """Of all versions, by "module version"."""
    return {str(version): read(version) for version in VERSIONS}


@pytest.fixture(scope="session")
def rtx() -> Surface:
    """Of TensorRT-RTX."""
    return read(VERSIONS[-1])


def read(version: Version) -> Surface:
    try:
        return surface_(version)
    except Offline as error:
        pytest.skip(f"{version}: the binding cannot be fetched, being offline: {error}")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Machine]]:
    """machine(surface, **settings of Gpus) -> Machine, which stands for the real one until the test ends.

    Then nothing may be left on its GPUs.
    """
    monkeypatch.setenv("SDRUNTIME_CACHE", str(tmp_path_factory.mktemp("cache")))
    made: list[Machine] = []
    with ExitStack() as stack:

        def make(surface: Surface | None, **gpus: Any) -> Machine:
            made.append(stack.enter_context(machine_(surface, **gpus)))
            return made[-1]

        yield make
    for each in made:
        assert each.gpus.leaks() == []
        assert each.driver.retained == [0] * each.gpus.devices


@pytest.fixture(scope="session")
def small_folder(surfaces: dict[str, Surface], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle made by hand, with engines of NEWEST for 64x64 to 192x192 and 1 to 8 rows. Tests never write to it."""
    return small_with_engines(tmp_path_factory.mktemp("small"), surfaces[NEWEST])


@pytest.fixture
def here(machine: Callable[..., Machine], surfaces: dict[str, Surface]) -> Machine:
    """A machine with NEWEST."""
    return machine(surfaces[NEWEST])


def small_with_engines(place: Path, surface: Surface) -> Path:
    """The bundle made by hand, built under `place`."""
    small_bundle(place / "bare")
    asked = {"size": "64x64:64x64:192x192", "batch": "1:1:4", "guidance": "any"}
    with pytest.MonkeyPatch.context() as patch, machine_(surface) as here:
        patch.setenv("SDRUNTIME_CACHE", str(place / "cache"))
        return with_engines(place / "bare", place / "bundle", here, components=DRAWN, **asked)


def with_engines(bundle: Path, place: Path, machine: Machine, **asked: object) -> Path:
    """A copy of a bundle with the engines of a fake machine."""
    copy = Path(shutil.copytree(bundle, place))
    for _ in build_engines(copy, BuildRequest(backend=machine.backend, **asked)):  # type: ignore[arg-type]
        pass
    return copy


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = float(np.mean((one.astype(np.float64) - other) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))
