"""The versions of TensorRT whose real surface the tests of its backend are held against."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from trt.machine import Machine
from trt.machine import machine as machine_
from trt.surface import VERSIONS, Offline, Surface, Version
from trt.surface import surface as surface_


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
def machine() -> Iterator[Callable[..., Machine]]:
    """machine(surface, **settings of Gpus) -> Machine, which stands for the real one until the test ends."""
    with ExitStack() as stack:

        def make(surface: Surface | None, **gpus: Any) -> Machine:
            return stack.enter_context(machine_(surface, **gpus))

        yield make
